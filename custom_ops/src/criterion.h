// What a token's channels are ranked by, and the selection of those that are kept.
#pragma once

#include <memory>
#include <vector>

#include "correction.h"
#include "kernels/dispatch.h"
#include "ort.h"

namespace nmonnx {

// Keep `keep` of every `group` consecutive channels.
struct Pattern {
  int keep;
  int group;

  size_t KeptOf(size_t channels) const;
};

// z = x - shift - center, score = |z| * scale, groups cut along `order`; then the corrections. Empty where it would
// change nothing.
struct Criterion {
  std::vector<float> scale;
  std::vector<float> shift;
  std::vector<uint32_t> order;
  Correction correction;

  bool IsPlain() const { return scale.empty() && shift.empty() && order.empty() && correction.None(); }
  bool MovesValues() const { return !shift.empty() || correction.center != Center::kNone; }
};

// Reads the optional inputs scale, shift and order, which start at input `first`, for `channels` channels.
Criterion ReadCriterion(const Call& call, size_t first, size_t channels, Correction correction);

// Which tokens keep all their channels.
class DenseTokens {
 public:
  DenseTokens() = default;
  // One value for each token, or a single one for all.
  DenseTokens(const bool* values, size_t count) : values_(values), count_(count) {}

  bool operator()(size_t token) const { return count_ != 0 && values_[count_ == 1 ? 0 : token]; }
  // Those from token `first` on.
  DenseTokens From(size_t first) const { return count_ > 1 ? DenseTokens(values_ + first, count_ - first) : *this; }
  bool AnyOf(size_t tokens) const;

 private:
  const bool* values_ = nullptr;
  size_t count_ = 0;
};

// Reads the optional input `dense` of an op whose x has `tokens` tokens.
DenseTokens ReadDense(const Call& call, size_t input, size_t tokens);

// Selects the channels of one token after another; one per thread.
class Selector {
 public:
  Selector(const Kernels& kernels, Pattern pattern, const Criterion& criterion, size_t channels);

  // The bitmap of the kept channels of token `x`; valid until the next call.
  template <class T>
  const uint64_t* Select(const T* x);
  // The same with all channels kept.
  template <class T>
  const uint64_t* SelectAll(const T* x);

  // z of the token that was selected last, in float; only where the criterion moves values.
  const float* moved() const { return z_.data(); }
  // What that token was centred on; 0 without a center.
  float center() const { return center_; }

 private:
  // z_ from x; left alone where z is x and the type of x is float.
  void Move(const float* x);
  void Move(const Half* x);
  void Move(const double* x);
  const uint64_t* SelectScored(const float* z);
  void TakeCenter();

  const Kernels& kernels_;
  const Pattern pattern_;
  const Criterion& criterion_;
  const size_t channels_;
  float center_ = 0.0f;
  std::vector<float> z_;
  std::vector<int32_t> keys_;
  std::vector<uint64_t> bits_;
  std::vector<uint64_t> ordered_bits_;
};

}  // namespace nmonnx
