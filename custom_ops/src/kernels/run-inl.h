// What a run of up to 16 rows of a block of W adds to a step of columns, once for every SIMD target.
#if defined(NMONNX_RUN_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NMONNX_RUN_INL_H
#undef NMONNX_RUN_INL_H
#else
#define NMONNX_RUN_INL_H
#endif

#include <cstring>

#include <hwy/highway.h>

#include "kernels/portable.h"
#include "kernels/widen-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kRunRows = 16;

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
constexpr size_t kBytes = 32;
#else
constexpr size_t kBytes = 16;
#endif

// The bits of W, whether the values are whole numbers of 16 bits or of 8, and whether there are dot products of bytes
// (VNNI, with vectors of 64 bytes).
template <int kBitsOfW, bool kValuesOf16, bool kVnni>
struct Form {
  static constexpr int kBits = kBitsOfW;
  static constexpr bool kLow = kValuesOf16, kDots = kVnni;
  static constexpr size_t kTogether = kVnni ? 4 : 2;                     // rows
  static constexpr size_t kColumns = (kVnni ? 64 : kBytes) * 8 / kBits;  // of a step
};

// The rows are a multiple of those that are taken together; at the end one may be there again, with the value 0.
struct Run {
  const uint8_t* rows[kRunRows];
  int16_t whole[kRunRows];               // value = step * whole
  int8_t high[kRunRows], low[kRunRows];  // whole = 256 high + low, or high where it has 8 bits
  float step;
  float sum;                      // of the values
  int32_t whole_sum;              // of the whole numbers
  int16_t start_high, start_low;  // where sums of 16 bits start for W of 4 bits without zeros: q stands for q - 8
  size_t count;
};

// Scales of some columns of a block as they lie in W, and zeros, which may be nullptr.
template <class S>
struct Scales {
  const S* scales;
  const float* zeros;
};

using D4 = hn::CappedTag<float, 8>;
using DI4 = hn::RebindToSigned<D4>;
using V4 = hn::Vec<D4>;

template <class D>
HWY_INLINE hn::Vec<D> LoadScale(D d, const float* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadScale(D d, const Half* p) {
#if HWY_TARGET == HWY_AVX3
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, D>(), reinterpret_cast<const hwy::float16_t*>(p)));
#else
  (void)d;
  return WidenHalf(p);
#endif
}

// y += scale * (step * whole - sum * zero) of one vector of columns; without zeros, `whole` contains theirs.
template <bool kZeros, class V, class R, class S>
HWY_INLINE void Flush(V whole, const R& run, const Scales<S>& block, size_t n, float* y) {
  const hn::RebindToFloat<hn::DFromV<V>> d;
  auto sums = hn::Mul(hn::Set(d, run.step), hn::ConvertTo(d, whole));
  if constexpr (kZeros) sums = hn::NegMulAdd(hn::Set(d, run.sum), hn::LoadU(d, block.zeros + n), sums);
  hn::StoreU(hn::MulAdd(sums, LoadScale(d, block.scales + n), hn::LoadU(d, y + n)), d, y + n);
}

#if HWY_TARGET == HWY_AVX3

// The target is compiled without VNNI: for compilers that do not know it, and because not every CPU of it has that.
HWY_INLINE void AddDots(__m512i& sums, __m512i bytes, __m512i by) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(by));
}

HWY_INLINE __m512i Everywhere(const int8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof(value));
  return _mm512_set1_epi32(value);
}

// 64 bytes of 4 rows, byte by byte: sets[i] has bytes 16 i to 16 i + 15 of each, in order.
HWY_INLINE void Interleave(const uint8_t* const* rows, size_t offset, __m512i* sets) {
  // Unpacking stays within lanes of 16 bytes: of these, lane l must have the words l, 4 + l, 8 + l and 12 + l.
  const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto load = [&](size_t r) {
    return _mm512_permutexvar_epi32(turn, _mm512_loadu_si512(rows[r] + offset));
  };
  const __m512i a = load(0), b = load(1), c = load(2), d = load(3);
  const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
  const __m512i ab2 = _mm512_unpackhi_epi8(a, b), cd2 = _mm512_unpackhi_epi8(c, d);
  sets[0] = _mm512_unpacklo_epi16(ab, cd);
  sets[1] = _mm512_unpackhi_epi16(ab, cd);
  sets[2] = _mm512_unpacklo_epi16(ab2, cd2);
  sets[3] = _mm512_unpackhi_epi16(ab2, cd2);
}

// 256 high + low, or high alone, from `start` on.
template <bool kLow>
HWY_INLINE hn::Vec<hn::Full512<int32_t>> Join(__m512i high, __m512i low, __m512i start) {
  if constexpr (!kLow) return {_mm512_add_epi32(high, start)};
  return {_mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), start)};
}

// Sums of whole bytes, and of their high nibbles, which count 16 times.
template <class F, bool kZeros, class S, std::enable_if_t<F::kBits == 4 && F::kDots, int> = 0>
HWY_INLINE void AddStep(const Run& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  constexpr bool kLow = F::kLow;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i high[4], low[4], high_16[4], low_16[4];
  for (int i = 0; i < 4; ++i) high[i] = low[i] = high_16[i] = low_16[i] = _mm512_setzero_si512();
  for (size_t s = 0; s < run.count / 4; ++s) {
    __m512i bytes[4];
    Interleave(run.rows + 4 * s, offset, bytes);
    const __m512i by_high = Everywhere(run.high + 4 * s), by_low = Everywhere(run.low + 4 * s);
    for (int i = 0; i < 4; ++i) {
      const __m512i upper = _mm512_and_si512(bytes[i], mask);
      AddDots(high[i], bytes[i], by_high);
      AddDots(high_16[i], upper, by_high);
      if constexpr (!kLow) continue;
      AddDots(low[i], bytes[i], by_low);
      AddDots(low_16[i], upper, by_low);
    }
  }
  const __m512i start = _mm512_set1_epi32(kZeros ? 0 : -8 * run.whole_sum);
  for (size_t i = 0; i < 4; ++i) {
    const auto first = [&](__m512i all, __m512i upper) { return _mm512_sub_epi32(all, upper); };
    const auto second = [&](__m512i upper) { return _mm512_srai_epi32(upper, 4); };
    Flush<kZeros>(Join<kLow>(first(high[i], high_16[i]), first(low[i], low_16[i]), start), run, block, n + 32 * i, y);
    Flush<kZeros>(Join<kLow>(second(high_16[i]), second(low_16[i]), start), run, block, n + 32 * i + 16, y);
  }
}

// W + 128 has no sign.
template <class F, bool kZeros, class S, std::enable_if_t<F::kBits == 8 && F::kDots, int> = 0>
HWY_INLINE void AddStep(const Run& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  constexpr bool kLow = F::kLow;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i high[4], low[4];
  for (int i = 0; i < 4; ++i) high[i] = low[i] = _mm512_setzero_si512();
  for (size_t s = 0; s < run.count / 4; ++s) {
    __m512i bytes[4];
    Interleave(run.rows + 4 * s, offset, bytes);
    const __m512i by_high = Everywhere(run.high + 4 * s), by_low = Everywhere(run.low + 4 * s);
    for (int i = 0; i < 4; ++i) {
      const __m512i shifted = _mm512_xor_si512(bytes[i], flip);
      AddDots(high[i], shifted, by_high);
      if constexpr (kLow) AddDots(low[i], shifted, by_low);
    }
  }
  const __m512i start = _mm512_set1_epi32(-128 * run.whole_sum);
  for (size_t i = 0; i < 4; ++i) Flush<kZeros>(Join<kLow>(high[i], low[i], start), run, block, n + 16 * i, y);
}

constexpr size_t kSets = kUnitRows / 4;

// A step of columns of a unit of rows, interleaved: vectors of 16 columns, of 4 rows each.
template <class F>
struct Interleaved {
  static constexpr size_t kVectors = F::kColumns / 16;
  alignas(64) uint8_t bytes[kSets][kVectors][64];

  HWY_INLINE void Take(const uint8_t* const* rows, size_t offset, size_t sets) {
    const __m512i mask = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(static_cast<char>(0x80));
    for (size_t s = 0; s < sets; ++s) {
      __m512i taken[4];
      Interleave(rows + 4 * s, offset, taken);
      for (size_t i = 0; i < 4; ++i) {
        if constexpr (F::kBits == 8) {
          _mm512_store_si512(bytes[s][i], _mm512_xor_si512(taken[i], flip));
        } else {
          _mm512_store_si512(bytes[s][2 * i], _mm512_and_si512(taken[i], mask));
          _mm512_store_si512(bytes[s][2 * i + 1], _mm512_and_si512(_mm512_srli_epi16(taken[i], 4), mask));
        }
      }
    }
  }
};

// What Flush wants to know of a token.
struct Scaled {
  float step, sum;
};

// Vectors of sums, one by one: compilers leave an array of so many in memory.
template <size_t kCount, bool kLow>
struct Sums {
  __m512i high, low;
  Sums<kCount - 1, kLow> others;

  HWY_INLINE void Clear() {
    high = low = _mm512_setzero_si512();
    if constexpr (kCount > 1) others.Clear();
  }

  HWY_INLINE void Add(const uint8_t (*bytes)[64], __m512i by_high, __m512i by_low) {
    const __m512i first = _mm512_load_si512(*bytes);
    AddDots(high, first, by_high);
    if constexpr (kLow) AddDots(low, first, by_low);
    if constexpr (kCount > 1) others.Add(bytes + 1, by_high, by_low);
  }

  template <bool kZeros>
  HWY_INLINE void Store(__m512i start, const Scaled& token, const Scales<float>& block, size_t n, float* y) const {
    Flush<kZeros>(Join<kLow>(high, low, start), token, block, n, y);
    if constexpr (kCount > 1) others.template Store<kZeros>(start, token, block, n + 16, y);
  }
};
template <bool kLow>
struct Sums<0, kLow> {};

template <class F, bool kZeros>
HWY_INLINE void AddToken(const Interleaved<F>& w, const int8_t* high, const int8_t* low, const WholeScale& scale,
                         size_t sets, const Scales<float>& block, float* y) {
  Sums<Interleaved<F>::kVectors, F::kLow> sums;
  sums.Clear();
  for (size_t s = 0; s < sets; ++s) {
    const __m512i by_high = Everywhere(high + 4 * s), by_low = F::kLow ? Everywhere(low + 4 * s) : by_high;
    sums.Add(w.bytes[s], by_high, by_low);
  }
  const Scaled token{scale.step, scale.step * static_cast<float>(scale.sum)};
  const __m512i start = _mm512_set1_epi32(F::kBits == 8 ? -128 * scale.sum : kZeros ? 0 : -8 * scale.sum);
  sums.template Store<kZeros>(start, token, block, 0, y);
}

#endif

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3

template <bool kZeros, bool kLow, class S>
HWY_INLINE void FlushTwo(__m256i high, __m256i low, const Run& run, const Scales<S>& block, size_t n, float* y) {
  if constexpr (!kLow) {
    const __m256i one = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(high));
    const __m256i other = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(high, 1));
    Flush<kZeros>(hn::Vec<DI4>{one}, run, block, n, y);
    return Flush<kZeros>(hn::Vec<DI4>{other}, run, block, n + 32, y);
  }
  const __m256i both = _mm256_set1_epi32(1 << 16 | 256);
  const __m256i first = _mm256_madd_epi16(_mm256_unpacklo_epi16(high, low), both);
  const __m256i second = _mm256_madd_epi16(_mm256_unpackhi_epi16(high, low), both);
  Flush<kZeros>(hn::Vec<DI4>{_mm256_permute2x128_si256(first, second, 0x20)}, run, block, n, y);
  Flush<kZeros>(hn::Vec<DI4>{_mm256_permute2x128_si256(first, second, 0x31)}, run, block, n + 32, y);
}

// The `bytes` at p, everywhere.
HWY_INLINE __m256i Everywhere16(const void* p) {
  int16_t value;
  std::memcpy(&value, p, sizeof(value));
  return _mm256_set1_epi16(value);
}
HWY_INLINE __m256i Everywhere32(const void* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof(value));
  return _mm256_set1_epi32(value);
}

// The compiler must not hold products back: there are no registers for them.
template <bool kLow>
HWY_INLINE void AddPair(__m256i q, __m256i by_high, __m256i by_low, __m256i& high, __m256i& low) {
  high = _mm256_add_epi16(high, _mm256_maddubs_epi16(q, by_high));
  asm volatile("" : "+x"(high));
  if constexpr (!kLow) return;
  low = _mm256_add_epi16(low, _mm256_maddubs_epi16(q, by_low));
  asm volatile("" : "+x"(low));
}

template <class F, bool kZeros, class S, std::enable_if_t<F::kBits == 4 && !F::kDots, int> = 0>
HWY_INLINE void AddStep(const Run& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  constexpr bool kLow = F::kLow;
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i high[4], low[4];
  for (int i = 0; i < 4; ++i) {
    high[i] = _mm256_set1_epi16(kZeros ? int16_t{0} : run.start_high);
    low[i] = _mm256_set1_epi16(kZeros ? int16_t{0} : run.start_low);
  }
  for (size_t p = 0; p < run.count / 2; ++p) {
    const __m256i by_high = Everywhere16(run.high + 2 * p), by_low = Everywhere16(run.low + 2 * p);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.rows[2 * p] + offset));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.rows[2 * p + 1] + offset));
    const __m256i first = _mm256_unpacklo_epi8(a, b), second = _mm256_unpackhi_epi8(a, b);
    AddPair<kLow>(_mm256_and_si256(first, mask), by_high, by_low, high[0], low[0]);
    AddPair<kLow>(_mm256_and_si256(second, mask), by_high, by_low, high[1], low[1]);
    AddPair<kLow>(_mm256_and_si256(_mm256_srli_epi16(first, 4), mask), by_high, by_low, high[2], low[2]);
    AddPair<kLow>(_mm256_and_si256(_mm256_srli_epi16(second, 4), mask), by_high, by_low, high[3], low[3]);
  }
  for (size_t i = 0; i < 4; ++i) FlushTwo<kZeros, kLow>(high[i], low[i], run, block, n + 8 * i, y);
}

template <class F, bool kZeros, class S, std::enable_if_t<F::kBits == 8 && !F::kDots, int> = 0>
HWY_INLINE void AddStep(const Run& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  __m256i sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = _mm256_setzero_si256();
  for (size_t p = 0; p < run.count / 2; ++p) {
    const __m256i by = Everywhere32(run.whole + 2 * p);
    for (size_t i = 0; i < 2; ++i) {
      const auto load = [&](size_t r) {
        const auto* at = reinterpret_cast<const __m128i*>(run.rows[r] + offset + 16 * i);
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
      };
      const __m256i a = load(2 * p), b = load(2 * p + 1);
      sums[2 * i] = _mm256_add_epi32(sums[2 * i], _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), by));
      sums[2 * i + 1] = _mm256_add_epi32(sums[2 * i + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), by));
    }
  }
  for (size_t i = 0; i < 2; ++i) {
    const __m256i first = _mm256_permute2x128_si256(sums[2 * i], sums[2 * i + 1], 0x20);
    const __m256i second = _mm256_permute2x128_si256(sums[2 * i], sums[2 * i + 1], 0x31);
    Flush<kZeros>(hn::Vec<DI4>{first}, run, block, n + 16 * i, y);
    Flush<kZeros>(hn::Vec<DI4>{second}, run, block, n + 16 * i + 8, y);
  }
}

#else

template <class F, bool kZeros, class S, std::enable_if_t<F::kBits == 4 && !F::kDots, int> = 0>
HWY_INLINE void AddStep(const Run& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  constexpr bool kLow = F::kLow;
  const hn::Full128<uint8_t> d8;
  const hn::Half<decltype(d8)> d8_half;
  const hn::Full128<int16_t> d16;
  const hn::Half<decltype(d16)> d16_half;
  const hn::Full128<int32_t> d32;
  hn::Vec<decltype(d16)> high[4], low[4];
  for (int i = 0; i < 4; ++i) {
    high[i] = kZeros ? hn::Zero(d16) : hn::Set(d16, run.start_high);
    low[i] = kZeros ? hn::Zero(d16) : hn::Set(d16, run.start_low);
  }
  for (size_t r = 0; r < run.count; ++r) {
    const auto bytes = hn::LoadU(d8, run.rows[r] + offset);
    const auto first = hn::And(bytes, hn::Set(d8, 15)), second = hn::ShiftRight<4>(bytes);
    const hn::Vec<decltype(d16)> q[] = {
        hn::PromoteTo(d16, hn::LowerHalf(d8_half, first)), hn::PromoteTo(d16, hn::UpperHalf(d8_half, first)),
        hn::PromoteTo(d16, hn::LowerHalf(d8_half, second)), hn::PromoteTo(d16, hn::UpperHalf(d8_half, second))};
    const auto by_high = hn::Set(d16, run.high[r]), by_low = hn::Set(d16, run.low[r]);
    for (int i = 0; i < 4; ++i) {
      high[i] = hn::Add(high[i], hn::Mul(q[i], by_high));
      if constexpr (kLow) low[i] = hn::Add(low[i], hn::Mul(q[i], by_low));
    }
  }
  const auto whole = [&](auto h, auto l) {
    if constexpr (!kLow) return hn::PromoteTo(d32, h);
    return hn::Add(hn::ShiftLeft<8>(hn::PromoteTo(d32, h)), hn::PromoteTo(d32, l));
  };
  for (size_t i = 0; i < 4; ++i) {
    Flush<kZeros>(whole(hn::LowerHalf(d16_half, high[i]), hn::LowerHalf(d16_half, low[i])), run, block, n + 8 * i, y);
    Flush<kZeros>(whole(hn::UpperHalf(d16_half, high[i]), hn::UpperHalf(d16_half, low[i])), run, block, n + 8 * i + 4,
                  y);
  }
}

template <class F, bool kZeros, class S, std::enable_if_t<F::kBits == 8 && !F::kDots, int> = 0>
HWY_INLINE void AddStep(const Run& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  const hn::Full128<int32_t> d;
  const hn::Rebind<int8_t, decltype(d)> d8;
  hn::Vec<decltype(d)> sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = hn::Zero(d);
  for (size_t r = 0; r < run.count; ++r) {
    const int8_t* row = reinterpret_cast<const int8_t*>(run.rows[r] + offset);
    const auto by = hn::Set(d, run.whole[r]);
    for (size_t i = 0; i < 4; ++i) {
      sums[i] = hn::Add(sums[i], hn::Mul(by, hn::PromoteTo(d, hn::LoadU(d8, row + 4 * i))));
    }
  }
  for (size_t i = 0; i < 4; ++i) Flush<kZeros>(sums[i], run, block, n + 4 * i, y);
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
