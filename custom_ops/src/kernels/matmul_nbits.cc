// Products of the kept channels with the rows of a W of 8 or 4 bits, for every SIMD target.
//
// Up to 16 rows of a block are a run. The values of a run become whole numbers of 16 bits, or of 8, and their products
// with the numbers of W are added up as whole numbers; the sums of a run become floats and meet the scale. The error of a
// value is 2^-16 or 2^-8 of the highest one of its run. Values that are not finite are multiplied as floats.
//   8 bits: sums of 32 bits.
//   4 bits: whole = 256 high + low; 16 products of one of these bytes with numbers of 0..15 fit 16 bits.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/portable.h"
#include "kernels/tables.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul_nbits.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
#include "kernels/panel_nbits-inl.h"
#include "kernels/run-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {
namespace {

constexpr size_t kLongRow = 4096;  // bytes from which on the CPU fetches ahead by itself, of 8 rows side by side
constexpr size_t kLine = 64;
constexpr float kMaxWhole16 = 32639;  // 127 * 256 + 127
constexpr float kMaxWhole8 = 127;

HWY_INLINE void Fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The same of fewer columns than a step has, on copies that have them all.
template <class F, bool kZeros, class S>
void AddRest(const Run& run, size_t offset, size_t bytes, const Scales<S>& block, size_t n, size_t count, float* y) {
  constexpr size_t kColumns = F::kColumns;
  uint8_t rows[kRunRows][kColumns * F::kBits / 8] = {};
  S scales[kColumns] = {};
  float zeros[kColumns] = {}, sums[kColumns] = {};
  Run copy = run;
  for (size_t r = 0; r < run.count; ++r) {
    std::copy(run.rows[r] + offset, run.rows[r] + offset + bytes, rows[r]);
    copy.rows[r] = rows[r];
  }
  std::copy(block.scales + n, block.scales + n + count, scales);
  if (kZeros) std::copy(block.zeros + n, block.zeros + n + count, zeros);
  std::copy(y + n, y + n + count, sums);
  AddStep<F, kZeros, S>(copy, 0, {scales, zeros}, 0, sums);
  std::copy(sums, sums + count, y + n);
}

// Values as whole numbers: their step, and what the high and the low bytes add up to.
struct Rounded {
  float step;
  int32_t high_sum, low_sum;
  bool exact;  // false where they are no finite numbers, or too small to have a step; then nothing is stored

  int32_t Sum(bool to_8_bits) const { return to_8_bits ? high_sum : 256 * high_sum + low_sum; }
};

template <size_t kCount>
Rounded Round(const float* values, bool to_8_bits, int16_t* whole_numbers, int8_t* highs, int8_t* lows) {
  const float max_whole = to_8_bits ? kMaxWhole8 : kMaxWhole16;
  const D4 d;
  const DI4 di;
  V4 largest = hn::Zero(d);
  for (size_t r = 0; r < kCount; r += hn::Lanes(d)) {
    const auto bits = hn::BitCast(di, hn::Abs(hn::LoadU(d, values + r)));
    // as whole numbers they are in the order of the values, NaN last
    largest = hn::BitCast(d, hn::Max(hn::BitCast(di, largest), bits));
  }
  const float most = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, hn::BitCast(di, largest))));
  const float steps = most == 0.0f ? 0.0f : max_whole / most;
  if (!std::isfinite(most) || !std::isfinite(steps)) return {0.0f, 0, 0, false};
  const hn::Rebind<int16_t, D4> d16;
  const hn::Rebind<int8_t, D4> d8;
  auto high_sum = hn::Zero(di), low_sum = hn::Zero(di);
  for (size_t r = 0; r < kCount; r += hn::Lanes(d)) {
    const auto whole = hn::NearestInt(hn::Mul(hn::LoadU(d, values + r), hn::Set(d, steps)));
    const auto low = to_8_bits ? hn::Zero(di) : hn::ShiftRight<24>(hn::ShiftLeft<24>(whole));
    const auto high = to_8_bits ? whole : hn::ShiftRight<8>(hn::Sub(whole, low));
    if (whole_numbers) hn::StoreU(hn::DemoteTo(d16, whole), d16, whole_numbers + r);
    hn::StoreU(hn::DemoteTo(d8, high), d8, highs + r);
    if (lows) hn::StoreU(hn::DemoteTo(d8, low), d8, lows + r);
    high_sum = hn::Add(high_sum, high);
    low_sum = hn::Add(low_sum, low);
  }
  return {most / max_whole, hn::GetLane(hn::SumOfLanes(di, high_sum)), hn::GetLane(hn::SumOfLanes(di, low_sum)), true};
}

// The values of a run; false where they are not exact.
bool Quantise(const Entry* entries, size_t length, bool to_8_bits, Run& run) {
  float values[kRunRows] = {};
  for (size_t r = 0; r < length; ++r) values[r] = entries[r].value;
  const Rounded rounded = Round<kRunRows>(values, to_8_bits, run.whole, run.high, run.low);
  if (!rounded.exact) return false;
  run.whole_sum = rounded.Sum(to_8_bits);
  run.start_high = static_cast<int16_t>(-8 * rounded.high_sum);
  run.start_low = static_cast<int16_t>(-8 * rounded.low_sum);
  run.step = rounded.step;
  run.sum = run.step * static_cast<float>(run.whole_sum);
  return true;
}

// Fetches the rows of some entries one after the other: that is the order in which memory is fastest.
class Fetcher {
 public:
  Fetcher(const Entry* entries, size_t count, const uint8_t* data, size_t row_bytes, size_t bytes)
      : entry_(entries), end_(entries + count), data_(data), row_bytes_(row_bytes), bytes_(bytes) {
    if (entry_ != end_) StartRow();
  }

  HWY_INLINE void Take(size_t bytes) {
    if (entry_ == end_) return;
    const uint8_t* stop = at_ + bytes;
    while (stop >= row_end_) {
      const size_t rest = static_cast<size_t>(stop - row_end_);
      for (; at_ < row_end_; at_ += kLine) Fetch(at_);
      if (++entry_ == end_) return;
      StartRow();
      stop = at_ + rest;
    }
    for (; at_ < stop; at_ += kLine) Fetch(at_);
  }

 private:
  HWY_INLINE void StartRow() {
    at_ = data_ + entry_->row * row_bytes_;
    row_end_ = at_ + bytes_;
  }

  const Entry *entry_, *const end_;
  const uint8_t* const data_;
  const size_t row_bytes_, bytes_;
  const uint8_t *at_ = nullptr, *row_end_ = nullptr;
};

template <class F, bool kZeros, class S>
void AddRun(const Run& run, Fetcher ahead, size_t block, const BlockWeight<F::kBits>& w, Span columns, float* y) {
  constexpr size_t kPerByte = 8 / F::kBits;
  float buffer[kPiece];
  const S* scales = static_cast<const S*>(w.scales) + block * w.columns;
  for (size_t begin = columns.begin; begin < columns.end; begin += kPiece) {
    const size_t count = std::min(kPiece, columns.end - begin);
    const float* zeros = kZeros ? AsFloats(w.zeros, w.zero_type, block * w.columns + begin, count, buffer) : nullptr;
    const Scales<S> piece{scales + begin, zeros};
    float* sums = y + (begin - columns.begin);
    size_t n = 0;
    for (; n + F::kColumns <= count; n += F::kColumns) {
      ahead.Take(run.count * F::kColumns / kPerByte);
      AddStep<F, kZeros>(run, (begin + n) / kPerByte, piece, n, sums);
    }
    using Narrow = Form<F::kBits, F::kLow, false>;  // a step of fewer columns, or the same
    for (; n + Narrow::kColumns <= count; n += Narrow::kColumns) {
      AddStep<Narrow, kZeros>(run, (begin + n) / kPerByte, piece, n, sums);
    }
    const size_t bytes = F::kBits == 4 ? (count - n + 31) / 32 * 16 : count - n;
    if (n < count) AddRest<F, kZeros>(run, (begin + n) / kPerByte, bytes, piece, n, count - n, sums);
  }
}

template <class F>
auto RunOf(const BlockWeight<F::kBits>& w) {
  const bool zeros = w.zero_type != Number::kNone;
  if (w.scale_type == Number::kFloat) return zeros ? AddRun<F, true, float> : AddRun<F, false, float>;
  return zeros ? AddRun<F, true, Half> : AddRun<F, false, Half>;
}

template <int kBits, bool kVnni>
auto AnyRunOf(const BlockWeight<kBits>& w, bool to_8_bits) {
  return to_8_bits ? RunOf<Form<kBits, false, kVnni>>(w) : RunOf<Form<kBits, true, kVnni>>(w);
}

// The first entries that are a run: at most `most`, of one block.
size_t RunLength(size_t block_rows, const Entry* entries, size_t count, size_t most) {
  const size_t end = (entries[0].row / block_rows + 1) * block_rows;
  size_t length = 1;
  while (length < std::min(count, most) && entries[length].row < end) ++length;
  return length;
}

template <int kBits, bool kVnni>
void AddRows(const Entry* entries, size_t count, const Entry* next, size_t next_count, const BlockWeight<kBits>& w,
             Span columns, float* y) {
  const size_t row_bytes = w.RowBytes(), bytes = columns.size() * kBits / 8;
  const bool fetch = kVnni || bytes < kLongRow;
  const bool to_8_bits = w.values_8_bits && (kBits == 4 || kVnni);  // otherwise it gains nothing
  const size_t most = fetch ? kRunRows : kRunRows / 2;
  const uint8_t* const data = w.data + columns.begin * kBits / 8;
  const auto add_run = AnyRunOf<kBits, kVnni>(w, to_8_bits);
  constexpr size_t kTogether = Form<kBits, true, kVnni>::kTogether;
  while (count != 0) {
    const size_t length = RunLength(w.block_rows, entries, count, most);
    const bool last = length == count;
    const size_t ahead = fetch ? std::min(most, last ? next_count : count - length) : 0;
    const Fetcher fetcher(last ? next : entries + length, ahead, data, row_bytes, bytes);
    Run run;
    run.count = (length + kTogether - 1) / kTogether * kTogether;
    for (size_t r = 0; r < run.count; ++r) run.rows[r] = w.data + entries[std::min(r, length - 1)].row * row_bytes;
    if (Quantise(entries, length, to_8_bits, run)) {
      add_run(run, fetcher, entries[0].row / w.block_rows, w, columns, y);
    } else {
      MatMulOf(AvailableKernels().front(), w).add_rows(entries, length, nullptr, 0, w, columns, y);
    }
    entries += length;
    count -= length;
  }
}

#if HWY_TARGET == HWY_AVX3

WholeScale RoundUnit(const float* values, int8_t* high, int8_t* low) {
  const Rounded rounded = Round<kUnitRows>(values, !low, nullptr, high, low);
  return {rounded.step, rounded.Sum(!low), rounded.exact};
}

// One step of columns of a unit of rows for every token; `rows` point at its bytes.
template <class F, bool kZeros>
HWY_INLINE void AddUnitStep(const WholeUnit& x, const uint8_t* const* rows, size_t offset, size_t sets,
                            const Scales<float>& block, float* y, size_t stride) {
  Interleaved<F> taken;
  taken.Take(rows, offset, sets);
  for (size_t t = 0; t < x.tokens; ++t) {
    const int8_t* const low = F::kLow ? x.low + t * kUnitRows : nullptr;
    AddToken<F, kZeros>(taken, x.high + t * kUnitRows, low, x.scales[t], sets, block, y + t * stride);
  }
}

// The same of fewer columns than a step has, on copies that have them all.
template <class F, bool kZeros>
void AddUnitRest(const WholeUnit& x, const uint8_t* const* rows, size_t offset, size_t bytes, size_t sets,
                 const Scales<float>& block, size_t count, float* y, size_t stride) {
  constexpr size_t kStep = F::kColumns;
  uint8_t ends[kUnitRows][kStep * F::kBits / 8] = {};
  const uint8_t* copies[kUnitRows];
  float scales[kStep] = {}, zeros[kStep] = {};
  for (size_t r = 0; r < 4 * sets; ++r) {
    std::copy(rows[r] + offset, rows[r] + offset + bytes, ends[r]);
    copies[r] = ends[r];
  }
  std::copy(block.scales, block.scales + count, scales);
  if (kZeros) std::copy(block.zeros, block.zeros + count, zeros);
  std::vector<float> sums(x.tokens * kStep);
  for (size_t t = 0; t < x.tokens; ++t) std::copy(y + t * stride, y + t * stride + count, sums.data() + t * kStep);
  AddUnitStep<F, kZeros>(x, copies, 0, sets, {scales, zeros}, sums.data(), kStep);
  for (size_t t = 0; t < x.tokens; ++t) std::copy_n(sums.data() + t * kStep, count, y + t * stride);
}

template <class F, bool kZeros>
void AddUnit(const WholeUnit& x, Span rows, size_t channels, const BlockWeight<F::kBits>& w, Span columns, float* y,
             size_t stride) {
  constexpr size_t kStep = F::kColumns;
  const size_t block = rows.begin / w.block_rows * w.columns, sets = (rows.size() + 3) / 4, row_bytes = w.RowBytes();
  const uint8_t* pointers[kUnitRows];
  for (size_t r = 0; r < 4 * sets; ++r) pointers[r] = w.data + std::min(rows.begin + r, rows.end - 1) * row_bytes;
  const size_t ahead = rows.end < channels ? std::min(rows.size(), channels - rows.end) : 0;
  const size_t to_next = rows.size() * row_bytes;
  float scales[kStep], zeros[kStep];
  for (size_t begin = columns.begin; begin < columns.end; begin += kStep, y += kStep) {
    const size_t count = std::min(kStep, columns.end - begin), offset = begin * F::kBits / 8;
    for (size_t r = 0; r < ahead; ++r) Fetch(pointers[r] + to_next + offset);
    const float* scale = AsFloats(w.scales, w.scale_type, block + begin, count, scales);
    const float* zero = kZeros ? AsFloats(w.zeros, w.zero_type, block + begin, count, zeros) : nullptr;
    if (count == kStep) {
      AddUnitStep<F, kZeros>(x, pointers, offset, sets, {scale, zero}, y, stride);
    } else {
      AddUnitRest<F, kZeros>(x, pointers, offset, row_bytes - offset, sets, {scale, zero}, count, y, stride);
    }
  }
}

template <int kBits>
void AddDotsOf(const WholeUnit& x, Span rows, size_t channels, const BlockWeight<kBits>& w, Span columns, float* y,
               size_t stride) {
  using High = Form<kBits, false, true>;
  using Both = Form<kBits, true, true>;
  const bool zeros = w.zero_type != Number::kNone;
  if (x.low) return (zeros ? AddUnit<Both, true> : AddUnit<Both, false>)(x, rows, channels, w, columns, y, stride);
  (zeros ? AddUnit<High, true> : AddUnit<High, false>)(x, rows, channels, w, columns, y, stride);
}

#endif

}  // namespace

MatMulKernels<BlockWeight<8>> MatMulTableInt8() { return {AddRows<8, false>, CopyPanel<8>}; }

MatMulKernels<BlockWeight<4>> MatMulTableInt4() { return {AddRows<4, false>, CopyPanel<4>}; }

#if HWY_TARGET == HWY_AVX3
MatMulKernels<BlockWeight<8>> MatMulTableVnniInt8() { return {AddRows<8, true>, CopyPanel<8>, RoundUnit, AddDotsOf<8>}; }

MatMulKernels<BlockWeight<4>> MatMulTableVnniInt4() { return {AddRows<4, true>, CopyPanel<4>, RoundUnit, AddDotsOf<4>}; }
#endif

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
