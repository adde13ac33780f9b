// NMMatMul(x, W, bias?, scale?, shift?, order?, row_sum?, dense?) -> y: y = NMPrune(x) W + bias. Rows of W that no
// token keeps are not read; a `dense` token keeps all. W lies as ONNX stores it and is never copied. Where the
// attributes `variance` and `center` ask for it, the product is multiplied by nu and center * row_sum is added, before
// the bias.

#include "linear.h"

namespace nmonnx {
namespace {

template <class X, class T>
void MatMul(const Call& call, const Attributes& attributes, const Kernels& kernels) {
  const Tensor x = call.Input(0), weight = call.Input(1);
  if (x.dims.empty() || weight.dims.size() != 2 || x.dims.back() != weight.dims[0]) {
    throw Refusal("NMMatMul: x has shape " + ToString(x.dims) + " and W has shape " + ToString(weight.dims) +
                  "; W must be [K, N] where K is the last dimension of x");
  }
  const DenseWeight<T> w{weight.As<T>(), static_cast<size_t>(weight.dims[1])};
  Linear<X>(call, attributes, kernels, {"NMMatMul", x, static_cast<size_t>(weight.dims[0]), 2}, w);
}

OpSpec Spec(ONNXTensorElementDataType x, ONNXTensorElementDataType w, decltype(OpSpec::compute) compute) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kBool = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  return {"NMMatMul", {x, w, x, kFloat, kFloat, kAny, kFloat, kBool}, 2, {x}, false, 1, compute};
}

}  // namespace

std::vector<OpSpec> MatMulOps() {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  return {Spec(kFloat, kFloat, MatMul<float, float>), Spec(kHalf, kHalf, MatMul<Half, Half>),
          Spec(kFloat, kHalf, MatMul<float, Half>)};
}

}  // namespace nmonnx
