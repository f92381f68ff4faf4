// What torch.ops.marlin holds. The schemas are a contract: new arguments come last, with a default.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(marlin, m) {
  // Y = a · W (+ bias). W is packed in b (format/weight_words.h), s and zeros
  // (format/scale_order.h). `config` names a kernel configuration for tests; absent, the best for
  // the problem is chosen. `weight_type`, a name of core/types.h, follows from what else is given.
  m.def(
      "mul(Tensor a, Tensor b, Tensor s, Tensor? bias=None, str? config=None, "
      "Tensor? zeros=None, str? weight_type=None) -> Tensor");
  m.def(
      "mul.out(Tensor a, Tensor b, Tensor s, Tensor? bias=None, str? config=None, "
      "Tensor? zeros=None, str? weight_type=None, *, Tensor(a!) out) -> ()");
  // The same without a registered gradient, which costs a call microseconds even where none is
  // needed: marlin.ops.matmul takes this one then.
  m.def(
      "mul_inference(Tensor a, Tensor b, Tensor s, Tensor? bias=None, str? config=None, "
      "Tensor? zeros=None, str? weight_type=None) -> Tensor");

  // The quantizer's column loop (core/columns.h); codes and moved are FP32 like work.
  m.def(
      "quantize_columns(Tensor work, Tensor coupling, Tensor scale, Tensor? current=None) -> "
      "(Tensor codes, Tensor moved)");
  m.def("trial_losses(Tensor work, Tensor coupling, Tensor weights, Tensor scales) -> Tensor");

  m.def("pack(Tensor codes) -> Tensor");
  m.def("unpack(Tensor b) -> Tensor");
  m.def("pack_scales(Tensor scales) -> Tensor");
  m.def("unpack_scales(Tensor s) -> Tensor");
  m.def(
      "dequantize(Tensor b, Tensor s, ScalarType? dtype=None, Tensor? zeros=None, "
      "str? weight_type=None) -> Tensor");
}
