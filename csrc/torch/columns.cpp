#include "torch/columns.h"

namespace marlin::ops {
namespace {

void expect(const char* op, const char* argument, const Tensor& tensor, const Tensor& work,
            std::initializer_list<int64_t> sizes, const char* meaning) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) same = same && tensor.size(i++) == size;
  if (!same || tensor.scalar_type() != ScalarType::Float || tensor.device() != work.device())
    fail(op, argument, join("Float ", meaning, " on ", device_name(work), " like work"),
         describe(tensor));
}

void expect_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_contiguous())
    fail(op, argument, "a contiguous tensor", join("a strided ", describe(tensor)));
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

ColumnSegment check_segment(const char* op, const Tensor& work, const Tensor& coupling) {
  if (work.scalar_type() != ScalarType::Float || work.dim() != 2 || work.size(0) < 1 ||
      work.size(0) > kMaxSegmentRows)
    fail(op, "work", join("Float (rows, n) of 1 to ", kMaxSegmentRows, " rows"), describe(work));
  expect_contiguous(op, "work", work);
  const int64_t rows = work.size(0);
  expect(op, "coupling", coupling, work, {rows, rows}, "(rows, rows)");
  if (rows > 1 && coupling.stride(1) != 1)
    fail(op, "coupling", "rows without gaps", join("a strided ", describe(coupling)));
  return {floats(work), floats(coupling), coupling.stride(0), static_cast<int>(rows), work.size(1)};
}

}  // namespace

ColumnsParams check_columns(const char* op, const Tensor& work, const Tensor& coupling,
                            const Tensor& scale, const std::optional<Tensor>& current) {
  const ColumnSegment segment = check_segment(op, work, coupling);
  expect(op, "scale", scale, work, {segment.n}, "(n,)");
  expect_contiguous(op, "scale", scale);
  if (current) {
    expect(op, "current", *current, work, {segment.rows, segment.n}, "(rows, n)");
    expect_contiguous(op, "current", *current);
  }
  return {segment, floats(scale), current ? floats(*current) : nullptr, nullptr, nullptr};
}

TrialParams check_trials(const char* op, const Tensor& work, const Tensor& coupling,
                         const Tensor& weights, const Tensor& scales) {
  const ColumnSegment segment = check_segment(op, work, coupling);
  expect(op, "weights", weights, work, {segment.rows}, "(rows,)");
  expect_contiguous(op, "weights", weights);
  if (scales.dim() != 2)
    fail(op, "scales", join("Float (candidates, n) with n = ", segment.n), describe(scales));
  expect(op, "scales", scales, work, {scales.size(0), segment.n}, "(candidates, n)");
  expect_contiguous(op, "scales", scales);
  return {segment, floats(weights), floats(scales), scales.size(0), nullptr};
}

}  // namespace marlin::ops
