// What NMMatMul and NMMatMulNBits have in common: everything but the type of W.
#pragma once

#include "ops.h"

namespace nmonnx {

// The first inputs of an op, and where the optional ones bias, scale, shift, order, row_sum, dense start.
struct LinearInputs {
  const char* op;
  Tensor x;
  size_t channels;
  size_t optional;
};

// y = nu (NMPrune(x) W) + eta row_sum + bias. X is the type of x, bias and y.
template <class X, class W>
void Linear(const Call& call, const Attributes& attributes, const Kernels& kernels, const LinearInputs& inputs,
            const W& w);

}  // namespace nmonnx
