// Every SIMD target against the portable code, on buffers that end exactly where the data ends: built with
// NMONNX_SANITIZE a read or write beyond them stops the program. Prints "ok <target>" for each target.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "testing.h"

namespace nmonnx {
namespace {

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
bool Same(Exact<T>& a, Exact<T>& b) {
  return a.size() == 0 || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void TestPrune(const Kernels& kernels, const Kernels& meaning, SelectFn<T> PruneKernels::*select,
               ApplyFn<T> PruneKernels::*apply) {
  const int patterns[][2] = {{1, 2}, {2, 4}, {4, 8}, {8, 16}, {4, 16}, {16, 16}, {16, 32}, {32, 64}, {5, 12}, {1, 1},
                             {63, 64}, {3, 33}};
  const size_t sizes[] = {0,  1,  3,  4,   7,   8,   15,  16,  17,  31,   32,   33,
                          63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1024, 2048};
  for (const auto& pattern : patterns) {
    for (const size_t count : sizes) {
      const auto require = [&](bool condition, const char* what) {
        Require(condition, "%s: %s, %zu channels, %d:%d", kernels.target, what, count, pattern[0], pattern[1]);
      };
      Exact<T> x(count, count % 5);
      for (size_t i = 0; i < count; ++i) x[i] = Nasty(T{});
      Exact<uint64_t> bits(BitmapWords(count)), expected(BitmapWords(count));
      (kernels.prune.*select)(x.data(), count, pattern[0], pattern[1], bits.data());
      (meaning.prune.*select)(x.data(), count, pattern[0], pattern[1], expected.data());
      require(std::equal(bits.data(), bits.data() + (count + 63) / 64, expected.data()), "select");
      if (!apply) continue;
      Exact<T> y(count, (count + 1) % 3), z(count);
      (kernels.prune.*apply)(x.data(), bits.data(), count, y.data());
      (meaning.prune.*apply)(x.data(), bits.data(), count, z.data());
      require(Same(y, z), "apply");
      (kernels.prune.*apply)(x.data(), bits.data(), count, x.data());
      require(Same(x, z), "apply in place");
    }
  }
}

void TestHalf(const Kernels& kernels) {
  for (const size_t count : {size_t{65536}, size_t{1}, size_t{7}, size_t{33}}) {
    Exact<Half> x(count, 1), back(count);
    Exact<float> wide(count, 1);
    for (size_t i = 0; i < count; ++i) x[i] = static_cast<Half>(i);
    kernels.prune.widen(x.data(), count, wide.data());
    kernels.prune.narrow(wide.data(), count, back.data());
    for (size_t i = 0; i < count; ++i) {
      Require(FloatToBits(wide[i]) == FloatToBits(Widen(x[i])), "%s: widen %#x", kernels.target, x[i]);
      Require(back[i] == Narrow(wide[i]), "%s: narrow %a", kernels.target, double{wide[i]});
    }
  }
  Exact<float> x(100000);
  Exact<Half> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {  // mostly near the range of float16, where rounding is hard
    x[i] = BitsToFloat((random_bits() & 0x80001fffu) | (0x32000000u + random_bits() % 0x16000000u));
  }
  kernels.prune.narrow(x.data(), x.size(), y.data());
  for (size_t i = 0; i < x.size(); ++i) Require(y[i] == Narrow(x[i]), "%s: narrow %a", kernels.target, double{x[i]});
}

bool SameBits(double a, double b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

// Nasty values, and without Inf and NaN a large mean, where sums in float would not do.
float DrawMoment(int kind) {
  if (kind == 0) return Nasty(0.0f);
  if (kind == 1) return 2.5f;
  const float value = static_cast<float>(random_bits() % 999) / 99 + 4096.0f;
  return kind == 2 ? value : -value * static_cast<float>(random_bits() % 3);
}

void TestMoments(const Kernels& kernels, const Kernels& meaning) {
  for (const size_t count : {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 257, 1000, 2048}) {
    for (int kind = 0; kind < 4; ++kind) {
      const auto require = [&](bool condition, const char* what) {
        Require(condition, "%s: %s, %zu channels of kind %d", kernels.target, what, count, kind);
      };
      Exact<float> x(count, count % 5);
      for (size_t i = 0; i < count; ++i) x[i] = DrawMoment(kind);
      Exact<int32_t> keys(count, 1), scratch(count);
      const double sum = kernels.moments.sum(x.data(), count);
      require(SameBits(sum, meaning.moments.sum(x.data(), count)), "sum");
      const double mean = sum / static_cast<double>(count);
      require(SameBits(kernels.moments.squares(x.data(), count, mean), meaning.moments.squares(x.data(), count, mean)),
              "squares");
      const float median = kernels.moments.median(x.data(), count, keys.data());
      require(SameBits(median, meaning.moments.median(x.data(), count, scratch.data())), "median");
      std::vector<float> sorted(x.data(), x.data() + count);
      if (std::any_of(sorted.begin(), sorted.end(), [](float v) { return std::isnan(v); })) {
        require(std::isnan(median), "median of NaN");
      } else {
        std::sort(sorted.begin(), sorted.end());
        require(median == sorted[(count - 1) / 2], "median by sorting");
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
    TestMatMuls(kernels);
    std::printf("ok %s\n", kernels.target);
  }
}
