#include "criterion.h"

#include <algorithm>

#include "kernels/portable.h"

namespace nmonnx {
namespace {

std::vector<float> ReadFactors(const Call& call, size_t input, const char* name, size_t channels, float neutral) {
  const std::optional<Tensor> tensor = call.OptionalInput(input);
  if (!tensor) return {};
  if (tensor->dims.size() > 1 || (tensor->Count() != channels && tensor->Count() != 1)) {
    throw Refusal(std::string(name) + " has shape " + ToString(tensor->dims) + "; it must be [" +
                  std::to_string(channels) + "] (the channels of x) or [1]");
  }
  const float* values = tensor->As<float>();
  if (tensor->Count() == channels && channels != 1) return std::vector<float>(values, values + channels);
  if (values[0] == neutral) return {};
  return std::vector<float>(channels, values[0]);
}

template <class T>
std::vector<uint32_t> ReadPermutation(const Tensor& tensor, size_t channels) {
  std::vector<uint32_t> order(channels);
  std::vector<bool> seen(channels);
  bool identity = true;
  for (size_t i = 0; i < channels; ++i) {
    const T channel = tensor.As<T>()[i];
    if (channel < 0 || static_cast<uint64_t>(channel) >= channels || seen[static_cast<size_t>(channel)]) {
      throw Refusal("order is not a permutation of the " + std::to_string(channels) + " channels of x: order[" +
                    std::to_string(i) + "] = " + std::to_string(channel));
    }
    order[i] = static_cast<uint32_t>(channel);
    seen[order[i]] = true;
    identity = identity && order[i] == i;
  }
  if (identity) order.clear();
  return order;
}

std::vector<uint32_t> ReadOrder(const Call& call, size_t input, size_t channels) {
  const std::optional<Tensor> tensor = call.OptionalInput(input);
  if (!tensor) return {};
  if (tensor->dims.size() != 1 || tensor->Count() != channels) {
    throw Refusal("order has shape " + ToString(tensor->dims) + "; it must be [" + std::to_string(channels) +
                  "] (the channels of x)");
  }
  if (tensor->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) return ReadPermutation<int64_t>(*tensor, channels);
  if (tensor->type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) return ReadPermutation<int32_t>(*tensor, channels);
  throw Refusal("order has element type " + std::to_string(tensor->type) + "; it must be int32 or int64");
}

// A negative score (of a negative scale) sorts below zero; -0 is 0.
int32_t ScoreKey(float z, float scale) {
  if (scale == 0.0f) return 0;
  const float score = std::fabs(z) * scale;
  if (!(score < 0.0f)) return KeyOf(score);
  return -KeyOf(score);
}

}  // namespace

size_t Pattern::KeptOf(size_t channels) const {
  const size_t k = static_cast<size_t>(keep), g = static_cast<size_t>(group);
  return channels / g * k + std::min(k, channels % g);
}

Criterion ReadCriterion(const Call& call, size_t first, size_t channels, Correction correction) {
  return {ReadFactors(call, first, "scale", channels, 1.0f), ReadFactors(call, first + 1, "shift", channels, 0.0f),
          ReadOrder(call, first + 2, channels), correction};
}

DenseTokens ReadDense(const Call& call, size_t input, size_t tokens) {
  const std::optional<Tensor> tensor = call.OptionalInput(input);
  if (!tensor) return {};
  const size_t count = tensor->Count();
  if (count != 1 && count != tokens) {
    throw Refusal("dense has shape " + ToString(tensor->dims) + "; it must have one element for each of the " +
                  std::to_string(tokens) + " tokens of x, or one for all");
  }
  return {tensor->As<bool>(), count};
}

bool DenseTokens::AnyOf(size_t tokens) const {
  for (size_t t = 0; t < tokens; ++t) {
    if ((*this)(t)) return true;
  }
  return false;
}

Selector::Selector(const Kernels& kernels, Pattern pattern, const Criterion& criterion, size_t channels)
    : kernels_(kernels), pattern_(pattern), criterion_(criterion), channels_(channels),
      bits_(BitmapWords(channels)) {
  if (criterion.IsPlain()) return;
  z_.resize(channels);
  keys_.resize(channels);
  if (!criterion.order.empty()) ordered_bits_.resize(BitmapWords(channels));
}

template <>
const uint64_t* Selector::Select(const float* x) {
  if (criterion_.IsPlain()) {
    kernels_.prune.select_f32(x, channels_, pattern_.keep, pattern_.group, bits_.data());
    return bits_.data();
  }
  Move(x);
  return SelectScored(criterion_.MovesValues() ? z_.data() : x);
}

template <>
const uint64_t* Selector::Select(const Half* x) {
  if (criterion_.IsPlain()) {
    kernels_.prune.select_f16(x, channels_, pattern_.keep, pattern_.group, bits_.data());
    return bits_.data();
  }
  Move(x);
  return SelectScored(z_.data());
}

template <>
const uint64_t* Selector::Select(const double* x) {
  Move(x);
  return SelectScored(z_.data());
}

template <class T>
const uint64_t* Selector::SelectAll(const T* x) {
  if (criterion_.MovesValues()) Move(x);
  std::fill(bits_.begin(), bits_.end(), 0);
  std::fill(bits_.begin(), bits_.begin() + static_cast<ptrdiff_t>(channels_ / 64), ~uint64_t{0});
  if (channels_ % 64 != 0) bits_[channels_ / 64] = (uint64_t{1} << channels_ % 64) - 1;
  return bits_.data();
}

template const uint64_t* Selector::SelectAll(const float*);
template const uint64_t* Selector::SelectAll(const Half*);
template const uint64_t* Selector::SelectAll(const double*);

void Selector::Move(const float* x) {
  if (!criterion_.MovesValues()) return;
  const float* shift = criterion_.shift.empty() ? nullptr : criterion_.shift.data();
  for (size_t k = 0; k < channels_; ++k) z_[k] = shift ? x[k] - shift[k] : x[k];
  TakeCenter();
}

void Selector::Move(const Half* x) {
  kernels_.prune.widen(x, channels_, z_.data());
  if (!criterion_.shift.empty()) {
    for (size_t k = 0; k < channels_; ++k) z_[k] -= criterion_.shift[k];
  }
  TakeCenter();
}

void Selector::Move(const double* x) {
  z_.resize(channels_);
  keys_.resize(channels_);
  const auto shifted = [&](size_t k) {
    return criterion_.shift.empty() ? x[k] : x[k] - static_cast<double>(criterion_.shift[k]);
  };
  for (size_t k = 0; k < channels_; ++k) z_[k] = static_cast<float>(shifted(k));
  if (criterion_.correction.center == Center::kNone) return;
  TakeCenter();
  for (size_t k = 0; k < channels_; ++k) z_[k] = static_cast<float>(shifted(k) - static_cast<double>(center_));
}

void Selector::TakeCenter() {
  if (criterion_.correction.center == Center::kNone) return;
  center_ = CenterOf(kernels_.moments, criterion_.correction.center, z_.data(), channels_, keys_.data());
  for (float& z : z_) z -= center_;
}

const uint64_t* Selector::SelectScored(const float* z) {
  if (criterion_.scale.empty() && criterion_.order.empty()) {
    kernels_.prune.select_f32(z, channels_, pattern_.keep, pattern_.group, bits_.data());
    return bits_.data();
  }
  const float* scale = criterion_.scale.empty() ? nullptr : criterion_.scale.data();
  const auto key_of = [z, scale](size_t k) { return scale ? ScoreKey(z[k], scale[k]) : KeyOf(z[k]); };
  const std::vector<uint32_t>& order = criterion_.order;
  if (order.empty()) {
    for (size_t k = 0; k < channels_; ++k) keys_[k] = key_of(k);
    kernels_.prune.select_keys(keys_.data(), channels_, pattern_.keep, pattern_.group, bits_.data());
    return bits_.data();
  }
  for (size_t i = 0; i < channels_; ++i) keys_[i] = key_of(order[i]);
  kernels_.prune.select_keys(keys_.data(), channels_, pattern_.keep, pattern_.group, ordered_bits_.data());
  std::fill(bits_.begin(), bits_.end(), 0);
  for (size_t i = 0; i < channels_; ++i) {
    if (HasBit(ordered_bits_.data(), i)) SetBit(bits_.data(), order[i]);
  }
  return bits_.data();
}

}  // namespace nmonnx
