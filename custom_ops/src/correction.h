// What a token is centred on and multiplied by to make good what pruning took (Alanova et al., arXiv 2509.22166).
#pragma once

#include <algorithm>
#include <cmath>

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

// eta, the mean or the lower median of z; a NaN makes both NaN. Never -0. `keys` is scratch of `channels`.
inline float CenterOf(const MomentKernels& kernels, Center center, const float* z, size_t channels, int32_t* keys) {
  if (channels == 0) return 0.0f;
  if (center == Center::kMedian) return kernels.median(z, channels, keys);
  return static_cast<float>(kernels.sum(z, channels) / static_cast<double>(channels)) + 0.0f;
}

// nu = sqrt(Var[z] / Var[kept]), at most 4; 1 where there is no such number. The variances are given times channels.
inline float RatioOf(double all, double kept) {
  const double ratio = std::sqrt(all / kept);
  return kept == 0.0 || !std::isfinite(ratio) ? 1.0f : static_cast<float>(std::min(ratio, kMaxRatio));
}

// nu of z and of `kept`, z where it is kept and 0 elsewhere. In two passes: a large mean does no harm.
inline float VarianceRatio(const MomentKernels& kernels, const float* z, const float* kept, size_t channels) {
  const double count = static_cast<double>(channels);
  const auto deviation = [&](const float* x) { return kernels.squares(x, channels, kernels.sum(x, channels) / count); };
  return RatioOf(deviation(z), deviation(kept));
}

// The same of the kept channels `bits`, whose values are left in `kept`.
inline float VarianceRatio(const Kernels& kernels, const float* z, const uint64_t* bits, size_t channels, float* kept) {
  kernels.prune.apply_f32(z, bits, channels, kept);
  return VarianceRatio(kernels.moments, z, kept, channels);
}

inline float VarianceRatio(const double* z, const double* kept, size_t channels) {
  const double count = static_cast<double>(channels);
  const auto deviation = [&](const double* x) {
    return PortableSquares(x, channels, PortableSum(x, channels) / count);
  };
  return RatioOf(deviation(z), deviation(kept));
}

}  // namespace nmonnx
