// Sum, squared deviation and median of a token, the same code for every SIMD target.
//
// Sums are of doubles in kPartialSums parts, channel k in part k % kPartialSums, whatever the width of the vectors, so
// that every target gives the same bits. The median is found by bisection over the keys of the values: each step
// counts how many are not above the middle of what is left.

#include <algorithm>

#include "kernels/portable.h"
#include "kernels/tables.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/moments.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_HAVE_FLOAT64
using D64 = hn::ScalableTag<double>;
using V64 = hn::Vec<D64>;

constexpr size_t kDoubles = hn::MaxLanes(D64());
constexpr size_t kVectors = kPartialSums / kDoubles;

// The sum of term(x[k]), `term` given for vectors and for single values.
template <class VectorTerm, class Term>
HWY_INLINE double SumOf(const float* x, size_t count, VectorTerm vector_term, Term term) {
  const D64 d;
  const hn::Rebind<float, D64> df;
  V64 sums[kVectors];
  for (size_t v = 0; v < kVectors; ++v) sums[v] = hn::Zero(d);
  size_t k = 0;
  for (; k + kPartialSums <= count; k += kPartialSums) {
    for (size_t v = 0; v < kVectors; ++v) {
      const V64 wide = hn::PromoteTo(d, hn::LoadU(df, x + k + v * kDoubles));
      sums[v] = hn::Add(sums[v], vector_term(wide));
    }
  }
  double parts[kPartialSums];
  for (size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[v], d, parts + v * kDoubles);
  for (; k < count; ++k) parts[k % kPartialSums] += term(double{x[k]});
  return AddParts(parts);
}

double Sum(const float* x, size_t count) {
  return SumOf(x, count, [](V64 wide) { return wide; }, [](double wide) { return wide; });
}

double Squares(const float* x, size_t count, double mean) {
  const V64 means = hn::Set(D64(), mean);
  return SumOf(
      x, count,
      [means](V64 wide) {
        const V64 off = hn::Sub(wide, means);
        return hn::Mul(off, off);
      },
      [mean](double wide) { return (wide - mean) * (wide - mean); });
}
#else
double Sum(const float* x, size_t count) { return PortableSum(x, count); }
double Squares(const float* x, size_t count, double mean) { return PortableSquares(x, count, mean); }
#endif

using D32 = hn::ScalableTag<int32_t>;
using V32 = hn::Vec<D32>;

constexpr size_t kLanes = hn::MaxLanes(D32());

size_t CountUpTo(const int32_t* keys, size_t count, int32_t limit) {
  const D32 d;
  const V32 limits = hn::Set(d, limit);
  V32 above[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  size_t k = 0;
  for (; k + 4 * kLanes <= count; k += 4 * kLanes) {
    for (size_t v = 0; v < 4; ++v) {
      above[v] = hn::Add(above[v], hn::VecFromMask(d, hn::Gt(hn::LoadU(d, keys + k + v * kLanes), limits)));
    }
  }
  int32_t parts[kLanes];
  hn::StoreU(hn::Add(hn::Add(above[0], above[1]), hn::Add(above[2], above[3])), d, parts);
  size_t found = k;
  for (const int32_t part : parts) found -= static_cast<size_t>(-part);  // a mask is -1
  for (; k < count; ++k) found += keys[k] <= limit;
  return found;
}

float Median(const float* x, size_t count, int32_t* keys) {
  const D32 d;
  int32_t low = OrderedKey(x[0]), high = low;
  V32 lows = hn::Set(d, low), highs = lows;
  size_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const V32 bits = hn::BitCast(d, hn::LoadU(hn::RebindToFloat<D32>(), x + k));
    const V32 key = hn::Xor(bits, hn::And(hn::BroadcastSignBit(bits), hn::Set(d, 0x7fffffff)));
    lows = hn::Min(lows, key);
    highs = hn::Max(highs, key);
    hn::StoreU(key, d, keys + k);
  }
  int32_t ends[2 * kLanes];
  hn::StoreU(lows, d, ends);
  hn::StoreU(highs, d, ends + kLanes);
  low = *std::min_element(ends, ends + kLanes);
  high = *std::max_element(ends + kLanes, ends + 2 * kLanes);
  for (; k < count; ++k) {
    keys[k] = OrderedKey(x[k]);
    low = std::min(low, keys[k]);
    high = std::max(high, keys[k]);
  }
  if (high > kHighestKey || low < kLowestKey) return BitsToFloat(0x7fc00000u);
  const size_t middle = (count - 1) / 2;
  while (low < high) {
    const int32_t half = static_cast<int32_t>((int64_t{low} + high) >> 1);
    if (CountUpTo(keys, count, half) > middle) {
      high = half;
    } else {
      low = half + 1;
    }
  }
  return OfOrderedKey(low) + 0.0f;
}

}  // namespace

MomentKernels MomentTable() { return {Sum, Squares, Median}; }

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
