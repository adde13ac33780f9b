// Every kernel, as one table per SIMD target, and the choice of the target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nmonnx {

constexpr int kMaxGroup = 64;

// float16 values travel as their bits.
using Half = uint16_t;

// One kept channel of a token: the row of W it meets, and its value.
struct Entry {
  uint32_t row;
  float value;
};

// Words that a bitmap of `count` channels takes: bit i is channel i, and loads of whole vectors of bits may
// touch the 8 bytes behind it.
constexpr size_t BitmapWords(size_t count) { return (count + 63) / 64 + 1; }

// Sets the bits of the channels that are kept: of every `group` consecutive keys the `keep` highest, ties to
// the lowest index; of a shorter last group min(keep, its size).
template <class T>
using SelectFn = void (*)(const T* x, size_t count, int keep, int group, uint64_t* bits);

// y[i] = bit i ? x[i] : +0. y may be x.
template <class T>
using ApplyFn = void (*)(const T* x, const uint64_t* bits, size_t count, T* y);

struct PruneKernels {
  SelectFn<float> select_f32;     // key: |x|, NaN above Inf
  SelectFn<Half> select_f16;      // key: |x|, NaN above Inf
  SelectFn<int32_t> select_keys;  // key: x
  ApplyFn<float> apply_f32;
  ApplyFn<Half> apply_f16;
  void (*widen)(const Half* x, size_t count, float* y);
  void (*narrow)(const float* x, size_t count, Half* y);
};

// Rows of W that will be needed soon: `rows` rows of `bytes` bytes, `stride` bytes apart.
struct Ahead {
  const void* data;
  size_t rows;
  size_t bytes;
  size_t stride;
};

// The kept channels of every token in one block of rows: token t's are the first counts[t] from
// `entries` + t * capacity.
struct BlockEntries {
  const Entry* entries;
  const uint32_t* counts;
  size_t capacity;
  size_t tokens;
  size_t first_row;
};

// From `begin` up to `end`.
struct Span {
  size_t begin, end;

  size_t size() const { return end - begin; }
};

// W [K, columns] as ONNX stores it, row by row.
template <class T>
struct DenseWeight {
  const T* data;
  size_t columns;

  size_t RowBytes() const { return columns * sizeof(T); }
};

enum class Number { kNone, kInt8, kUint8, kHalf, kFloat };

// W [K, columns] = (q - zero) * scale, where every `block_rows` rows share a row of scales and of zeros.
//   8 bits: q is a row of int8.
//   4 bits: the columns are cut into chunks of 32; byte j of a chunk holds column j in its low half and column 16 + j
//           in its high half. The last chunk is filled up.
template <int kBits>
struct BlockWeight {
  const uint8_t* data;
  size_t columns;
  size_t block_rows;
  const void* scales;  // [blocks, columns] of `scale_type`
  Number scale_type;
  const void* zeros;  // the same of `zero_type`; without zeros q stands for q - kNoZero
  Number zero_type;
  bool values_8_bits;  // whether values of x may be rounded to 8 bits, otherwise to 16

  static constexpr float kNoZero = kBits == 4 ? 8.0f : 0.0f;
  size_t RowBytes() const { return kBits == 4 ? (columns + 31) / 32 * 16 : columns; }
};

// Rows of W that several tokens multiply with at once.
constexpr size_t kUnitRows = 32;

// Whole numbers stand for the values of a token in a unit of rows, step * whole; they add up to `sum`. Values that have no
// such numbers (not finite, or too small to have a step) are not exact and stand as 0.
struct WholeScale {
  float step;
  int32_t sum;
  bool exact;
};

// Those of every token in a unit of rows: 256 high + low, or high where `low` is nullptr.
struct WholeUnit {
  const int8_t *high, *low;   // [tokens][kUnitRows], 0 where the token does not keep the channel
  const WholeScale* scales;  // [tokens]
  size_t tokens;
};

// Kernels that multiply with a W, in the columns [columns.begin, columns.end); begin is a multiple of 64 for
// add_rows and of 16 for copy_panel.
template <class W>
struct MatMulKernels {
  // y[n - columns.begin] += sum of entry.value * W[entry.row][n]. The rows of the `next` entries are fetched towards the
  // cache meanwhile where that helps. The entries are in the order of their rows.
  void (*add_rows)(const Entry* entries, size_t count, const Entry* next, size_t next_count, const W& w, Span columns,
                   float* y);
  // Copies the rows `rows` of W to `panel`, as floats in rows of PanelKernels::columns, filled up with zeros.
  void (*copy_panel)(const W& w, Span rows, Span columns, float* panel);
  // Where the CPU has dot products of bytes, else nullptr. The first rounds kUnitRows values, to 8 bits where `low` is
  // nullptr. The second, of rows of one block: y[t * stride + n - columns.begin] += the product of token t with them; the
  // next rows of all `channels` are fetched meanwhile.
  WholeScale (*round_unit)(const float* values, int8_t* high, int8_t* low) = nullptr;
  void (*add_dots)(const WholeUnit& x, Span rows, size_t channels, const W& w, Span columns, float* y,
                   size_t stride) = nullptr;
};

struct PanelKernels {
  size_t columns;
  size_t lanes;  // floats in a vector
  // For each token t: y[t][0..columns) += sum of value * panel[row - first_row] over its entries. What is `ahead` is
  // fetched towards the cache meanwhile.
  void (*add)(const BlockEntries& block, const float* panel, const Ahead& ahead, float* y);
};

// Sums over the channels of a token.
struct MomentKernels {
  double (*sum)(const float* x, size_t count);
  // The sum of (x[k] - mean)^2.
  double (*squares)(const float* x, size_t count, double mean);
  // The lower median, never -0; NaN where x has one. `keys` is scratch of `count`, which is at least 1.
  float (*median)(const float* x, size_t count, int32_t* keys);
};

struct Kernels {
  const char* target;
  PruneKernels prune;
  PanelKernels panel;
  MatMulKernels<DenseWeight<float>> matmul_f32;
  MatMulKernels<DenseWeight<Half>> matmul_f16;
  MatMulKernels<BlockWeight<8>> matmul_int8;
  MatMulKernels<BlockWeight<4>> matmul_int4;
  MomentKernels moments;
};

inline const auto& MatMulOf(const Kernels& kernels, const DenseWeight<float>&) { return kernels.matmul_f32; }
inline const auto& MatMulOf(const Kernels& kernels, const DenseWeight<Half>&) { return kernels.matmul_f16; }
inline const auto& MatMulOf(const Kernels& kernels, const BlockWeight<8>&) { return kernels.matmul_int8; }
inline const auto& MatMulOf(const Kernels& kernels, const BlockWeight<4>&) { return kernels.matmul_int4; }

// The tables this CPU can run, slowest first; the first is "scalar", the portable code that defines the meaning.
const std::vector<Kernels>& AvailableKernels();

// The table named by `target`, or the fastest one for an empty name; nullptr when there is no such table here.
const Kernels* FindKernels(const std::string& target);

}  // namespace nmonnx
