// The list of ops: what register.cc registers.
#pragma once

#include "criterion.h"
#include "kernels/dispatch.h"
#include "ort.h"

namespace nmonnx {

// What the attributes of a node say; 0 where one is absent.
struct Attributes {
  Pattern pattern;
  Correction correction;
  int64_t bits;          // of the numbers of W
  int64_t block_size;    // rows of W that share a scale
  int64_t accuracy_level;  // 4: a product may round x to 8 bits, as that of MatMulNBits does
  size_t panel_tokens;   // from how many tokens on a product uses panels; 0 takes what was measured
};

// One overload of an op. Two of one name differ in their types.
struct OpSpec {
  const char* name;
  std::vector<ONNXTensorElementDataType> inputs;
  size_t required_inputs;
  std::vector<ONNXTensorElementDataType> outputs;  // all but the first are optional
  bool may_inplace;    // the first output may overwrite input 0
  size_t columns_of;  // the input whose last dimension is that of the output
  void (*compute)(const Call& call, const Attributes& attributes, const Kernels& kernels);
};

std::vector<OpSpec> PruneOps();
std::vector<OpSpec> MatMulOps();
std::vector<OpSpec> MatMulNBitsOps();

}  // namespace nmonnx
