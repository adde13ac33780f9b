#include "kernels/portable.h"

#include <algorithm>

namespace nmonnx {
namespace {

constexpr size_t kPanelColumns = 32;

template <class T>
void Select(const T* x, size_t count, int keep, int group, uint64_t* bits) {
  std::fill(bits, bits + BitmapWords(count), 0);
  for (size_t begin = 0; begin < count; begin += group) {
    const size_t end = std::min(count, begin + group);
    for (size_t i = begin; i < end; ++i) {
      int better = 0;
      for (size_t j = begin; j < end; ++j) {
        better += KeyOf(x[j]) > KeyOf(x[i]) || (KeyOf(x[j]) == KeyOf(x[i]) && j < i);
      }
      if (better < keep) SetBit(bits, i);
    }
  }
}

void WidenAll(const Half* x, size_t count, float* y) {
  for (size_t i = 0; i < count; ++i) y[i] = Widen(x[i]);
}

void NarrowAll(const float* x, size_t count, Half* y) {
  for (size_t i = 0; i < count; ++i) y[i] = Narrow(x[i]);
}

template <class W>
void AddRows(const Entry* entries, size_t count, const Entry*, size_t, const W& w, Span columns, float* y) {
  for (size_t e = 0; e < count; ++e) {
    for (size_t n = 0; n < columns.size(); ++n) y[n] += entries[e].value * At(w, entries[e].row, columns.begin + n);
  }
}

template <class W>
void CopyPanel(const W& w, Span rows, Span columns, float* panel) {
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t n = 0; n < kPanelColumns; ++n) {
      panel[r * kPanelColumns + n] = n < columns.size() ? At(w, rows.begin + r, columns.begin + n) : 0.0f;
    }
  }
}

template <class W>
MatMulKernels<W> MatMulTable() {
  return {AddRows<W>, CopyPanel<W>};
}

void AddPanel(const BlockEntries& block, const float* panel, const Ahead&, float* y) {
  for (size_t t = 0; t < block.tokens; ++t, y += kPanelColumns) {
    for (uint32_t e = 0; e < block.counts[t]; ++e) {
      const Entry& entry = block.entries[t * block.capacity + e];
      const float* row = panel + (entry.row - block.first_row) * kPanelColumns;
      for (size_t n = 0; n < kPanelColumns; ++n) y[n] += entry.value * row[n];
    }
  }
}

float Median(const float* x, size_t count, int32_t* keys) {
  for (size_t k = 0; k < count; ++k) {
    if (x[k] != x[k]) return BitsToFloat(0x7fc00000u);
    keys[k] = OrderedKey(x[k]);
  }
  std::nth_element(keys, keys + (count - 1) / 2, keys + count);
  return OfOrderedKey(keys[(count - 1) / 2]) + 0.0f;
}

}  // namespace

Kernels PortableKernels() {
  return {"scalar",
          {Select<float>, Select<Half>, Select<int32_t>, PortableApply<float>, PortableApply<Half>, WidenAll,
           NarrowAll},
          {kPanelColumns, 1, AddPanel},
          MatMulTable<DenseWeight<float>>(),
          MatMulTable<DenseWeight<Half>>(),
          MatMulTable<BlockWeight<8>>(),
          MatMulTable<BlockWeight<4>>(),
          {PortableSum<float>, PortableSquares<float>, Median}};
}

}  // namespace nmonnx
