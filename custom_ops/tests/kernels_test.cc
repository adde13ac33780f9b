// Every SIMD target against the portable code, on buffers that end exactly where the data ends: built with
// NMONNX_SANITIZE a read or write beyond them stops the program. Prints "ok <target>" for each target.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/portable.h"

namespace nmonnx {
namespace {

std::mt19937 random_bits(1);

// A heap block of exactly `count` values that starts `offset` values into its allocation.
template <class T>
class Exact {
 public:
  Exact(size_t count, size_t offset) : count_(count), block_(new T[offset + count]), data_(block_.get() + offset) {}
  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  size_t count_;
  std::unique_ptr<T[]> block_;
  T* data_;
};

void Require(bool condition, const char* target, const char* what, size_t count, int keep, int group) {
  if (condition) return;
  std::printf("FAILED %s: %s, %zu channels, %d:%d\n", target, what, count, keep, group);
  std::exit(1);
}

// Few different values, so that there are ties; Inf, NaN, zeros of both signs, denormals.
float Nasty(float) {
  static const float kSpecial[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 1e-45f, -1e-40f, 3e38f};
  const uint32_t r = random_bits();
  if (r % 4 == 0) return kSpecial[(r >> 8) % 9];
  return static_cast<float>(static_cast<int32_t>(r >> 8) % 64 - 32) / 8;
}
Half Nasty(Half) { return static_cast<Half>(random_bits() & (random_bits() % 2 ? 0xfc07 : 0xffff)); }
int32_t Nasty(int32_t) { return static_cast<int32_t>(random_bits() % 32) - 8; }

template <class T>
void TestPrune(const Kernels& kernels, const Kernels& meaning, SelectFn<T> PruneKernels::*select,
               ApplyFn<T> PruneKernels::*apply) {
  const int patterns[][2] = {{1, 2}, {2, 4}, {4, 8}, {8, 16}, {4, 16}, {16, 16}, {16, 32}, {32, 64}, {5, 12}, {1, 1},
                             {63, 64}, {3, 33}};
  const size_t sizes[] = {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1024, 2048};
  for (const auto& pattern : patterns) {
    for (const size_t count : sizes) {
      Exact<T> x(count, count % 5);
      for (size_t i = 0; i < count; ++i) x[i] = Nasty(T{});
      Exact<uint64_t> bits(BitmapWords(count), 0), expected(BitmapWords(count), 0);
      (kernels.prune.*select)(x.data(), count, pattern[0], pattern[1], bits.data());
      (meaning.prune.*select)(x.data(), count, pattern[0], pattern[1], expected.data());
      const size_t bytes = (count + 63) / 64 * 8;
      Require(std::memcmp(bits.data(), expected.data(), bytes) == 0, kernels.target, "select", count, pattern[0],
              pattern[1]);
      if (!apply) continue;
      Exact<T> y(count, (count + 1) % 3), z(count, 0);
      (kernels.prune.*apply)(x.data(), bits.data(), count, y.data());
      (meaning.prune.*apply)(x.data(), bits.data(), count, z.data());
      Require(count == 0 || std::memcmp(y.data(), z.data(), count * sizeof(T)) == 0, kernels.target, "apply", count,
              pattern[0], pattern[1]);
      (kernels.prune.*apply)(x.data(), bits.data(), count, x.data());
      Require(count == 0 || std::memcmp(x.data(), z.data(), count * sizeof(T)) == 0, kernels.target,
              "apply in place", count, pattern[0], pattern[1]);
    }
  }
}

void TestHalf(const Kernels& kernels) {
  for (const size_t count : {size_t{65536}, size_t{1}, size_t{7}, size_t{33}}) {
    Exact<Half> x(count, 1), back(count, 0);
    Exact<float> wide(count, 1);
    for (size_t i = 0; i < count; ++i) x[i] = static_cast<Half>(i);
    kernels.prune.widen(x.data(), count, wide.data());
    for (size_t i = 0; i < count; ++i) {
      Require(FloatToBits(wide[i]) == FloatToBits(Widen(x[i])), kernels.target, "widen", i, 0, 0);
    }
    kernels.prune.narrow(wide.data(), count, back.data());
    for (size_t i = 0; i < count; ++i) Require(back[i] == Narrow(wide[i]), kernels.target, "narrow", i, 0, 0);
  }
  Exact<float> x(100000, 0);
  Exact<Half> y(x.size(), 0);
  for (size_t i = 0; i < x.size(); ++i) {  // mostly near the range of float16, where rounding is hard
    x[i] = BitsToFloat((random_bits() & 0x80001fffu) | (0x32000000u + random_bits() % 0x16000000u));
  }
  kernels.prune.narrow(x.data(), x.size(), y.data());
  for (size_t i = 0; i < x.size(); ++i) {
    Require(y[i] == Narrow(x[i]), kernels.target, "narrow, rounding", i, 0, 0);
  }
}

bool SameBits(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

// Nasty values, and without Inf and NaN a large mean, where sums in float would not do.
void TestMoments(const Kernels& kernels, const Kernels& meaning) {
  for (const size_t count : {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 257, 1000, 2048}) {
    for (int kind = 0; kind < 4; ++kind) {
      Exact<float> x(count, count % 5);
      for (size_t i = 0; i < count; ++i) {
        x[i] = kind == 0 ? Nasty(0.0f) : kind == 1 ? 2.5f : static_cast<float>(random_bits() % 999) / 99 + 4096.0f;
        if (kind == 3) x[i] = -x[i] * static_cast<float>(random_bits() % 3);
      }
      Exact<int32_t> keys(count, 1), scratch(count, 0);
      const double sum = kernels.moments.sum(x.data(), count);
      Require(SameBits(sum, meaning.moments.sum(x.data(), count)), kernels.target, "sum", count, kind, 0);
      const double mean = sum / static_cast<double>(count);
      Require(SameBits(kernels.moments.squares(x.data(), count, mean), meaning.moments.squares(x.data(), count, mean)),
              kernels.target, "squares", count, kind, 0);
      const float median = kernels.moments.median(x.data(), count, keys.data());
      Require(SameBits(median, meaning.moments.median(x.data(), count, scratch.data())), kernels.target, "median",
              count, kind, 0);
      std::vector<float> sorted(x.data(), x.data() + count);
      if (std::any_of(sorted.begin(), sorted.end(), [](float v) { return std::isnan(v); })) {
        Require(std::isnan(median), kernels.target, "median of NaN", count, kind, 0);
      } else {
        std::sort(sorted.begin(), sorted.end());
        Require(median == sorted[(count - 1) / 2], kernels.target, "median by sorting", count, kind, 0);
      }
    }
  }
}

float Small(float) { return static_cast<float>(static_cast<int32_t>(random_bits() % 9) - 4); }
Half Small(Half) { return Narrow(Small(0.0f)); }

// Whole numbers, so that the sums are exact in any order.
template <class T>
void TestMatMul(const Kernels& kernels) {
  const MatMulKernels<T>& matmul = MatMulOf<T>(kernels);
  for (const size_t columns : {1, 3, 4, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 200}) {
    for (const size_t count : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 25}) {
      const size_t rows = count + 2;
      Exact<T> w(rows * columns, columns % 3);
      for (size_t i = 0; i < w.size(); ++i) w[i] = Small(T{});
      Exact<Entry> entries(count, 0);
      for (size_t e = 0; e < count; ++e) entries[e] = {static_cast<uint32_t>(e + e % 2), Small(0.0f)};
      std::vector<float> expected(columns, 1.0f);
      for (size_t e = 0; e < count; ++e) {
        for (size_t n = 0; n < columns; ++n) {
          expected[n] += entries[e].value * Widen(w[entries[e].row * columns + n]);
        }
      }
      Exact<float> y(columns, count % 2);
      std::fill(y.data(), y.data() + columns, 1.0f);
      matmul.add_rows(entries.data(), count, entries.data(), count, w.data(), columns, columns, y.data());
      Require(std::equal(expected.begin(), expected.end(), y.data()), kernels.target, "add_rows", columns,
              static_cast<int>(count), 0);

      const size_t width = std::min(columns, matmul.panel_columns);
      Exact<float> panel(rows * matmul.panel_columns, 0), sums(2 * matmul.panel_columns, 0);
      matmul.copy_panel(w.data(), columns, rows, width, panel.data());
      std::fill(sums.data(), sums.data() + sums.size(), 1.0f);
      const uint32_t counts[] = {0, static_cast<uint32_t>(count)};
      Exact<Entry> both(2 * count, 0);
      for (size_t e = 0; e < count; ++e) both[e] = both[count + e] = {entries[e].row + 7, entries[e].value};
      const Ahead ahead{w.data(), rows, columns * sizeof(T), columns * sizeof(T)};
      matmul.add_panel({both.data(), counts, count, 2, 7}, panel.data(), ahead, sums.data());
      const float* second = sums.data() + matmul.panel_columns;
      Require(std::equal(second, second + width, expected.begin()), kernels.target, "add_panel", columns,
              static_cast<int>(count), 0);
      for (size_t n = 0; n < matmul.panel_columns; ++n) {
        Require(sums[n] == 1.0f && (n < width || second[n] == 1.0f), kernels.target, "add_panel beyond", columns,
                static_cast<int>(count), 0);
      }
    }
  }
}

}  // namespace
}  // namespace nmonnx

int main() {
  using namespace nmonnx;
  const Kernels& meaning = AvailableKernels().front();
  for (const Kernels& kernels : AvailableKernels()) {
    TestPrune<float>(kernels, meaning, &PruneKernels::select_f32, &PruneKernels::apply_f32);
    TestPrune<Half>(kernels, meaning, &PruneKernels::select_f16, &PruneKernels::apply_f16);
    TestPrune<int32_t>(kernels, meaning, &PruneKernels::select_keys, nullptr);
    TestHalf(kernels);
    TestMoments(kernels, meaning);
    TestMatMul<float>(kernels);
    TestMatMul<Half>(kernels);
    std::printf("ok %s\n", kernels.target);
  }
}
