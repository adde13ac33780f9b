// What a token is centred on and multiplied by to make good what pruning took (Alanova et al., arXiv 2509.22166).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/portable.h"

namespace nmonnx {

// The attributes of an op that ask for corrections; nothing is corrected without.
enum class Center { kNone, kMean, kMedian };

struct Correction {
  bool variance = false;
  Center center = Center::kNone;

  bool None() const { return !variance && center == Center::kNone; }
};

constexpr double kMaxRatio = 4.0;

// The sum of term(0) .. term(count - 1), in double. Four partial sums, so that additions need not wait for each other.
template <class Term>
double Sum(size_t count, Term&& term) {
  double sums[4] = {};
  size_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (size_t i = 0; i < 4; ++i) sums[i] += term(k + i);
  }
  for (; k < count; ++k) sums[k % 4] += term(k);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// eta, the mean or the lower median of z; a NaN makes both NaN. Never -0.
inline float CenterOf(Center center, const float* z, size_t channels, std::vector<float>& scratch) {
  if (channels == 0) return 0.0f;
  if (center == Center::kMean) {
    return static_cast<float>(Sum(channels, [z](size_t k) { return double{z[k]}; }) / static_cast<double>(channels));
  }
  if (std::any_of(z, z + channels, [](float v) { return std::isnan(v); })) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  scratch.assign(z, z + channels);
  const auto middle = scratch.begin() + static_cast<std::ptrdiff_t>((channels - 1) / 2);
  std::nth_element(scratch.begin(), middle, scratch.end());
  return *middle + 0.0f;
}

// The variance of value(0) .. value(count - 1), times count. In two passes: a large mean does no harm.
template <class Value>
double SquaredDeviation(size_t count, Value&& value) {
  const double mean = Sum(count, value) / static_cast<double>(count);
  return Sum(count, [&](size_t k) {
    const double off = value(k) - mean;
    return off * off;
  });
}

// nu = sqrt(Var[z] / Var[z * mask]), at most 4; 1 where there is no such number. `value(k)` is z of channel k.
template <class Value>
float VarianceRatio(size_t channels, const uint64_t* bits, Value&& value) {
  const double all = SquaredDeviation(channels, value);
  const double kept = SquaredDeviation(channels, [&](size_t k) { return HasBit(bits, k) ? value(k) : 0.0; });
  const double ratio = std::sqrt(all / kept);
  return kept == 0.0 || !std::isfinite(ratio) ? 1.0f : static_cast<float>(std::min(ratio, kMaxRatio));
}

}  // namespace nmonnx
