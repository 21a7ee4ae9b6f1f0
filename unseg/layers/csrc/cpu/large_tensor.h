// Tensors that an op is about to fill.
#pragma once

#include <ATen/ATen.h>

namespace unseg {

// at::empty on huge pages where the system offers them. Fresh memory comes page by page, at the
// first touch; on virtual machines those page faults can take longer than the op that fills the
// tensor. What is returned is an ordinary tensor, and the advice to the system only a hint.
at::Tensor empty_large(at::IntArrayRef size, at::ScalarType type);

}  // namespace unseg
