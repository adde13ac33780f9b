// What prune.cc, moments.cc and matmul.cc define once per SIMD target.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/targets.h"

namespace nmonnx {

#define NMONNX_DECLARE(target, name)     \
  namespace N_##target {                 \
  PruneKernels PruneTable();             \
  MatMulKernels<float> MatMulTableF32(); \
  MatMulKernels<Half> MatMulTableF16();  \
  MomentKernels MomentTable();           \
  }
NMONNX_TARGETS(NMONNX_DECLARE)
#undef NMONNX_DECLARE

}  // namespace nmonnx
