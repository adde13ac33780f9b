// NMMatMulNBits(x, W, scales, zeros?, bias?, scale?, shift?, order?, row_sum?, dense?) -> y: NMMatMul with a W of 8 or
// 4 bits, whose blocks of `block_size` rows have a scale and a zero point in each column. The sums are in float32.

#include "linear.h"

namespace nmonnx {
namespace {

[[noreturn]] void Refuse(const std::string& why) { throw Refusal("NMMatMulNBits: " + why); }

Number NumberOf(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Number::kFloat;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Number::kHalf;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return Number::kInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return Number::kUint8;
    default: return Number::kNone;
  }
}

template <int kBits>
BlockWeight<kBits> ReadWeight(const Call& call, const Attributes& attributes, size_t channels) {
  constexpr Number kQ = kBits == 4 ? Number::kUint8 : Number::kInt8;
  const Tensor weight = call.Input(1), scales = call.Input(2);
  const std::optional<Tensor> zeros = call.OptionalInput(3);
  const size_t block = static_cast<size_t>(attributes.block_size);
  if (block == 0 || (block % 16 != 0 && block < channels)) {
    Refuse("the attribute 'block_size' is " + std::to_string(block) + "; it must be a multiple of 16, or at least K");
  }
  const auto blocks = static_cast<int64_t>((channels + block - 1) / block);
  if (scales.dims.size() != 2 || scales.dims[0] != blocks ||
      (scales.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && scales.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)) {
    Refuse("scales has shape " + ToString(scales.dims) + "; it must be [" + std::to_string(blocks) +
           ", N], a row for each block of W, in float32 or float16");
  }
  if (zeros && (zeros->dims != scales.dims || (NumberOf(zeros->type) != kQ && zeros->type != scales.type))) {
    Refuse("zeros has shape " + ToString(zeros->dims) + "; it must be " + ToString(scales.dims) + " as scales, in " +
           (kBits == 4 ? "uint8" : "int8") + " or in the type of scales");
  }
  const BlockWeight<kBits> w{weight.As<uint8_t>(),
                             static_cast<size_t>(scales.dims[1]),
                             block,
                             scales.data,
                             NumberOf(scales.type),
                             zeros ? zeros->data : nullptr,
                             zeros ? NumberOf(zeros->type) : Number::kNone,
                             attributes.accuracy_level == 4};
  const Dims expected{static_cast<int64_t>(channels), static_cast<int64_t>(w.RowBytes())};
  if (weight.dims != expected || NumberOf(weight.type) != kQ) {
    Refuse("W has shape " + ToString(weight.dims) + "; with " + std::to_string(kBits) + " bits, K = " +
           std::to_string(channels) + " and N = " + std::to_string(w.columns) + " it must be " + ToString(expected) +
           " in " + (kBits == 4 ? "uint8" : "int8"));
  }
  return w;
}

template <class X>
void MatMulNBits(const Call& call, const Attributes& attributes, const Kernels& kernels) {
  const Tensor x = call.Input(0);
  if (x.dims.empty()) Refuse("x is a scalar; its last axis must be the channels");
  const size_t channels = static_cast<size_t>(x.dims.back());
  const LinearInputs inputs{"NMMatMulNBits", x, channels, 4};
  if (attributes.bits == 8) return Linear<X>(call, attributes, kernels, inputs, ReadWeight<8>(call, attributes, channels));
  if (attributes.bits == 4) return Linear<X>(call, attributes, kernels, inputs, ReadWeight<4>(call, attributes, channels));
  Refuse("the attribute 'bits' is " + std::to_string(attributes.bits) + "; it must be 4 or 8");
}

template <class X>
OpSpec Spec(ONNXTensorElementDataType x) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kBool = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  return {"NMMatMulNBits", {x, kAny, kAny, kAny, x, kFloat, kFloat, kAny, kFloat, kBool}, 3, {x}, false, 2,
          MatMulNBits<X>};
}

}  // namespace

std::vector<OpSpec> MatMulNBitsOps() {
  return {Spec<float>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT), Spec<Half>(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)};
}

}  // namespace nmonnx
