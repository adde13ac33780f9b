// Products of the kept channels with the rows of a float W, and panels, the same code for every SIMD target.

#include <algorithm>

#include "kernels/portable.h"
#include "kernels/tables.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul.cc"
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
using VF = hn::Vec<DF>;

constexpr size_t kLanes = hn::MaxLanes(DF());

// 8 registers of the 32 of AVX-512 and 12 of 16 elsewhere hold a token's columns of a panel.
constexpr size_t kPanelVectors = kLanes >= 16 ? 8 : 12;
constexpr size_t kPanelColumns = kPanelVectors * kLanes;

HWY_INLINE VF LoadWide(const float* p) { return hn::LoadU(DF(), p); }

HWY_INLINE VF LoadWide(const Half* p) { return WidenHalf(p); }

constexpr size_t kLine = 64;
constexpr size_t kSweepRows = 8;
// Bytes of a row from which on the CPU fetches ahead by itself, and better; with AVX-512 it never did better.
constexpr size_t kLongRow = kLanes >= 16 ? size_t{1} << 30 : 4096;

// Into the L2 cache: the L1 cache is full of what is being multiplied.
HWY_INLINE void Fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// One sweep over the columns that adds R rows at once: y is loaded and stored once for all of them, and R rows
// side by side keep the memory busier than one after the other. The rows of `next` are fetched for the next sweep.
template <int R, bool kFetch, class T>
void Sweep(const Entry* entries, const Entry* next, size_t next_count, const T* w, size_t stride, size_t columns,
           float* y) {
  const DF d;
  constexpr size_t kUnroll = kLanes < 8 ? 4 : 2;
  const T* rows[R];
  const T* next_rows[kSweepRows];
  VF values[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = w + entries[r].row * stride;
    values[r] = hn::Set(d, entries[r].value);
  }
  if constexpr (kFetch) {
    for (size_t r = 0; r < kSweepRows; ++r) next_rows[r] = w + next[r < next_count ? r : 0].row * stride;
  }
  size_t n = 0;
  for (; n + kUnroll * kLanes <= columns; n += kUnroll * kLanes) {
    if constexpr (kFetch) {
      for (size_t r = 0; r < kSweepRows; ++r) {
        for (size_t i = 0; i < kUnroll * kLanes; i += kLine / sizeof(T)) Fetch(next_rows[r] + n + i);
      }
    }
    VF sums[kUnroll];
    for (size_t u = 0; u < kUnroll; ++u) sums[u] = hn::LoadU(d, y + n + u * kLanes);
    for (int r = 0; r < R; ++r) {
      for (size_t u = 0; u < kUnroll; ++u) {
        sums[u] = hn::MulAdd(values[r], LoadWide(rows[r] + n + u * kLanes), sums[u]);
      }
    }
    for (size_t u = 0; u < kUnroll; ++u) hn::StoreU(sums[u], d, y + n + u * kLanes);
  }
  for (; n < columns; ++n) {
    for (int r = 0; r < R; ++r) y[n] += entries[r].value * Widen(rows[r][n]);
  }
}

template <int R, class T>
void SweepOnce(const Entry* entries, const Entry* next, size_t next_count, const T* w, size_t stride, size_t columns,
               float* y) {
  if (next_count != 0) return Sweep<R, true>(entries, next, next_count, w, stride, columns, y);
  Sweep<R, false>(entries, next, next_count, w, stride, columns, y);
}

template <class T>
void AddRows(const Entry* entries, size_t count, const Entry* next, size_t next_count, const DenseWeight<T>& weight,
             Span span, float* y) {
  const T* w = weight.data + span.begin;
  const size_t stride = weight.columns, columns = span.size();
  const bool fetch = columns * sizeof(T) < kLongRow;
  if (!fetch) next_count = 0;
  for (; count > kSweepRows; count -= kSweepRows, entries += kSweepRows) {
    SweepOnce<kSweepRows>(entries, entries + kSweepRows, fetch ? count - kSweepRows : 0, w, stride, columns, y);
  }
  switch (count) {
    case 8: return SweepOnce<8>(entries, next, next_count, w, stride, columns, y);
    case 7: return SweepOnce<7>(entries, next, next_count, w, stride, columns, y);
    case 6: return SweepOnce<6>(entries, next, next_count, w, stride, columns, y);
    case 5: return SweepOnce<5>(entries, next, next_count, w, stride, columns, y);
    case 4: return SweepOnce<4>(entries, next, next_count, w, stride, columns, y);
    case 3: return SweepOnce<3>(entries, next, next_count, w, stride, columns, y);
    case 2: return SweepOnce<2>(entries, next, next_count, w, stride, columns, y);
    case 1: return SweepOnce<1>(entries, next, next_count, w, stride, columns, y);
    default: return;
  }
}

// 8 rows side by side, which keeps the memory busier than one after the other.
template <class T>
void CopyPanel(const DenseWeight<T>& weight, Span rows, Span columns, float* panel) {
  const DF d;
  const T* w = weight.data + rows.begin * weight.columns + columns.begin;
  const size_t stride = weight.columns, whole = columns.size() / kLanes * kLanes;
  for (size_t first = 0; first < rows.size(); first += kSweepRows, w += kSweepRows * stride) {
    const size_t some = std::min(kSweepRows, rows.size() - first);
    float* to = panel + first * kPanelColumns;
    for (size_t n = 0; n < whole; n += kLanes) {
      for (size_t r = 0; r < some; ++r) hn::StoreU(LoadWide(w + r * stride + n), d, to + r * kPanelColumns + n);
    }
    for (size_t r = 0; r < some; ++r) {
      for (size_t n = whole; n < kPanelColumns; ++n) {
        to[r * kPanelColumns + n] = n < columns.size() ? Widen(w[r * stride + n]) : 0.0f;
      }
    }
  }
}

// Walks over the lines of what is ahead, some at a time.
class Fetcher {
 public:
  HWY_INLINE explicit Fetcher(const Ahead& ahead)
      : row_(static_cast<const char*>(ahead.data)), rows_(ahead.rows), bytes_(ahead.bytes), stride_(ahead.stride) {}

  HWY_INLINE void Take(size_t lines) {
    for (; lines != 0 && rows_ != 0; --lines) {
      Fetch(row_ + at_);
      at_ += kLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_;
  size_t rows_, bytes_, stride_;
  size_t at_ = 0;
};

void AddPanel(const BlockEntries& block, const float* panel, const Ahead& ahead, float* y) {
  const DF d;
  Fetcher fetcher(ahead);
  const size_t lines = ahead.rows * ((ahead.bytes + kLine - 1) / kLine);
  const size_t lines_per_token = (lines + block.tokens - 1) / block.tokens;
  const Entry* entries = block.entries;
  for (size_t t = 0; t < block.tokens; ++t, entries += block.capacity, y += kPanelColumns) {
    fetcher.Take(lines_per_token);
    VF sums[kPanelVectors];
    for (size_t v = 0; v < kPanelVectors; ++v) sums[v] = hn::LoadU(d, y + v * kLanes);
    for (const Entry* e = entries; e != entries + block.counts[t]; ++e) {
      const float* row = panel + (e->row - block.first_row) * kPanelColumns;
      const VF value = hn::Set(d, e->value);
      for (size_t v = 0; v < kPanelVectors; ++v) {
        sums[v] = hn::MulAdd(value, hn::LoadU(d, row + v * kLanes), sums[v]);
      }
    }
    for (size_t v = 0; v < kPanelVectors; ++v) hn::StoreU(sums[v], d, y + v * kLanes);
  }
}

}  // namespace

PanelKernels PanelTable() { return {kPanelColumns, kLanes, AddPanel}; }

MatMulKernels<DenseWeight<float>> MatMulTableFloat() { return {AddRows<float>, CopyPanel<float>}; }

MatMulKernels<DenseWeight<Half>> MatMulTableHalf() { return {AddRows<Half>, CopyPanel<Half>}; }

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
