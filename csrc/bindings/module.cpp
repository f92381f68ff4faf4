// marlin.host: the host-side rooms for Python without Torch. Packing on NumPy arrays, and a look
// into what the C++ knows (format, instruction sets).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/half.h"
#include "cpu/backend.h"
#include "cpu/pack.h"
#include "dispatch/select.h"
#include "format/scale_order.h"
#include "format/shared_memory.h"
#include "format/weight_words.h"

namespace py = pybind11;
using namespace marlin;

namespace {

// Runs body(first, last) over [0, count) on all cores.
template <typename Body>
void parallel(int64_t count, const Body& body) {
  const int64_t threads =
      std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, std::max<int64_t>(count, 1));
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back([&, t] { body(count * t / threads, count * (t + 1) / threads); });
  body(0, count / threads);
  for (auto& thread : others) thread.join();
}

void expect(bool ok, const char* argument, const std::string& expected, const py::array& got) {
  if (ok) return;
  const py::object shape = got.attr("shape");
  throw py::value_error(std::string("marlin.host: ") + argument + ": expected " + expected +
                        ", got " + py::str(got.dtype()).cast<std::string>() + " " +
                        py::str(shape).cast<std::string>());
}

void expect_array(const py::array& array, const char* argument, const py::dtype& dtype,
                  const std::string& expected) {
  const bool contiguous = (array.flags() & py::array::c_style) != 0;
  expect(array.ndim() == 2 && contiguous && array.dtype().is(dtype), argument,
         "C-contiguous " + expected, array);
}

struct Weight {
  int64_t k, n, groups;
};

// Scales, or zero points of `type` uint8.
int64_t check_scales(const py::array& s, const char* argument = "scales",
                     const char* type = "float16") {
  expect_array(s, argument, py::dtype(type), std::string(type) + " (groups, n)");
  expect(s.shape(0) > 0 && s.shape(1) > 0 && s.shape(1) % kTileColumns == 0, argument,
         "(groups, n) with n a multiple of 64", s);
  return s.shape(0);
}

Weight check_words(const py::array& b) {
  expect_array(b, "b", py::dtype("int32"), "int32 (k / 16, 2 n)");
  expect(b.shape(0) > 0 && b.shape(1) > 0 && b.shape(1) % kTileWords == 0, "b",
         "(k / 16, 2 n) with n a multiple of 64", b);
  return {b.shape(0) * kTileRows, b.shape(1) / 2, 1};
}

py::array pack(const py::array& codes) {
  expect_array(codes, "codes", py::dtype("uint8"), "uint8 (k, n)");
  const int64_t k = codes.shape(0), n = codes.shape(1);
  expect(k > 0 && n > 0 && k % kTileRows == 0 && n % kTileColumns == 0, "codes",
         "(k, n) with k a multiple of 16 and n of 64", codes);
  py::array_t<int32_t> b({k / kTileRows, 2 * n});
  auto* words = reinterpret_cast<uint32_t*>(b.mutable_data());
  const auto* source = static_cast<const uint8_t*>(codes.data());
  std::vector<uint8_t> seen(k / kTileRows);
  {
    py::gil_scoped_release release;
    parallel(k / kTileRows, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        seen[row] = cpu::pack_tile_rows(source, n, row, row + 1, words);
    });
  }
  if (std::any_of(seen.begin(), seen.end(), [](uint8_t bits) { return bits > 15; }))
    throw py::value_error("marlin.host: codes: expected values 0..15, got a larger one");
  return b;
}

py::array unpack(const py::array& b) {
  const Weight weight = check_words(b);
  py::array_t<uint8_t> codes({weight.k, weight.n});
  const auto* words = static_cast<const uint32_t*>(b.data());
  uint8_t* target = codes.mutable_data();
  py::gil_scoped_release release;
  parallel(weight.k / kTileRows, [&](int64_t first, int64_t last) {
    cpu::unpack_tile_rows(words, weight.n, first, last, target);
  });
  return codes;
}

template <typename Element>
void reorder_rows(const py::array& scales, bool pack, py::array& result) {
  const int64_t groups = scales.shape(0), n = scales.shape(1);
  const auto reorder = pack ? cpu::pack_scale_row<Element> : cpu::unpack_scale_row<Element>;
  const auto* source = static_cast<const Element*>(scales.data());
  auto* target = static_cast<Element*>(result.mutable_data());
  for (int64_t group = 0; group < groups; ++group)
    reorder(source + group * n, n, groups == 1, target + group * n);
}

py::array reorder_scales(const py::array& scales, bool pack) {
  const bool zeros = scales.dtype().is(py::dtype("uint8"));
  const int64_t groups = check_scales(scales, "scales", zeros ? "uint8" : "float16");
  py::array result(scales.dtype(), {groups, static_cast<int64_t>(scales.shape(1))});
  if (zeros) reorder_rows<uint8_t>(scales, pack, result);
  else reorder_rows<uint16_t>(scales, pack, result);
  return result;
}

py::array dequantize(const py::array& b, const py::array& s,
                     const std::optional<py::array>& zeros) {
  const Weight weight = check_words(b);
  const int64_t groups = check_scales(s);
  expect(s.shape(1) == weight.n && weight.k % groups == 0 && (weight.k / groups) % kTileRows == 0,
         "scales", "(groups, n) that match b", s);
  if (zeros) {
    const bool same = check_scales(*zeros, "zeros", "uint8") == groups;
    expect(same && zeros->shape(1) == weight.n, "zeros", "(groups, n) like the scales", *zeros);
  }
  py::array_t<float> values({weight.k, weight.n});
  const cpu::PackedWeight packed{static_cast<const uint32_t*>(b.data()),
                                 s.data(),
                                 Dtype::kF16,
                                 weight.k,
                                 weight.n,
                                 groups,
                                 zeros ? static_cast<const uint8_t*>(zeros->data()) : nullptr};
  float* target = values.mutable_data();
  py::gil_scoped_release release;
  const cpu::Kernels& kernels = *cpu::find_kernels("");
  parallel(weight.k / kTileRows, [&](int64_t first, int64_t last) {
    for (int64_t strip = 0; strip < weight.n / kTileColumns; ++strip)
      kernels.dequantize(packed, first * kTileRows, last * kTileRows, strip,
                         target + first * kTileRows * weight.n + strip * kTileColumns, weight.n);
  });
  return values;
}

Problem make_problem(int64_t m, int64_t n, int64_t k, int64_t group_size) {
  return {m, n, k, group_size == -1 ? 1 : k / group_size, Dtype::kF16, Dtype::kF16};
}

// The kernel configurations: name -> engine, and what a CTA is.
py::dict kernel_shapes() {
  py::dict shapes;
  auto add = [&](const KernelConfig& config, const char* engine, int threads, int stages,
                 bool can_pair) {
    const TileShape tile = tile_shape(config);
    py::dict entry;
    entry["engine"] = engine;
    entry["rows"] = tile.rows;
    entry["columns"] = tile.columns;
    entry["depth"] = tile.depth;
    entry["stages"] = stages;  // of all rings of a CTA
    entry["threads"] = threads;
    entry["twins"] = ctas_of_run(config);  // CTAs of a run
    entry["shared_bytes"] = shared_bytes(config);
    entry["scales_sums"] = scales_sums(config);  // or weights
    entry["can_pair"] = can_pair;  // two CTAs of a slice, over distributed shared memory
    shapes[py::str(std::string(shape_name(config)))] = entry;
  };
  for (size_t i = 0; i < kSm80Shapes.size(); ++i)
    add({Engine::kSm80, i}, "sm80", kSm80Shapes[i].shape.threads(),
        kSm80Shapes[i].shape.stages * kSm80Shapes[i].shape.depth_groups, false);
  for (size_t i = 0; i < kSm90Shapes.size(); ++i) {
    const Sm90Shape& shape = kSm90Shapes[i].shape;
    add({Engine::kSm90, i}, "sm90", shape.threads(), shape.stages, shape.can_pair());
  }
  return shapes;
}

std::string select_config(int64_t m, int64_t n, int64_t k, int64_t group_size, int sm_count,
                          int shared_bytes, int major, bool bf16_scales, bool bf16_rows) {
  const Device device{major, 0, sm_count, shared_bytes, major == 9};
  Problem problem = make_problem(m, n, k, group_size);
  if (bf16_scales) problem.scale = Dtype::kBF16;
  if (bf16_rows) problem.activation = Dtype::kBF16;
  return config_name(select(problem, device));
}

// (slice, first, last, contributors, order) of every segment of every run.
std::vector<std::vector<std::tuple<int64_t, int, int, int, int>>> partition(int64_t slices,
                                                                            int depth, int runs) {
  std::vector<std::vector<std::tuple<int64_t, int, int, int, int>>> result(runs);
  const Partition whole{slices, depth, runs};
  for (int run = 0; run < runs; ++run)
    for (SegmentWalk segment(whole, run); segment; segment.next()) {
      const Sharing sharing = whole.sharing(run, segment->slice);
      result[run].emplace_back(segment->slice, segment->first, segment->last, sharing.contributors,
                               sharing.order);
    }
  return result;
}

std::vector<std::pair<uint32_t, uint32_t>> raster(uint32_t row_tiles, uint32_t strips,
                                                  uint32_t group) {
  const Raster order{row_tiles, strips, group};
  std::vector<std::pair<uint32_t, uint32_t>> places;
  for (uint32_t slice = 0; slice < row_tiles * strips; ++slice) {
    const Raster::Place place = order.place_of(slice);
    places.emplace_back(place.row_tile, place.strip);
  }
  return places;
}

}  // namespace

PYBIND11_MODULE(host, m) {
  m.doc() = "Marlin's host-side C++ for NumPy: packing, and a look into format and kernels.";
  m.def("pack", &pack, py::arg("codes"), "codes uint8 (k, n), 0..15 -> words int32 (k / 16, 2 n)");
  m.def("unpack", &unpack, py::arg("b"), "words int32 (k / 16, 2 n) -> codes uint8 (k, n)");
  m.def(
      "pack_scales", [](const py::array& scales) { return reorder_scales(scales, true); },
      py::arg("scales"),
      "Scales float16 or zero points uint8 (groups, n) in column order -> in Marlin's order");
  m.def(
      "unpack_scales", [](const py::array& s) { return reorder_scales(s, false); }, py::arg("s"),
      "Scales float16 or zero points uint8 (groups, n) in Marlin's order -> in column order");
  m.def(
      "dequantize", &dequantize, py::arg("b"), py::arg("s"), py::arg("zeros") = py::none(),
      "words, float16 scales, uint8 zero points or None, all in Marlin's order -> float32 (k, n)");
  m.def(
      "cpu_kernels",
      [] {
        std::vector<std::string> names;
        for (const cpu::Kernels* kernels : cpu::available_kernels())
          names.emplace_back(kernels->name);
        return names;
      },
      "Names of the CPU kernels that this machine runs, fastest first.");
  m.def(
      "place_in_tile",
      [](int word, int nibble) {
        const TilePlace place = place_in_tile(word, nibble);
        return std::pair(place.row, place.column);
      },
      py::arg("word"), py::arg("nibble"), "(row, column) of a 16 x 64 tile's code.");
  m.def("kernel_shapes", &kernel_shapes, "CTA shapes of the CUDA engine by name.");
  m.def("select", &select_config, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group_size"),
        py::arg("sm_count"), py::arg("shared_bytes"), py::arg("major") = 8,
        py::arg("bf16_scales") = false, py::arg("bf16_rows") = false,
        "Name of the configuration chosen on a GPU with these limits: 'shape@runs'.");
  m.def(
      "busiest_run",
      [](int64_t slices, int depth, int runs) {
        const BusiestRun run = busiest_run({slices, depth, runs});
        return std::tuple(run.tiles, run.segments, run.sharers);
      },
      py::arg("slices"), py::arg("depth"), py::arg("runs"),
      "(tiles, segments, sharers of its last slice) of the run of a partition that has most to "
      "do.");
  m.def("raster", &raster, py::arg("row_tiles"), py::arg("strips"), py::arg("group"),
        "(row tile, strip) of every slice, in order.");
  m.def("partition", &partition, py::arg("slices"), py::arg("depth"), py::arg("runs"),
        "Per run, its segments: (slice, first tile, last tile, contributors, order).");
}
