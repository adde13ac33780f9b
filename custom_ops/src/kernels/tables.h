// What prune.cc, moments.cc, matmul.cc and matmul_nbits.cc define once per SIMD target.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/targets.h"

namespace nmonnx {

#define NMONNX_DECLARE(target, name)                       \
  namespace N_##target {                                   \
  PruneKernels PruneTable();                               \
  PanelKernels PanelTable();                               \
  MatMulKernels<DenseWeight<float>> MatMulTableFloat();    \
  MatMulKernels<DenseWeight<Half>> MatMulTableHalf();      \
  MatMulKernels<BlockWeight<8>> MatMulTableInt8();         \
  MatMulKernels<BlockWeight<4>> MatMulTableInt4();         \
  MomentKernels MomentTable();                             \
  }
NMONNX_TARGETS(NMONNX_DECLARE)
#undef NMONNX_DECLARE

}  // namespace nmonnx
