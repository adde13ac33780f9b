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

// Selects the channels of one token after another; one per thread.
class Selector {
 public:
  Selector(const Kernels& kernels, Pattern pattern, const Criterion& criterion, size_t channels);

  // The bitmap of the kept channels of token `x`; valid until the next call.
  template <class T>
  const uint64_t* Select(const T* x);

  // z of the token that was selected last, in float; only where the criterion moves values.
  const float* moved() const { return z_.data(); }
  // What that token was centred on; 0 without a center.
  float center() const { return center_; }

 private:
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
