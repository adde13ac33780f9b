// float16 as float, once for every SIMD target.
#if defined(NMONNX_WIDEN_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NMONNX_WIDEN_INL_H
#undef NMONNX_WIDEN_INL_H
#else
#define NMONNX_WIDEN_INL_H
#endif

#include <hwy/highway.h>

#include "kernels/dispatch.h"
#include "kernels/targets.h"

HWY_BEFORE_NAMESPACE();
namespace nmonnx {
namespace HWY_NAMESPACE {

// As many values from `p` on as a vector of floats has.
HWY_INLINE hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::ScalableTag<float>> WidenHalf(const Half* p) {
  namespace hn = hwy::HWY_NAMESPACE;
  using DF = hn::ScalableTag<float>;
  constexpr bool kHasHalf = HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == NMONNX_NEON_TARGET;
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

}  // namespace HWY_NAMESPACE
}  // namespace nmonnx
HWY_AFTER_NAMESPACE();
#endif
