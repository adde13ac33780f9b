// Products of the kept channels with the rows of a W of 8 or 4 bits, for every SIMD target.
//
// 8 bits: the numbers of up to 8 rows are widened and multiplied as floats.
// 4 bits: up to 16 rows of a block are a run. The values of a run become whole numbers of 16 bits, 256 high + low, or of
// 8 bits, high, so that 16 products of one of these bytes with numbers of 0..15 fit 16 bits; the sums of a run become
// floats and meet the scale. The error of a value is 2^-16 or 2^-8 of the highest one of its run. Values that are not
// finite are multiplied as floats.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/portable.h"
#include "kernels/tables.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_nbits.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/widen-inl.h"

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;

constexpr size_t kLanes = hn::MaxLanes(DF());
constexpr size_t kPiece = 256;      // columns whose scales are widened at once
constexpr size_t kLongRow = 4096;   // bytes from which on the CPU fetches ahead by itself
constexpr size_t kLine = 64;
constexpr float kMaxWhole16 = 32639;  // 127 * 256 + 127
constexpr float kMaxWhole8 = 127;

HWY_INLINE void Fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

HWY_INLINE VF WidenI8(const int8_t* p) {
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(hn::Rebind<int8_t, DF>(), p)));
}
HWY_INLINE VF WidenU8(const uint8_t* p) {
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(hn::Rebind<uint8_t, DF>(), p)));
}

// `count` numbers from `index` on as floats: where they lie, or in `buffer`.
const float* AsFloats(const void* data, Number type, size_t index, size_t count, float* buffer) {
  if (type == Number::kFloat) return static_cast<const float*>(data) + index;
  size_t n = 0;
  if (type == Number::kInt8) {
    for (; n + kLanes <= count; n += kLanes) {
      hn::StoreU(WidenI8(static_cast<const int8_t*>(data) + index + n), DF(), buffer + n);
    }
  } else if (type == Number::kUint8) {
    for (; n + kLanes <= count; n += kLanes) {
      hn::StoreU(WidenU8(static_cast<const uint8_t*>(data) + index + n), DF(), buffer + n);
    }
  } else if (type == Number::kHalf) {
    for (; n + kLanes <= count; n += kLanes) {
      hn::StoreU(WidenHalf(static_cast<const Half*>(data) + index + n), DF(), buffer + n);
    }
  }
  for (; n < count; ++n) buffer[n] = ReadNumber(data, type, index + n);
  return buffer;
}

// The scales and zeros of some columns in one block. Without zeros, `zeros` is nullptr.
struct Block {
  const float* scales;
  const float* zeros;
};

struct Buffers {
  float scales[kPiece];
  float zeros[kPiece];
};

template <int kBits>
Block BlockOf(const BlockWeight<kBits>& w, size_t block, size_t begin, size_t count, Buffers& buffers) {
  const size_t index = block * w.columns + begin;
  return {AsFloats(w.scales, w.scale_type, index, count, buffers.scales),
          w.zero_type == Number::kNone ? nullptr : AsFloats(w.zeros, w.zero_type, index, count, buffers.zeros)};
}

// The first entries that one sweep takes: at most `most`, of one block.
template <int kBits>
size_t RunLength(const BlockWeight<kBits>& w, const Entry* entries, size_t count, size_t most) {
  const size_t end = (entries[0].row / w.block_rows + 1) * w.block_rows;
  size_t length = 1;
  while (length < std::min(count, most) && entries[length].row < end) ++length;
  return length;
}

// ---- 8 bits

constexpr size_t kSweepRows = 8;

struct Rows8 {
  const int8_t* rows[kSweepRows];
  const int8_t* next[kSweepRows];
  float values[kSweepRows];
  float sum;
  size_t ahead;  // rows of `next`
};

template <int R>
void Sweep8(const Rows8& run, size_t begin, size_t count, const Block& block, float* y) {
  const DF d;
  VF values[R];
  for (int r = 0; r < R; ++r) values[r] = hn::Set(d, run.values[r]);
  const VF sum = hn::Set(d, run.sum);
  size_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    if (run.ahead != 0 && (begin + n) % kLine == 0) {
      for (size_t r = 0; r < run.ahead; ++r) Fetch(run.next[r] + begin + n);
    }
    VF sums = hn::Zero(d);
    if (block.zeros) sums = hn::NegMulAdd(sum, hn::LoadU(d, block.zeros + n), sums);
    for (int r = 0; r < R; ++r) sums = hn::MulAdd(values[r], WidenI8(run.rows[r] + begin + n), sums);
    hn::StoreU(hn::MulAdd(sums, hn::LoadU(d, block.scales + n), hn::LoadU(d, y + n)), d, y + n);
  }
  for (; n < count; ++n) {
    float total = block.zeros ? -run.sum * block.zeros[n] : 0.0f;
    for (int r = 0; r < R; ++r) total += run.values[r] * run.rows[r][begin + n];
    y[n] += total * block.scales[n];
  }
}

using Sweep8Fn = void (*)(const Rows8&, size_t, size_t, const Block&, float*);
constexpr Sweep8Fn kSweeps8[] = {nullptr,   Sweep8<1>, Sweep8<2>, Sweep8<3>, Sweep8<4>,
                                 Sweep8<5>, Sweep8<6>, Sweep8<7>, Sweep8<8>};

void AddRows8(const Entry* entries, size_t count, const Entry* next, size_t next_count, const BlockWeight<8>& w,
              Span columns, float* y) {
  const int8_t* data = reinterpret_cast<const int8_t*>(w.data);
  const bool fetch = columns.size() < kLongRow;
  Buffers buffers;
  while (count != 0) {
    const size_t length = RunLength(w, entries, count, kSweepRows);
    const Entry* after = length == count ? next : entries + length;
    Rows8 run;
    run.sum = 0.0f;
    for (size_t r = 0; r < length; ++r) {
      run.rows[r] = data + entries[r].row * w.columns;
      run.values[r] = entries[r].value;
      run.sum += entries[r].value;
    }
    run.ahead = fetch ? std::min(kSweepRows, length == count ? next_count : count - length) : 0;
    for (size_t r = 0; r < run.ahead; ++r) run.next[r] = data + after[r].row * w.columns;
    for (size_t n = columns.begin; n < columns.end; n += kPiece) {
      const size_t some = std::min(kPiece, columns.end - n);
      const Block block = BlockOf(w, entries[0].row / w.block_rows, n, some, buffers);
      kSweeps8[length](run, n, some, block, y + (n - columns.begin));
    }
    entries += length;
    count -= length;
  }
}

// ---- 4 bits

constexpr size_t kRunRows = 16;

// Rows in pairs; an odd one is paired with itself, with the value 0.
struct Rows4 {
  const uint8_t* rows[kRunRows];
  int8_t high[kRunRows], low[kRunRows];  // of the values
  float step;                            // value = step * (256 high + low)
  float sum;                             // of the values
  size_t pairs;
  int16_t start_high, start_low;  // where the sums start without zeros: q stands for q - 8
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

HWY_INLINE V4 LoadScale(const float* p) { return hn::LoadU(D4(), p); }
HWY_INLINE V4 LoadScale(const Half* p) {
#if HWY_TARGET == HWY_AVX3
  return hn::PromoteTo(D4(), hn::LoadU(hn::Rebind<hwy::float16_t, D4>(), reinterpret_cast<const hwy::float16_t*>(p)));
#else
  return WidenHalf(p);
#endif
}

// y += scale * (step * whole - sum * zero) of one vector of columns; without zeros, `whole` contains theirs.
template <bool kZeros, class S>
HWY_INLINE void Flush(hn::Vec<DI4> whole, const Rows4& run, const Scales<S>& block, size_t n, float* y) {
  const D4 d;
  V4 sums = hn::Mul(hn::Set(d, run.step), hn::ConvertTo(d, whole));
  if constexpr (kZeros) sums = hn::NegMulAdd(hn::Set(d, run.sum), hn::LoadU(d, block.zeros + n), sums);
  hn::StoreU(hn::MulAdd(sums, LoadScale(block.scales + n), hn::LoadU(d, y + n)), d, y + n);
}

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3

constexpr size_t kStep = 64;  // columns, two chunks

// The sums of 16 columns: 0..7 in the low lane, 8..15 of the next chunk in the high one.
template <bool kZeros, bool kLow, class S>
HWY_INLINE void FlushTwo(__m256i high, __m256i low, const Rows4& run, const Scales<S>& block, size_t n, float* y) {
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

// Two bytes, everywhere.
HWY_INLINE __m256i Two(const int8_t* bytes) {
  int16_t two;
  std::memcpy(&two, bytes, sizeof(two));
  return _mm256_set1_epi16(two);
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

template <bool kZeros, bool kLow, class S>
HWY_INLINE void AddStep(const Rows4& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i high[4], low[4];
  for (int i = 0; i < 4; ++i) {
    high[i] = _mm256_set1_epi16(kZeros ? int16_t{0} : run.start_high);
    low[i] = _mm256_set1_epi16(kZeros ? int16_t{0} : run.start_low);
  }
  for (size_t p = 0; p < run.pairs; ++p) {
    const __m256i by_high = Two(run.high + 2 * p), by_low = Two(run.low + 2 * p);
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

#else

constexpr size_t kStep = 32;  // columns, a chunk

template <bool kZeros, bool kLow, class S>
HWY_INLINE void AddStep(const Rows4& run, size_t offset, const Scales<S>& block, size_t n, float* y) {
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
  for (size_t r = 0; r < 2 * run.pairs; ++r) {
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

#endif

// The same of fewer columns than a step has, on copies that have them all.
template <bool kZeros, bool kLow, class S>
void AddRest(const Rows4& run, size_t offset, size_t bytes, const Scales<S>& block, size_t n, size_t count, float* y) {
  uint8_t rows[kRunRows][kStep / 2] = {};
  S scales[kStep] = {};
  float zeros[kStep] = {}, sums[kStep] = {};
  Rows4 copy = run;
  for (size_t r = 0; r < 2 * run.pairs; ++r) {
    std::copy(run.rows[r] + offset, run.rows[r] + offset + bytes, rows[r]);
    copy.rows[r] = rows[r];
  }
  std::copy(block.scales + n, block.scales + n + count, scales);
  if (kZeros) std::copy(block.zeros + n, block.zeros + n + count, zeros);
  std::copy(y + n, y + n + count, sums);
  AddStep<kZeros, kLow, S>(copy, 0, {scales, zeros}, 0, sums);
  std::copy(sums, sums + count, y + n);
}

// The values as whole numbers; false where they are no finite numbers, or too small to have a step.
bool Quantise(const Entry* entries, size_t length, bool to_8_bits, Rows4& run) {
  const float max_whole = to_8_bits ? kMaxWhole8 : kMaxWhole16;
  const D4 d;
  const DI4 di;
  float values[kRunRows] = {};
  for (size_t r = 0; r < length; ++r) values[r] = entries[r].value;
  V4 largest = hn::Zero(d);
  for (size_t r = 0; r < kRunRows; r += hn::Lanes(d)) {
    const V4 value = hn::LoadU(d, values + r);
    const auto bits = hn::BitCast(di, hn::Abs(value));  // as whole numbers they are in the order of the values, NaN last
    largest = hn::BitCast(d, hn::Max(hn::BitCast(di, largest), bits));
  }
  const float most = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, hn::BitCast(di, largest))));
  const float steps = most == 0.0f ? 0.0f : max_whole / most;
  if (!std::isfinite(most) || !std::isfinite(steps)) return false;
  int32_t whole[kRunRows];
  for (size_t r = 0; r < kRunRows; r += hn::Lanes(d)) {
    hn::StoreU(hn::NearestInt(hn::Mul(hn::LoadU(d, values + r), hn::Set(d, steps))), di, whole + r);
  }
  int high_sum = 0, low_sum = 0;
  for (size_t r = 0; r < kRunRows; ++r) {
    run.low[r] = static_cast<int8_t>(to_8_bits ? 0 : whole[r]);
    run.high[r] = static_cast<int8_t>(to_8_bits ? whole[r] : (whole[r] - run.low[r]) >> 8);
    high_sum += run.high[r];
    low_sum += run.low[r];
  }
  run.start_high = static_cast<int16_t>(-8 * high_sum);
  run.start_low = static_cast<int16_t>(-8 * low_sum);
  run.step = most / max_whole;
  run.sum = run.step * static_cast<float>(to_8_bits ? high_sum : 256 * high_sum + low_sum);
  return true;
}

// Fetches the rows of some entries one after the other: that is the order in which memory is fastest.
class Fetcher {
 public:
  Fetcher(const Entry* entries, size_t count, const uint8_t* data, size_t row_bytes, size_t bytes)
      : entry_(entries), end_(entries + count), data_(data), row_bytes_(row_bytes), bytes_(bytes) {
    StartRow();
  }

  HWY_INLINE void Take(size_t bytes) {
    const uint8_t* stop = at_ + bytes;
    while (stop >= row_end_ && entry_ != end_) {
      const size_t rest = static_cast<size_t>(stop - row_end_);
      for (; at_ < row_end_; at_ += kLine) Fetch(at_);
      ++entry_;
      StartRow();
      stop = at_ + rest;
    }
    if (entry_ == end_) return;
    for (; at_ < stop; at_ += kLine) Fetch(at_);
  }

 private:
  HWY_INLINE void StartRow() {
    at_ = row_end_ = nullptr;
    if (entry_ == end_) return;
    at_ = data_ + entry_->row * row_bytes_;
    row_end_ = at_ + bytes_;
  }

  const Entry *entry_, *const end_;
  const uint8_t* const data_;
  const size_t row_bytes_, bytes_;
  const uint8_t *at_, *row_end_;
};

template <bool kZeros, bool kLow, class S>
void AddRun(const Rows4& run, Fetcher ahead, size_t block, const BlockWeight<4>& w, Span columns, float* y) {
  float buffer[kPiece];
  const S* scales = static_cast<const S*>(w.scales) + block * w.columns;
  for (size_t begin = columns.begin; begin < columns.end; begin += kPiece) {
    const size_t count = std::min(kPiece, columns.end - begin);
    const float* zeros = kZeros ? AsFloats(w.zeros, w.zero_type, block * w.columns + begin, count, buffer) : nullptr;
    const Scales<S> piece{scales + begin, zeros};
    float* sums = y + (begin - columns.begin);
    size_t n = 0;
    for (; n + kStep <= count; n += kStep) {
      ahead.Take(run.pairs * kStep);
      AddStep<kZeros, kLow>(run, (begin + n) / 2, piece, n, sums);
    }
    if (n < count) AddRest<kZeros, kLow>(run, (begin + n) / 2, (count - n + 31) / 32 * 16, piece, n, count - n, sums);
  }
}

template <class S>
auto RunOf(const BlockWeight<4>& w) {
  const bool zeros = w.zero_type != Number::kNone;
  if (w.values_8_bits) return zeros ? AddRun<true, false, S> : AddRun<false, false, S>;
  return zeros ? AddRun<true, true, S> : AddRun<false, true, S>;
}

void AddRows4(const Entry* entries, size_t count, const Entry* next, size_t next_count, const BlockWeight<4>& w,
              Span columns, float* y) {
  const size_t row_bytes = w.RowBytes();
  const bool fetch = columns.size() / 2 < kLongRow;
  const size_t most = fetch ? kRunRows : kRunRows / 2;
  const uint8_t* data = w.data + columns.begin / 2;
  static const auto exactly = PortableKernels().matmul_int4.add_rows;
  const auto add_run = w.scale_type == Number::kFloat ? RunOf<float>(w) : RunOf<Half>(w);
  while (count != 0) {
    const size_t length = RunLength(w, entries, count, most);
    const bool last = length == count;
    const Entry* after = last ? next : entries + length;
    const size_t ahead = last ? next_count : count - length;
    Fetcher fetcher(after, fetch ? std::min(ahead, most) : 0, data, row_bytes, columns.size() / 2);
    Rows4 run;
    run.pairs = (length + 1) / 2;
    for (size_t r = 0; r < 2 * run.pairs; ++r) run.rows[r] = w.data + entries[std::min(r, length - 1)].row * row_bytes;
    if (Quantise(entries, length, w.values_8_bits, run)) {
      add_run(run, fetcher, entries[0].row / w.block_rows, w, columns, y);
    } else {
      exactly(entries, length, nullptr, 0, w, columns, y);
    }
    entries += length;
    count -= length;
  }
}

// ---- panels

HWY_INLINE VF Numbers(const BlockWeight<8>& w, size_t row, size_t column) {
  return WidenI8(reinterpret_cast<const int8_t*>(w.data) + row * w.columns + column);
}

HWY_INLINE VF Numbers(const BlockWeight<4>& w, size_t row, size_t column) {
  const DI d;
  const uint8_t* p = w.data + row * w.RowBytes() + column / 32 * 16 + column % 16;
  const auto two = hn::PromoteTo(d, hn::LoadU(hn::Rebind<uint8_t, DF>(), p));
  return hn::ConvertTo(DF(), column % 32 < 16 ? hn::And(two, hn::Set(d, 15)) : hn::ShiftRight<4>(two));
}

template <int kBits>
void CopyPanel(const BlockWeight<kBits>& w, Span rows, Span columns, float* panel) {
  const DF d;
  const size_t width = PanelTable().columns, count = columns.size();
  Buffers buffers;
  Block block{};
  for (size_t row = rows.begin; row < rows.end; ++row, panel += width) {
    if (row == rows.begin || row % w.block_rows == 0) {
      block = BlockOf(w, row / w.block_rows, columns.begin, count, buffers);
    }
    size_t n = 0;
    for (; n + kLanes <= count; n += kLanes) {
      const VF zero = block.zeros ? hn::LoadU(d, block.zeros + n) : hn::Set(d, w.kNoZero);
      const VF q = hn::Sub(Numbers(w, row, columns.begin + n), zero);
      hn::StoreU(hn::Mul(q, hn::LoadU(d, block.scales + n)), d, panel + n);
    }
    for (; n < count; ++n) panel[n] = At(w, row, columns.begin + n);
    std::fill(panel + n, panel + width, 0.0f);
  }
}

}  // namespace

MatMulKernels<BlockWeight<8>> MatMulTableInt8() { return {AddRows8, CopyPanel<8>}; }

MatMulKernels<BlockWeight<4>> MatMulTableInt4() { return {AddRows4, CopyPanel<4>}; }

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
