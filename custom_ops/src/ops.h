// The list of ops: what register.cc registers.
#pragma once

#include "criterion.h"
#include "kernels/dispatch.h"
#include "ort.h"

namespace nmonnx {

// One overload of an op. Two of one name differ in their types.
struct OpSpec {
  const char* name;
  std::vector<ONNXTensorElementDataType> inputs;
  size_t required_inputs;
  std::vector<ONNXTensorElementDataType> outputs;  // all but the first are optional
  bool may_inplace;  // the first output may overwrite input 0
  bool multiplies;   // the last dimension of the output is that of input 1
  void (*compute)(const Call& call, Pattern pattern, Correction correction, const Kernels& kernels);
};

std::vector<OpSpec> PruneOps();
std::vector<OpSpec> MatMulOps();

}  // namespace nmonnx
