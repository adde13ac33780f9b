// Selection of the kept channels, the same code for every SIMD target.
//
// A batch of groups is loaded transposed, so that each lane holds one group and vector i its i-th key. The keys of
// each half of the group are sorted by a network of min and max, the keep-th highest of the two sorted halves
// is the threshold, and the bits of the keys that reach it are collected. Only where ties make that too many
// the keys equal to the threshold are counted in order.

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/portable.h"
#include "kernels/tables.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/prune.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using D32 = hn::ScalableTag<int32_t>;
using V32 = hn::Vec<D32>;
using DU32 = hn::RebindToUnsigned<D32>;

constexpr size_t kLanes = hn::MaxLanes(D32());
constexpr int32_t kLowest = -0x7fffffff - 1;

// --- Loading -----------------------------------------------------------------------------------------------

template <class D>
HWY_INLINE hn::Vec<D> LoadRaw(D d, const float* p) {
  return hn::BitCast(d, hn::LoadU(hn::RebindToFloat<D>(), p));
}

template <class D>
HWY_INLINE hn::Vec<D> LoadRaw(D d, const Half* p) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<uint16_t, D>(), p));
}

template <class D>
HWY_INLINE hn::Vec<D> LoadRaw(D d, const int32_t* p) {
  return hn::LoadU(d, p);
}

// A vector whose 128-bit block b holds the four values at p + b * step.
template <class D, class T>
HWY_INLINE hn::Vec<D> LoadBlocks(D d, const T* p, size_t step) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    (void)step;
    return LoadRaw(d, p);
  } else {
    const hn::Half<D> half;
    constexpr size_t kBlocks = hn::MaxLanes(hn::Half<D>()) / 4;
    return hn::Combine(d, LoadBlocks(half, p + kBlocks * step, step), LoadBlocks(half, p, step));
  }
}

HWY_INLINE V32 ToKeys(const float*, V32 raw) {
  const D32 d;
  return hn::Min(hn::And(raw, hn::Set(d, 0x7fffffff)), hn::Set(d, 0x7f800001));
}

HWY_INLINE V32 ToKeys(const Half*, V32 raw) {
  const D32 d;
  return hn::Min(hn::And(raw, hn::Set(d, 0x7fff)), hn::Set(d, 0x7c01));
}

HWY_INLINE V32 ToKeys(const int32_t*, V32 raw) { return raw; }

// Keys `chunk` * 4 + (0..3) of kLanes groups of M values each.
template <int M, class T>
HWY_INLINE void LoadFourKeys(const T* x, int chunk, V32* keys) {
  const D32 d;
  const hn::Repartition<uint64_t, D32> d64;
  const T* p = x + chunk * 4;
  const V32 v0 = ToKeys(x, LoadBlocks(d, p, 4 * M));
  const V32 v1 = ToKeys(x, LoadBlocks(d, p + M, 4 * M));
  const V32 v2 = ToKeys(x, LoadBlocks(d, p + 2 * M, 4 * M));
  const V32 v3 = ToKeys(x, LoadBlocks(d, p + 3 * M, 4 * M));
  const auto low01 = hn::BitCast(d64, hn::InterleaveLower(d, v0, v1));
  const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(d, v0, v1));
  const auto low23 = hn::BitCast(d64, hn::InterleaveLower(d, v2, v3));
  const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(d, v2, v3));
  keys[0] = hn::BitCast(d, hn::InterleaveLower(d64, low01, low23));
  keys[1] = hn::BitCast(d, hn::InterleaveUpper(d64, low01, low23));
  keys[2] = hn::BitCast(d, hn::InterleaveLower(d64, high01, high23));
  keys[3] = hn::BitCast(d, hn::InterleaveUpper(d64, high01, high23));
}

// --- Batcher's odd-even merge sort, highest first --------------------------------------------------------

template <int A, int B>
HWY_INLINE void Exchange(V32* v) {
  const V32 high = hn::Max(v[A], v[B]);
  v[B] = hn::Min(v[A], v[B]);
  v[A] = high;
}

template <int First, int Step, int... I>
HWY_INLINE void ExchangeAll(V32* v, std::integer_sequence<int, I...>) {
  (Exchange<First + 2 * Step * I, First + 2 * Step * I + Step>(v), ...);
}

template <int Low, int Size, int Step>
HWY_INLINE void Merge(V32* v) {
  if constexpr (2 * Step < Size) {
    Merge<Low, Size, 2 * Step>(v);
    Merge<Low + Step, Size, 2 * Step>(v);
    ExchangeAll<Low + Step, Step>(v, std::make_integer_sequence<int, Size / (2 * Step) - 1>());
  } else {
    Exchange<Low, Low + Step>(v);
  }
}

template <int Low, int Size>
HWY_INLINE void Sort(V32* v) {
  if constexpr (Size > 1) {
    Sort<Low, Size / 2>(v);
    Sort<Low + Size / 2, Size / 2>(v);
    Merge<Low, Size, 1>(v);
  }
}

// --- Threshold and bits --------------------------------------------------------------------------------------

// The keep-th highest of two halves, each sorted highest first: the best over i + j = keep of
// min(i-th of one, j-th of the other).
template <int Size>
HWY_INLINE V32 Threshold(const int32_t* sorted, int keep) {
  const D32 d;
  const int32_t* other = sorted + Size * kLanes;
  V32 best = hn::Set(d, kLowest);
  if (keep <= Size) {
    best = hn::Max(hn::Load(d, sorted + (keep - 1) * kLanes), hn::Load(d, other + (keep - 1) * kLanes));
  }
  for (int i = std::max(1, keep - Size); i <= std::min(Size, keep - 1); ++i) {
    best = hn::Max(best, hn::Min(hn::Load(d, sorted + (i - 1) * kLanes),
                                 hn::Load(d, other + (keep - i - 1) * kLanes)));
  }
  return best;
}

// Keys First..First + Count as the low bits of each lane: those that reach the threshold.
template <int Count>
HWY_INLINE hn::Vec<DU32> BitsAtLeast(const int32_t* keys, V32 threshold) {
  const D32 d;
  V32 bits = hn::Zero(d);
  for (int i = 0; i < Count; ++i) {
    const V32 bit = hn::Set(d, static_cast<int32_t>(1u << i));
    bits = hn::Or(bits, hn::IfThenZeroElse(hn::Lt(hn::Load(d, keys + i * kLanes), threshold), bit));
  }
  return hn::BitCast(DU32(), bits);
}

// The same where keys equal to the threshold are taken only while there is room for them.
template <int Count>
HWY_INLINE hn::Vec<DU32> BitsInOrder(const int32_t* keys, V32 threshold, V32& room) {
  const D32 d;
  V32 bits = hn::Zero(d);
  for (int i = 0; i < Count; ++i) {
    const V32 key = hn::Load(d, keys + i * kLanes);
    const auto tied = hn::And(hn::Eq(key, threshold), hn::Gt(room, hn::Zero(d)));
    room = hn::Sub(room, hn::IfThenElseZero(tied, hn::Set(d, 1)));
    const auto taken = hn::Or(tied, hn::Gt(key, threshold));
    bits = hn::Or(bits, hn::IfThenElseZero(taken, hn::Set(d, static_cast<int32_t>(1u << i))));
  }
  return hn::BitCast(DU32(), bits);
}

// The kept ones of kLanes groups of M keys: word w of group g to words[w * kLanes + g], 32 keys a word.
template <int M, class T>
HWY_INLINE void SelectBatch(const T* x, int keep, uint32_t* words) {
  const D32 d;
  const DU32 du;
  constexpr int kWords = (M + 31) / 32;
  constexpr int kBits = std::min(M, 32);
  alignas(64) int32_t keys[M * kLanes];
  alignas(64) int32_t sorted[M * kLanes];
  for (int half = 0; half < 2; ++half) {
    V32 v[M / 2];
    if constexpr (M == 4) {
      V32 four[4];
      LoadFourKeys<M>(x, 0, four);
      v[0] = four[2 * half];
      v[1] = four[2 * half + 1];
    } else {
      for (int c = 0; c < M / 8; ++c) LoadFourKeys<M>(x, half * (M / 8) + c, v + 4 * c);
    }
    for (int i = 0; i < M / 2; ++i) hn::Store(v[i], d, keys + (half * M / 2 + i) * kLanes);
    Sort<0, M / 2>(v);
    for (int i = 0; i < M / 2; ++i) hn::Store(v[i], d, sorted + (half * M / 2 + i) * kLanes);
  }
  const V32 threshold = Threshold<M / 2>(sorted, keep);
  hn::Vec<DU32> taken = hn::Zero(du);
  for (int w = 0; w < kWords; ++w) {
    const auto bits = BitsAtLeast<kBits>(keys + w * 32 * kLanes, threshold);
    taken = hn::Add(taken, hn::PopulationCount(bits));
    hn::StoreU(bits, du, words + w * kLanes);
  }
  if (HWY_LIKELY(hn::AllTrue(du, hn::Eq(taken, hn::Set(du, static_cast<uint32_t>(keep)))))) return;
  V32 room = hn::Set(d, keep);
  for (int i = 0; i < M; ++i) {
    room = hn::Sub(room, hn::IfThenElseZero(hn::Gt(hn::Load(d, keys + i * kLanes), threshold), hn::Set(d, 1)));
  }
  for (int w = 0; w < kWords; ++w) {
    hn::StoreU(BitsInOrder<kBits>(keys + w * 32 * kLanes, threshold, room), du, words + w * kLanes);
  }
}

// --- Rows ------------------------------------------------------------------------------------------------------

template <int M>
HWY_INLINE uint64_t GroupBits(const uint32_t* words, size_t lane) {
  if constexpr (M <= 32) {
    return words[lane];
  } else {
    return words[lane] | static_cast<uint64_t>(words[kLanes + lane]) << 32;
  }
}

HWY_INLINE void PutBits(uint64_t* bits, size_t position, uint64_t value) {
  const size_t shift = position % 64;
  bits[position / 64] |= value << shift;
  if (shift != 0) bits[position / 64 + 1] |= value >> (64 - shift);
}

// Writes the bits of a whole batch at `position`, a multiple of M.
template <int M>
HWY_INLINE void PutBatch(uint64_t* bits, size_t position, const uint32_t* words) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(bits) + position / 8;
  if constexpr (M == 4) {
    for (size_t lane = 0; lane < kLanes; lane += 2) {
      bytes[lane / 2] = static_cast<uint8_t>(words[lane] | words[lane + 1] << 4);
    }
  } else {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const uint64_t value = GroupBits<M>(words, lane);
      std::memcpy(bytes + lane * (M / 8), &value, M / 8);
    }
  }
}

// Groups of any size up to M, and a shorter last one: copied, and filled up with keys that always lose.
template <int M, class T>
void SelectPadded(const T* x, size_t begin, size_t count, int keep, size_t group, uint64_t* bits) {
  alignas(64) int32_t keys[M * kLanes];
  uint32_t words[2 * kLanes];
  while (begin < count) {
    std::fill(keys, keys + M * kLanes, kLowest);
    const size_t end = std::min(count, begin + group * kLanes);
    for (size_t lane = 0; begin + lane * group < end; ++lane) {
      const T* from = x + begin + lane * group;
      const size_t size = std::min(group, end - begin - lane * group);
      for (size_t i = 0; i < size; ++i) keys[lane * M + i] = KeyOf(from[i]);
    }
    SelectBatch<M>(keys, keep, words);
    for (size_t lane = 0; begin + lane * group < end; ++lane) {
      const size_t size = std::min(group, end - begin - lane * group);
      const uint64_t real = size == 64 ? ~uint64_t{0} : (uint64_t{1} << size) - 1;
      PutBits(bits, begin + lane * group, GroupBits<M>(words, lane) & real);
    }
    begin = end;
  }
}

template <int M, class T>
void SelectGroups(const T* x, size_t count, int keep, size_t group, uint64_t* bits) {
  size_t done = 0;
  if (group == M) {
    uint32_t words[2 * kLanes];
    for (; done + M * kLanes <= count; done += M * kLanes) {
      SelectBatch<M>(x + done, keep, words);
      PutBatch<M>(bits, done, words);
    }
  }
  SelectPadded<M>(x, done, count, keep, group, bits);
}

template <class T>
void Select(const T* x, size_t count, int keep, int group, uint64_t* bits) {
  std::fill(bits, bits + BitmapWords(count), 0);
  const size_t size = static_cast<size_t>(group);
  if (group <= 4) return SelectGroups<4>(x, count, keep, size, bits);
  if (group <= 8) return SelectGroups<8>(x, count, keep, size, bits);
  if (group <= 16) return SelectGroups<16>(x, count, keep, size, bits);
  if (group <= 32) return SelectGroups<32>(x, count, keep, size, bits);
  SelectGroups<64>(x, count, keep, size, bits);
}

template <class D>
HWY_INLINE hn::Mask<D> LoadBits(D d, const uint8_t* bytes, size_t i) {
  if constexpr (hn::MaxLanes(D()) >= 8) {
    return hn::LoadMaskBits(d, bytes + i / 8);
  } else {
    const uint8_t shifted[8] = {static_cast<uint8_t>(bytes[i / 8] >> (i % 8))};
    return hn::LoadMaskBits(d, shifted);
  }
}

template <class T>
void Apply(const T* x, const uint64_t* bits, size_t count, T* y) {
  const hn::ScalableTag<T> d;
  const size_t lanes = hn::Lanes(d);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(bits);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(hn::IfThenElseZero(LoadBits(d, bytes, i), hn::LoadU(d, x + i)), d, y + i);
  }
  for (; i < count; ++i) y[i] = HasBit(bits, i) ? x[i] : T{0};
}

// --- float16 ---------------------------------------------------------------------------------------------------

// Targets without instructions for it convert one by one: Highway's emulation does not round as they do.
constexpr bool kHasHalf = HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == NMONNX_NEON_TARGET;

void WidenAll(const Half* x, size_t count, float* y) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> dh;
  size_t i = 0;
  if constexpr (kHasHalf) {
    for (; i + hn::Lanes(d) <= count; i += hn::Lanes(d)) {
      hn::StoreU(hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(x + i))), d, y + i);
    }
  }
  for (; i < count; ++i) y[i] = Widen(x[i]);
}

void NarrowAll(const float* x, size_t count, Half* y) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> dh;
  size_t i = 0;
  if constexpr (kHasHalf) {
    for (; i + hn::Lanes(d) <= count; i += hn::Lanes(d)) {
      hn::StoreU(hn::DemoteTo(dh, hn::LoadU(d, x + i)), dh, reinterpret_cast<hwy::float16_t*>(y + i));
    }
  }
  for (; i < count; ++i) y[i] = Narrow(x[i]);
}

}  // namespace

PruneKernels PruneTable() {
  return {Select<float>, Select<Half>, Select<int32_t>, Apply<float>, Apply<Half>, WidenAll, NarrowAll};
}

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
