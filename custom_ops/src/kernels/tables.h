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
#if HWY_TARGETS & HWY_AVX3
namespace N_AVX3 {  // with dot products of bytes
MatMulKernels<BlockWeight<8>> MatMulTableVnniInt8();
MatMulKernels<BlockWeight<4>> MatMulTableVnniInt4();
}
#endif

}  // namespace nmonnx
