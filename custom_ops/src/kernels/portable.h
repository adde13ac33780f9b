// The meaning of every kernel in plain C++: what the SIMD targets are tested against.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/dispatch.h"

namespace nmonnx {

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Keys are integers that sort like the scores. All NaN are one key, above Inf, so that they tie.
inline int32_t KeyOf(float x) {
  const uint32_t magnitude = FloatToBits(x) & 0x7fffffffu;
  return static_cast<int32_t>(magnitude < 0x7f800001u ? magnitude : 0x7f800001u);
}

inline int32_t KeyOf(Half x) {
  const int32_t magnitude = x & 0x7fff;
  return magnitude < 0x7c01 ? magnitude : 0x7c01;
}

inline int32_t KeyOf(int32_t key) { return key; }

inline float Widen(float x) { return x; }

inline float Widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf, NaN (made quiet, as the hardware does)
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0;
    return BitsToFloat(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | quiet);
  }
  return BitsToFloat(sign | FloatToBits(BitsToFloat(magnitude << 13) * 0x1p112f));
}

// Round to nearest even.
inline Half Narrow(float x) {
  const uint32_t bits = FloatToBits(x);
  const Half sign = static_cast<Half>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<Half>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  if (magnitude >= 0x477ff000u) return static_cast<Half>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the FPU round at 2^-24
    return static_cast<Half>(sign | (FloatToBits(BitsToFloat(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<Half>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline float ReadNumber(const void* data, Number type, size_t index) {
  switch (type) {
    case Number::kInt8: return static_cast<const int8_t*>(data)[index];
    case Number::kUint8: return static_cast<const uint8_t*>(data)[index];
    case Number::kHalf: return Widen(static_cast<const Half*>(data)[index]);
    case Number::kFloat: return static_cast<const float*>(data)[index];
    case Number::kNone: break;
  }
  return 0.0f;
}

template <int kBits>
float ScaleAt(const BlockWeight<kBits>& w, size_t row, size_t column) {
  return ReadNumber(w.scales, w.scale_type, row / w.block_rows * w.columns + column);
}

template <int kBits>
float ZeroAt(const BlockWeight<kBits>& w, size_t row, size_t column) {
  if (w.zero_type == Number::kNone) return w.kNoZero;
  return ReadNumber(w.zeros, w.zero_type, row / w.block_rows * w.columns + column);
}

// W[row, column].
template <class T>
float At(const DenseWeight<T>& w, size_t row, size_t column) {
  return Widen(w.data[row * w.columns + column]);
}

inline float At(const BlockWeight<8>& w, size_t row, size_t column) {
  const float q = static_cast<int8_t>(w.data[row * w.RowBytes() + column]);
  return (q - ZeroAt(w, row, column)) * ScaleAt(w, row, column);
}

inline float At(const BlockWeight<4>& w, size_t row, size_t column) {
  const uint8_t two = w.data[row * w.RowBytes() + column / 32 * 16 + column % 16];
  const float q = static_cast<float>(column % 32 < 16 ? two & 15 : two >> 4);
  return (q - ZeroAt(w, row, column)) * ScaleAt(w, row, column);
}

inline void SetBit(uint64_t* bits, size_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); }
inline bool HasBit(const uint64_t* bits, size_t i) { return bits[i / 64] >> (i % 64) & 1; }

template <class T>
void PortableApply(const T* x, const uint64_t* bits, size_t count, T* y) {
  for (size_t i = 0; i < count; ++i) y[i] = HasBit(bits, i) ? x[i] : T{0};
}

constexpr size_t kPartialSums = 16;

inline double AddParts(double* parts) {
  for (size_t step = kPartialSums / 2; step > 0; step /= 2) {
    for (size_t i = 0; i < step; ++i) parts[i] += parts[i + step];
  }
  return parts[0];
}

template <class T>
double PortableSum(const T* x, size_t count) {
  double parts[kPartialSums] = {};
  for (size_t k = 0; k < count; ++k) parts[k % kPartialSums] += double{x[k]};
  return AddParts(parts);
}

template <class T>
double PortableSquares(const T* x, size_t count, double mean) {
  double parts[kPartialSums] = {};
  for (size_t k = 0; k < count; ++k) parts[k % kPartialSums] += (double{x[k]} - mean) * (double{x[k]} - mean);
  return AddParts(parts);
}

// Integers that sort like the values, NaN outside of those of the infinities.
inline int32_t OrderedKey(float x) {
  const int32_t bits = static_cast<int32_t>(FloatToBits(x));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
inline float OfOrderedKey(int32_t key) { return BitsToFloat(static_cast<uint32_t>(key < 0 ? key ^ 0x7fffffff : key)); }
constexpr int32_t kHighestKey = 0x7f800000;
constexpr int32_t kLowestKey = -0x7f800001;

Kernels PortableKernels();

}  // namespace nmonnx
