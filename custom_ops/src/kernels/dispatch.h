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

// Kernels that multiply with a row-major W of type T whose rows are `stride` values apart.
template <class T>
struct MatMulKernels {
  size_t panel_columns;
  // y[0..columns) += sum of entry.value * W[entry.row][0..columns). The rows of the `next` entries are fetched
  // towards the cache meanwhile.
  void (*add_rows)(const Entry* entries, size_t count, const Entry* next, size_t next_count, const T* w,
                   size_t stride, size_t columns, float* y);
  // Copies `rows` x `columns` of W to `panel`, rows `panel_columns` apart, filled up with zeros.
  void (*copy_panel)(const T* w, size_t stride, size_t rows, size_t columns, float* panel);
  // For each token t: y[t][0..panel_columns) += sum of value * panel[row - first_row] over its entries. What is
  // `ahead` is fetched towards the cache meanwhile.
  void (*add_panel)(const BlockEntries& block, const float* panel, const Ahead& ahead, float* y);
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
  MatMulKernels<float> matmul_f32;
  MatMulKernels<Half> matmul_f16;
  MomentKernels moments;
};

template <class T>
const MatMulKernels<T>& MatMulOf(const Kernels& kernels);
template <>
inline const MatMulKernels<float>& MatMulOf(const Kernels& kernels) { return kernels.matmul_f32; }
template <>
inline const MatMulKernels<Half>& MatMulOf(const Kernels& kernels) { return kernels.matmul_f16; }

// The tables this CPU can run, slowest first; the first is "scalar", the portable code that defines the meaning.
const std::vector<Kernels>& AvailableKernels();

// The table named by `target`, or the fastest one for an empty name; nullptr when there is no such table here.
const Kernels* FindKernels(const std::string& target);

}  // namespace nmonnx
