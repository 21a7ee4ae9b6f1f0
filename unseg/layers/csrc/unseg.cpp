// The operators of torch.ops.unseg and the Python module that loads them.
//
// All ops return fresh tensors of shapes known from the inputs' shapes, so that fake kernels
// (unseg/layers/native.py) and torch.compile need no data. Modes and kernels are numbered as in
// mask_ops.h. Only ATen and torch/library.h are used, and of Python only the limited API.
#include <Python.h>
#include <torch/library.h>

#include <string>

#include "cpu/mask_kernels.h"

TORCH_LIBRARY(unseg, m) {
  // masks (N, H, W) -> bits int64 (N, words), meta int32 (N, 8); a floating pixel is set above
  // the threshold, any other one if it is not zero.
  m.def("pack_masks(Tensor masks, float threshold) -> (Tensor bits, Tensor meta)");
  // COCO run lengths of N masks, mask n in data[offsets[n]:offsets[n + 1]]: uint8 strings or int64
  // counts. Pixels in column order.
  m.def(
      "pack_rle(Tensor data, Tensor offsets, int height, int width) -> (Tensor bits, Tensor meta)");
  // The ops below take masks packed, as bits and meta, or dense, bool, uint8 or int8, without meta.
  // -> (N, M) float32, int32 for mode inter; without masks2 of the masks with themselves.
  m.def(
      "mask_overlap(Tensor masks1, Tensor? meta1, Tensor? labels1, Tensor? masks2, Tensor? meta2, "
      "Tensor? labels2, int mode) -> Tensor");
  // What is kept: bool (N,); indices by falling score, int64 (N,), filled up with -1; their number.
  m.def(
      "mask_nms(Tensor masks, Tensor? meta, Tensor? labels, Tensor scores, float iou_threshold, "
      "int mode) -> (Tensor keep, Tensor ranked, Tensor count)");
  // Decayed scores, float32 (N,).
  m.def(
      "matrix_nms(Tensor masks, Tensor? meta, Tensor? labels, Tensor scores, int kernel, "
      "float sigma) -> Tensor");
  // Floating (n, C) -> (n, n) float32, float64 for float64 features.
  m.def("boc_affinity(Tensor features) -> Tensor");
  // The instruction set of the CPU kernels in use.
  m.def("mask_isa() -> str", [] { return std::string(unseg::mask_kernels().name); });
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   "Registers torch.ops.unseg.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
