// Products of kept channels with W, by rows and by panels, against the meaning of W in portable.h.

#include <algorithm>
#include <cmath>
#include <vector>

#include "testing.h"

namespace nmonnx {
namespace {

constexpr size_t kChannels = 150;
constexpr size_t kColumns[] = {1, 3, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 129, 200};
constexpr size_t kManyColumns = 8224;  // a row of 4 bits of as many is too long for the kernels to fetch ahead
constexpr size_t kCounts[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 25, 60, kChannels};

float Uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }

// Kept channels in the order of their rows, of the same chance each.
Exact<Entry> DrawEntries(size_t count) {
  Exact<Entry> entries(count);
  size_t e = 0;
  for (size_t row = 0; row < kChannels && e < count; ++row) {
    if (random_bits() % (kChannels - row) < count - e) entries[e++] = {static_cast<uint32_t>(row), Uniform(-2, 2)};
  }
  return entries;
}

// y = 1 + entries W in each column, and how far a kernel may be from it.
struct Expected {
  std::vector<double> sums, limits;

  // The kernels round a float32 sum, and each value by `rounding` of the highest one.
  template <class W>
  Expected(const W& w, Exact<Entry>& entries, double rounding) : sums(w.columns, 1.0), limits(w.columns) {
    double highest = 0;
    for (size_t e = 0; e < entries.size(); ++e) highest = std::max(highest, std::fabs(double{entries[e].value}));
    const double sum_rounding = std::ldexp(static_cast<double>(entries.size() + 4), -24);
    for (size_t n = 0; n < w.columns; ++n) {
      double sizes = 0;
      for (size_t e = 0; e < entries.size(); ++e) {
        sums[n] += double{entries[e].value} * double{At(w, entries[e].row, n)};
        sizes += LargestPart(w, entries[e].row, n);
      }
      limits[n] = sizes * highest * (rounding + sum_rounding) + 1e-6;
    }
  }

  bool Holds(size_t column, float sum) const { return std::fabs(double{sum} - sums[column]) <= limits[column]; }

 private:
  template <class T>
  static double LargestPart(const DenseWeight<T>& w, size_t row, size_t column) {
    return std::fabs(double{At(w, row, column)});
  }
  // q and its zero may be added up apart.
  template <int kBits>
  static double LargestPart(const BlockWeight<kBits>& w, size_t row, size_t column) {
    const double zero = std::fabs(double{ZeroAt(w, row, column)}), scale = double{ScaleAt(w, row, column)};
    return std::fabs(double{At(w, row, column)}) + 2 * zero * scale;
  }
};

// All columns, and those from 64 on, and the 64 between, as tasks share them.
template <class W>
void TestRows(const Kernels& kernels, const W& w, Exact<Entry>& entries, const Expected& expected) {
  const size_t all = w.columns;
  for (const Span span : {Span{0, all}, Span{64, all}, Span{64, 128}}) {
    if (span.begin >= all || span.end > all) continue;
    Exact<float> y(span.size(), all % 2);
    std::fill(y.data(), y.data() + y.size(), 1.0f);
    MatMulOf(kernels, w).add_rows(entries.data(), entries.size(), entries.data(), entries.size(), w, span, y.data());
    for (size_t n = 0; n < y.size(); ++n) {
      Require(expected.Holds(span.begin + n, y[n]), "%s: add_rows, %zu rows, column %zu of %zu", kernels.target,
              entries.size(), span.begin + n, all);
    }
  }
}

// Two tokens, the first of which keeps nothing, meet one panel of rows after the other.
template <class W>
void TestPanels(const Kernels& kernels, const W& w, Exact<Entry>& entries, const Expected& expected) {
  constexpr size_t kRows = 32;
  const size_t width = kernels.panel.columns;
  for (size_t begin = 0; begin < w.columns; begin += width) {
    const Span columns{begin, std::min(w.columns, begin + width)};
    Exact<float> sums(2 * width);
    std::fill(sums.data(), sums.data() + sums.size(), 1.0f);
    for (size_t first = 0, e = 0; first < kChannels; first += kRows) {
      const Span rows{first, std::min(kChannels, first + kRows)};
      Exact<float> panel(rows.size() * width);
      std::fill(panel.data(), panel.data() + panel.size(), NAN);
      MatMulOf(kernels, w).copy_panel(w, rows, columns, panel.data());
      for (size_t i = 0; i < panel.size(); ++i) {
        const size_t row = first + i / width, n = i % width;
        const float meant = n < columns.size() ? At(w, row, begin + n) : 0.0f;
        Require(panel[i] == meant, "%s: copy_panel, row %zu, column %zu of %zu", kernels.target, row, begin + n,
                w.columns);
      }
      std::vector<Entry> both(2 * kRows);
      uint32_t counts[] = {0, 0};
      for (; e < entries.size() && entries[e].row < rows.end; ++e) both[kRows + counts[1]++] = entries[e];
      const Ahead ahead{w.data, rows.size(), w.RowBytes(), w.RowBytes()};
      kernels.panel.add({both.data(), counts, kRows, 2, first}, panel.data(), ahead, sums.data());
    }
    for (size_t n = 0; n < width; ++n) {
      const float second = sums[width + n];
      const bool right = n < columns.size() ? expected.Holds(begin + n, second) : second == 1.0f;
      Require(sums[n] == 1.0f && right, "%s: add_panel, %zu rows, column %zu of %zu", kernels.target, entries.size(),
              begin + n, w.columns);
    }
  }
}

template <class T>
void TestDots(const Kernels&, const DenseWeight<T>&, Exact<Entry>&, const Expected&) {}

// Two tokens, the first of which keeps nothing, meet one unit of rows after the other.
template <int kBits>
void TestDots(const Kernels& kernels, const BlockWeight<kBits>& w, Exact<Entry>& entries, const Expected& expected) {
  const auto& kernel = MatMulOf(kernels, w);
  if (!kernel.add_dots) return;
  const size_t unit = w.block_rows % kUnitRows == 0 || w.block_rows >= kChannels ? kUnitRows : kUnitRows / 2;
  Exact<float> sums(2 * w.columns, w.columns % 2);
  std::fill(sums.data(), sums.data() + sums.size(), 1.0f);
  for (size_t first = 0, e = 0; first < kChannels; first += unit) {
    const Span rows{first, std::min(kChannels, first + unit)};
    Exact<float> values(2 * kUnitRows);
    Exact<int8_t> high(2 * kUnitRows), low(2 * kUnitRows);
    std::fill(values.data(), values.data() + values.size(), 0.0f);
    for (; e < entries.size() && entries[e].row < rows.end; ++e) {
      values[kUnitRows + entries[e].row - first] = entries[e].value;
    }
    WholeScale scales[2];
    for (size_t t = 0; t < 2; ++t) {
      int8_t* const lower = w.values_8_bits ? nullptr : low.data() + t * kUnitRows;
      scales[t] = kernel.round_unit(values.data() + t * kUnitRows, high.data() + t * kUnitRows, lower);
      Require(scales[t].exact, "%s: round_unit of finite values", kernels.target);
    }
    const WholeUnit both{high.data(), w.values_8_bits ? nullptr : low.data(), scales, 2};
    kernel.add_dots(both, rows, kChannels, w, {0, w.columns}, sums.data(), w.columns);
    values[3] = first % 64 == 0 ? NAN : INFINITY;
    Require(!kernel.round_unit(values.data(), high.data(), nullptr).exact, "%s: round_unit of NaN", kernels.target);
  }
  for (size_t n = 0; n < w.columns; ++n) {
    Require(sums[n] == 1.0f && expected.Holds(n, sums[w.columns + n]), "%s: add_dots, %zu rows, column %zu of %zu",
            kernels.target, entries.size(), n, w.columns);
  }
}

template <class W>
void TestProduct(const Kernels& kernels, const W& w, double rounding) {
  static size_t turn = 0;
  Exact<Entry> entries = DrawEntries(kCounts[turn++ % std::size(kCounts)]);
  TestRows(kernels, w, entries, Expected(w, entries, rounding));
  TestPanels(kernels, w, entries, Expected(w, entries, 0));
  TestDots(kernels, w, entries, Expected(w, entries, rounding));
}

template <class T>
void TestDense(const Kernels& kernels, size_t columns) {
  Exact<T> data(kChannels * columns, columns % 3);
  for (size_t i = 0; i < data.size(); ++i) {
    const float value = Uniform(-1, 1);
    if constexpr (sizeof(T) == sizeof(Half)) {
      data[i] = Narrow(value);
    } else {
      data[i] = value;
    }
  }
  for (size_t i = 0; i < std::size(kCounts); ++i) TestProduct(kernels, DenseWeight<T>{data.data(), columns}, 0);
}

// Numbers of a type, in a buffer of exactly their size.
class Numbers {
 public:
  Numbers(Number type, size_t count, float low, float high) : type_(type), bytes_(count * Size(type)) {
    for (size_t i = 0; i < count && type != Number::kNone; ++i) Put(i, Uniform(low, high));
  }
  const void* data() { return type_ == Number::kNone ? nullptr : bytes_.data(); }

 private:
  static size_t Size(Number type) { return type == Number::kFloat ? 4 : type == Number::kHalf ? 2 : 1; }
  void Put(size_t i, float value) {
    if (type_ == Number::kFloat) {
      reinterpret_cast<float*>(bytes_.data())[i] = value;
    } else if (type_ == Number::kHalf) {
      reinterpret_cast<Half*>(bytes_.data())[i] = Narrow(value);
    } else {
      bytes_[i] = static_cast<uint8_t>(static_cast<int>(std::floor(value)));
    }
  }

  const Number type_;
  Exact<uint8_t> bytes_;
};

template <int kBits>
void TestBlocks(const Kernels& kernels, size_t columns, size_t block_rows, Number scale_type, Number zero_type,
                bool values_8_bits) {
  const size_t count = (kChannels + block_rows - 1) / block_rows * columns;
  const float low = kBits == 4 ? 0 : -128, high = kBits == 4 ? 16 : 128;
  Numbers scales(scale_type, count, 0.01f, 0.1f), zeros(zero_type, count, low, high);
  BlockWeight<kBits> w{nullptr,      columns,   block_rows,   scales.data(), scale_type,
                       zeros.data(), zero_type, values_8_bits};
  Exact<uint8_t> data(kChannels * w.RowBytes(), columns % 3);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(random_bits());
  w.data = data.data();
  const double steps = kernels.target == PortableKernels().target ? 0 : values_8_bits ? 127 : 32639;
  TestProduct(kernels, w, steps == 0 ? 0 : 0.5 / steps);
}

template <int kBits>
void TestEveryBlocks(const Kernels& kernels, size_t columns) {
  for (const size_t block_rows : {size_t{16}, size_t{32}, size_t{128}, kChannels, kChannels + 1}) {
    for (const Number scale_type : {Number::kHalf, Number::kFloat}) {
      for (const Number zero_type : {Number::kNone, kBits == 4 ? Number::kUint8 : Number::kInt8, scale_type}) {
        TestBlocks<kBits>(kernels, columns, block_rows, scale_type, zero_type, false);
        TestBlocks<kBits>(kernels, columns, block_rows, scale_type, zero_type, true);
      }
    }
  }
}

}  // namespace

void TestMatMuls(const Kernels& kernels) {
  for (const size_t columns : kColumns) {
    TestDense<float>(kernels, columns);
    TestDense<Half>(kernels, columns);
    TestEveryBlocks<8>(kernels, columns);
    TestEveryBlocks<4>(kernels, columns);
  }
  TestBlocks<8>(kernels, kManyColumns, 32, Number::kHalf, Number::kNone, false);
  TestBlocks<4>(kernels, kManyColumns, 32, Number::kHalf, Number::kUint8, false);
}

}  // namespace nmonnx
