// Products of the kept channels with the rows of a W of 8 or 4 bits, for every SIMD target.
//
// 8 bits: the numbers of up to 8 rows are widened and multiplied as floats.
// 4 bits: up to 16 rows of a block are a run. The values of a run become whole numbers of 16 bits, a = 256 high + low,
// so that 16 products of one of these bytes with numbers of 0..15 fit 16 bits; the sums of a run become floats and meet
// the scale. The error is 2^-16 of the highest value of the run. Values that are not finite are multiplied as floats.

#include <algorithm>
#include <cmath>

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
constexpr float kMaxWhole = 32639;  // 127 * 256 + 127

HWY_INLINE void Fetch(const void* p) { __builtin_prefetch(p, 0, 3); }

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
    Rows8 run{};
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
  const uint8_t* next[kRunRows];
  int8_t high[kRunRows], low[kRunRows];  // of the values
  float step;                            // value = step * (256 high + low)
  float sum;                             // of the values
  size_t pairs;
  bool fetch;
};

using D4 = hn::CappedTag<float, 8>;
using DI4 = hn::RebindToSigned<D4>;

// y += scale * (step * (256 high + low) - sum * zero) of one vector of columns.
HWY_INLINE void Flush(hn::Vec<DI4> whole, const Rows4& run, const Block& block, size_t n, float* y) {
  const D4 d;
  using V = hn::Vec<D4>;
  const V zero = block.zeros ? hn::LoadU(d, block.zeros + n) : hn::Set(d, BlockWeight<4>::kNoZero);
  const V products = hn::Mul(hn::Set(d, run.step), hn::ConvertTo(d, whole));
  const V sums = hn::NegMulAdd(hn::Set(d, run.sum), zero, products);
  hn::StoreU(hn::MulAdd(sums, hn::LoadU(d, block.scales + n), hn::LoadU(d, y + n)), d, y + n);
}

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3

constexpr size_t kStep = 64;  // columns, two chunks

HWY_INLINE __m256i Pair(const int8_t* values) {
  return _mm256_set1_epi16(static_cast<int16_t>(static_cast<uint8_t>(values[0]) | values[1] << 8));
}

// The sums of 16 columns: 0..7 in the low lane, 8..15 of the next chunk in the high one.
HWY_INLINE void FlushTwo(__m256i high, __m256i low, const Rows4& run, const Block& block, size_t n, float* y) {
  const __m256i both = _mm256_set1_epi32(1 << 16 | 256);
  const __m256i first = _mm256_madd_epi16(_mm256_unpacklo_epi16(high, low), both);
  const __m256i second = _mm256_madd_epi16(_mm256_unpackhi_epi16(high, low), both);
  const __m256i one = _mm256_permute2x128_si256(first, second, 0x20);
  const __m256i other = _mm256_permute2x128_si256(first, second, 0x31);
  Flush(hn::Vec<DI4>{one}, run, block, n, y);
  Flush(hn::Vec<DI4>{other}, run, block, n + 32, y);
}

HWY_INLINE void AddStep(const Rows4& run, size_t offset, const Block& block, size_t n, float* y) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i high[4], low[4];
  for (int i = 0; i < 4; ++i) high[i] = low[i] = _mm256_setzero_si256();
  const size_t odd = offset / 32 % 2;
  for (size_t p = 0; p < run.pairs; ++p) {
    if (run.fetch) Fetch(run.next[2 * p + odd] + (offset & ~size_t{63}));
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.rows[2 * p] + offset));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run.rows[2 * p + 1] + offset));
    const __m256i a_low = _mm256_and_si256(a, mask), a_high = _mm256_and_si256(_mm256_srli_epi16(a, 4), mask);
    const __m256i b_low = _mm256_and_si256(b, mask), b_high = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
    const __m256i two[] = {_mm256_unpacklo_epi8(a_low, b_low), _mm256_unpackhi_epi8(a_low, b_low),
                           _mm256_unpacklo_epi8(a_high, b_high), _mm256_unpackhi_epi8(a_high, b_high)};
    const __m256i by_high = Pair(run.high + 2 * p), by_low = Pair(run.low + 2 * p);
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm256_add_epi16(high[i], _mm256_maddubs_epi16(two[i], by_high));
      low[i] = _mm256_add_epi16(low[i], _mm256_maddubs_epi16(two[i], by_low));
    }
  }
  for (size_t i = 0; i < 4; ++i) FlushTwo(high[i], low[i], run, block, n + 8 * i, y);
}

#else

constexpr size_t kStep = 32;  // columns, a chunk

HWY_INLINE void AddStep(const Rows4& run, size_t offset, const Block& block, size_t n, float* y) {
  const hn::Full128<uint8_t> d8;
  const hn::Half<decltype(d8)> d8_half;
  const hn::Full128<int16_t> d16;
  const hn::Half<decltype(d16)> d16_half;
  const hn::Full128<int32_t> d32;
  hn::Vec<decltype(d16)> high[4], low[4];
  for (int i = 0; i < 4; ++i) high[i] = low[i] = hn::Zero(d16);
  for (size_t r = 0; r < 2 * run.pairs; ++r) {
    if (run.fetch && offset % kLine == 0) Fetch(run.next[r] + offset);
    const auto bytes = hn::LoadU(d8, run.rows[r] + offset);
    const auto first = hn::And(bytes, hn::Set(d8, 15)), second = hn::ShiftRight<4>(bytes);
    const hn::Vec<decltype(d16)> q[] = {
        hn::PromoteTo(d16, hn::LowerHalf(d8_half, first)), hn::PromoteTo(d16, hn::UpperHalf(d8_half, first)),
        hn::PromoteTo(d16, hn::LowerHalf(d8_half, second)), hn::PromoteTo(d16, hn::UpperHalf(d8_half, second))};
    const auto by_high = hn::Set(d16, run.high[r]), by_low = hn::Set(d16, run.low[r]);
    for (int i = 0; i < 4; ++i) {
      high[i] = hn::Add(high[i], hn::Mul(q[i], by_high));
      low[i] = hn::Add(low[i], hn::Mul(q[i], by_low));
    }
  }
  const auto whole = [&](auto h, auto l) {
    return hn::Add(hn::ShiftLeft<8>(hn::PromoteTo(d32, h)), hn::PromoteTo(d32, l));
  };
  for (size_t i = 0; i < 4; ++i) {
    Flush(whole(hn::LowerHalf(d16_half, high[i]), hn::LowerHalf(d16_half, low[i])), run, block, n + 8 * i, y);
    Flush(whole(hn::UpperHalf(d16_half, high[i]), hn::UpperHalf(d16_half, low[i])), run, block, n + 8 * i + 4, y);
  }
}

#endif

// The same of fewer columns than a step has, on copies that have them all.
void AddRest(const Rows4& run, size_t offset, size_t bytes, const Block& block, size_t n, size_t count, float* y) {
  uint8_t rows[kRunRows][kStep / 2] = {};
  float scales[kStep] = {}, zeros[kStep] = {}, sums[kStep] = {};
  Rows4 copy = run;
  copy.fetch = false;
  for (size_t r = 0; r < 2 * run.pairs; ++r) {
    std::copy(run.rows[r] + offset, run.rows[r] + offset + bytes, rows[r]);
    copy.rows[r] = rows[r];
  }
  std::copy(block.scales + n, block.scales + n + count, scales);
  if (block.zeros) std::copy(block.zeros + n, block.zeros + n + count, zeros);
  std::copy(y + n, y + n + count, sums);
  AddStep(copy, 0, {scales, block.zeros ? zeros : nullptr}, 0, sums);
  std::copy(sums, sums + count, y + n);
}

// The values as whole numbers; false where they are no finite numbers, or too small to have a step.
bool Quantise(const Entry* entries, size_t length, Rows4& run) {
  const D4 d;
  float values[kRunRows] = {};
  int32_t whole[kRunRows];
  float most = 0.0f;
  bool finite = true;
  for (size_t r = 0; r < length; ++r) {
    values[r] = entries[r].value;
    most = std::max(most, std::fabs(values[r]));
    finite = finite && std::isfinite(values[r]);
  }
  const float steps = most == 0.0f ? 0.0f : kMaxWhole / most;
  if (!finite || !std::isfinite(steps)) return false;
  for (size_t r = 0; r < kRunRows; r += hn::Lanes(d)) {
    hn::StoreU(hn::NearestInt(hn::Mul(hn::LoadU(d, values + r), hn::Set(d, steps))), DI4(), whole + r);
  }
  int32_t sum = 0;
  for (size_t r = 0; r < kRunRows; ++r) {
    run.low[r] = static_cast<int8_t>(whole[r]);
    run.high[r] = static_cast<int8_t>((whole[r] - run.low[r]) >> 8);
    sum += whole[r];
  }
  run.step = most / kMaxWhole;
  run.sum = run.step * static_cast<float>(sum);
  return true;
}

void AddRun(const Rows4& run, size_t block, const BlockWeight<4>& w, Span columns, float* y) {
  Buffers buffers;
  for (size_t begin = columns.begin; begin < columns.end; begin += kPiece) {
    const size_t count = std::min(kPiece, columns.end - begin);
    const Block numbers = BlockOf(w, block, begin, count, buffers);
    float* sums = y + (begin - columns.begin);
    size_t n = 0;
    for (; n + kStep <= count; n += kStep) AddStep(run, (begin + n) / 2, numbers, n, sums);
    if (n < count) AddRest(run, (begin + n) / 2, (count - n + 31) / 32 * 16, numbers, n, count - n, sums);
  }
}

void AddRows4(const Entry* entries, size_t count, const Entry* next, size_t next_count, const BlockWeight<4>& w,
              Span columns, float* y) {
  const size_t row_bytes = w.RowBytes();
  const bool fetch = columns.size() / 2 < kLongRow;
  static const auto exactly = PortableKernels().matmul_int4.add_rows;
  while (count != 0) {
    const size_t length = RunLength(w, entries, count, kRunRows);
    const bool last = length == count;
    const Entry* after = last ? next : entries + length;
    const size_t ahead = last ? next_count : count - length;
    Rows4 run{};
    run.pairs = (length + 1) / 2;
    run.fetch = fetch && ahead != 0;
    for (size_t r = 0; r < 2 * run.pairs; ++r) {
      run.rows[r] = w.data + entries[std::min(r, length - 1)].row * row_bytes;
      if (run.fetch) run.next[r] = w.data + after[std::min(r, ahead - 1)].row * row_bytes;
    }
    if (Quantise(entries, length, run)) {
      AddRun(run, entries[0].row / w.block_rows, w, columns, y);
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
