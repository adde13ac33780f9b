// Products of the kept channels with the rows of W, the same code for every SIMD target.

#include "kernels/portable.h"
#include "kernels/tables.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/matmul.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

constexpr size_t kLanes = hn::MaxLanes(DF());
constexpr bool kHasHalf = HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON;

// 8 registers of the 32 of AVX-512 and 12 of 16 elsewhere hold a token's columns of a panel.
constexpr size_t kPanelVectors = kLanes >= 16 ? 8 : 12;
constexpr size_t kPanelColumns = kPanelVectors * kLanes;

HWY_INLINE VF LoadWide(const float* p) { return hn::LoadU(DF(), p); }

HWY_INLINE VF LoadWide(const Half* p) {
  const DF d;
  if constexpr (kHasHalf) {
    const hn::Rebind<hwy::float16_t, DF> dh;
    return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
  } else {
    const hn::RebindToSigned<DF> di;
    const hn::Rebind<uint16_t, DF> dh;
    const auto half = hn::PromoteTo(di, hn::LoadU(dh, p));
    const auto magnitude = hn::And(half, hn::Set(di, 0x7fff));
    const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(di, 0x8000)));
    const auto scaled = hn::Mul(hn::BitCast(d, hn::ShiftLeft<13>(magnitude)), hn::Set(d, 0x1p112f));
    const auto special = hn::Gt(magnitude, hn::Set(di, 0x7bff));
    const auto exponent = hn::IfThenElseZero(special, hn::Set(di, 0x7f800000));
    return hn::BitCast(d, hn::Or(hn::Or(hn::BitCast(di, scaled), exponent), sign));
  }
}

// One sweep over the columns that adds R rows at once: y is loaded and stored once for all of them, and R rows
// side by side keep the memory busier than one after the other.
template <int R, class T>
void Sweep(const Entry* entries, const T* w, size_t stride, size_t columns, float* y) {
  const DF d;
  const T* rows[R];
  VF values[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = w + entries[r].row * stride;
    values[r] = hn::Set(d, entries[r].value);
  }
  size_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
    VF sum0 = hn::LoadU(d, y + n);
    VF sum1 = hn::LoadU(d, y + n + kLanes);
    for (int r = 0; r < R; ++r) {
      sum0 = hn::MulAdd(values[r], LoadWide(rows[r] + n), sum0);
      sum1 = hn::MulAdd(values[r], LoadWide(rows[r] + n + kLanes), sum1);
    }
    hn::StoreU(sum0, d, y + n);
    hn::StoreU(sum1, d, y + n + kLanes);
  }
  for (; n < columns; ++n) {
    for (int r = 0; r < R; ++r) y[n] += entries[r].value * Widen(rows[r][n]);
  }
}

template <class T>
void AddRows(const Entry* entries, size_t count, const T* w, size_t stride, size_t columns, float* y) {
  for (; count >= 8; count -= 8, entries += 8) Sweep<8>(entries, w, stride, columns, y);
  switch (count) {
    case 7: return Sweep<7>(entries, w, stride, columns, y);
    case 6: return Sweep<6>(entries, w, stride, columns, y);
    case 5: return Sweep<5>(entries, w, stride, columns, y);
    case 4: return Sweep<4>(entries, w, stride, columns, y);
    case 3: return Sweep<3>(entries, w, stride, columns, y);
    case 2: return Sweep<2>(entries, w, stride, columns, y);
    case 1: return Sweep<1>(entries, w, stride, columns, y);
    default: return;
  }
}

template <class T>
void CopyPanel(const T* w, size_t stride, size_t rows, size_t columns, float* panel) {
  const DF d;
  for (size_t r = 0; r < rows; ++r, w += stride, panel += kPanelColumns) {
    size_t n = 0;
    for (; n + kLanes <= columns; n += kLanes) hn::StoreU(LoadWide(w + n), d, panel + n);
    for (; n < columns; ++n) panel[n] = Widen(w[n]);
    for (; n < kPanelColumns; ++n) panel[n] = 0.0f;
  }
}

void AddPanel(const Entry* entries, size_t entries_stride, const uint32_t* starts, size_t starts_stride,
              size_t tokens, size_t first_row, const float* panel, float* y) {
  const DF d;
  for (size_t t = 0; t < tokens; ++t, starts += starts_stride, entries += entries_stride, y += kPanelColumns) {
    VF sums[kPanelVectors];
    for (size_t v = 0; v < kPanelVectors; ++v) sums[v] = hn::LoadU(d, y + v * kLanes);
    for (uint32_t e = starts[0]; e < starts[1]; ++e) {
      const float* row = panel + (entries[e].row - first_row) * kPanelColumns;
      const VF value = hn::Set(d, entries[e].value);
      for (size_t v = 0; v < kPanelVectors; ++v) {
        sums[v] = hn::MulAdd(value, hn::LoadU(d, row + v * kLanes), sums[v]);
      }
    }
    for (size_t v = 0; v < kPanelVectors; ++v) hn::StoreU(sums[v], d, y + v * kLanes);
  }
}

}  // namespace

MatMulKernels<float> MatMulTableF32() { return {kPanelColumns, AddRows<float>, CopyPanel<float>, AddPanel}; }

MatMulKernels<Half> MatMulTableF16() { return {kPanelColumns, AddRows<Half>, CopyPanel<Half>, AddPanel}; }

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
