// Numbers of W, its scales and its zeros as floats, and panels of them, once for every SIMD target.
#if defined(NMONNX_PANEL_NBITS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NMONNX_PANEL_NBITS_INL_H
#undef NMONNX_PANEL_NBITS_INL_H
#else
#define NMONNX_PANEL_NBITS_INL_H
#endif

#include <algorithm>

#include <hwy/highway.h>

#include "kernels/portable.h"
#include "kernels/tables.h"
#include "kernels/widen-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;

constexpr size_t kLanes = hn::MaxLanes(DF());
constexpr size_t kSideBySide = 8;
constexpr size_t kPiece = 256;  // columns whose scales or zeros are widened at once

HWY_INLINE VF WidenI8(const int8_t* p) {
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(hn::Rebind<int8_t, DF>(), p)));
}
HWY_INLINE VF WidenU8(const uint8_t* p) {
  return hn::ConvertTo(DF(), hn::PromoteTo(DI(), hn::LoadU(hn::Rebind<uint8_t, DF>(), p)));
}

// `count` numbers from `index` on as floats: where they lie, or in `buffer`.
inline const float* AsFloats(const void* data, Number type, size_t index, size_t count, float* buffer) {
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

HWY_INLINE VF Numbers(const BlockWeight<8>& w, size_t row, size_t column) {
  return WidenI8(reinterpret_cast<const int8_t*>(w.data) + row * w.columns + column);
}

HWY_INLINE VF Numbers(const BlockWeight<4>& w, size_t row, size_t column) {
  const DI d;
  const uint8_t* p = w.data + row * w.RowBytes() + column / 32 * 16 + column % 16;
  const auto two = hn::PromoteTo(d, hn::LoadU(hn::Rebind<uint8_t, DF>(), p));
  return hn::ConvertTo(DF(), column % 32 < 16 ? hn::And(two, hn::Set(d, 15)) : hn::ShiftRight<4>(two));
}

// 8 rows side by side, which keeps the memory busier than one after the other; they are of one block.
template <int kBits>
void CopyPanel(const BlockWeight<kBits>& w, Span rows, Span columns, float* panel) {
  const DF d;
  const size_t width = PanelTable().columns, count = columns.size(), whole = count / kLanes * kLanes;
  float scale_buffer[kPiece], zero_buffer[kPiece];
  for (size_t first = rows.begin; first < rows.end; first += kSideBySide, panel += kSideBySide * width) {
    const size_t some = std::min(kSideBySide, rows.end - first);
    const size_t index = first / w.block_rows * w.columns + columns.begin;
    const float* scales = AsFloats(w.scales, w.scale_type, index, count, scale_buffer);
    const float* zeros =
        w.zero_type == Number::kNone ? nullptr : AsFloats(w.zeros, w.zero_type, index, count, zero_buffer);
    for (size_t n = 0; n < whole; n += kLanes) {
      const VF scale = hn::LoadU(d, scales + n), zero = zeros ? hn::LoadU(d, zeros + n) : hn::Set(d, w.kNoZero);
      for (size_t r = 0; r < some; ++r) {
        const VF q = hn::Sub(Numbers(w, first + r, columns.begin + n), zero);
        hn::StoreU(hn::Mul(q, scale), d, panel + r * width + n);
      }
    }
    for (size_t r = 0; r < some; ++r) {
      for (size_t n = whole; n < width; ++n) {
        panel[r * width + n] = n < count ? At(w, first + r, columns.begin + n) : 0.0f;
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
