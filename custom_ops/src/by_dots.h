// Products of several tokens with a W of 8 or 4 bits, where the CPU has dot products of bytes.
//
// The rows of a unit are interleaved once, and every token multiplies with all of them, the channels that it does not keep
// being 0: for several tokens that is less work than to interleave the rows that each of them keeps.
#pragma once

#include <algorithm>
#include <vector>

#include "kept_lists.h"
#include "ort.h"
#include "product.h"

namespace nmonnx {

// Rows of a unit: they are of one block of W.
template <int kBits>
size_t UnitRows(const BlockWeight<kBits>& w, size_t channels) {
  return w.block_rows % kUnitRows == 0 || w.block_rows >= channels ? kUnitRows : kUnitRows / 2;
}

template <class W>
class ByDots {
 public:
  ByDots(const Call& call, const Kernels& kernels, const KeptLists& lists, const W& w, const float* bias, float* y)
      : call_(call), kernels_(kernels), lists_(lists), w_(w), bias_(bias), y_(y), tokens_(lists.tokens()),
        high_(lists.blocks() * tokens_ * kUnitRows), low_(w.values_8_bits ? 0 : high_.size()),
        scales_(lists.blocks() * tokens_) {}

  void Run() {
    call_.ParallelFor((lists_.blocks() + kUnitsOfTask - 1) / kUnitsOfTask, [&](size_t task) {
      const size_t end = std::min(lists_.blocks(), (task + 1) * kUnitsOfTask);
      for (size_t u = task * kUnitsOfTask; u < end; ++u) Round(u);
    });
    const size_t some = std::min(tokens_, kTokens), groups = (tokens_ + some - 1) / some;
    const size_t step = std::max<size_t>(1, kSums / (some * sizeof(float) * kColumnStep)) * kColumnStep;
    call_.ParallelFor((w_.columns + step - 1) / step * groups, [&](size_t task) {
      const size_t column = task / groups * step, token = task % groups * some;
      Add({column, std::min(w_.columns, column + step)}, {token, std::min(tokens_, token + some)});
    });
  }

 private:
  static constexpr size_t kUnitsOfTask = 16;
  static constexpr size_t kSums = 1 << 14;  // bytes of the sums of a task: they stay near in the cache
  static constexpr size_t kTokens = 32;
  static constexpr size_t kColumnStep = 128;

  void Round(size_t unit) {
    for (size_t t = 0; t < tokens_; ++t) {
      float values[kUnitRows] = {};
      const Entry* entries = lists_.Entries(unit, t);
      for (size_t e = 0; e < lists_.Count(unit, t); ++e) {
        values[entries[e].row - unit * lists_.block_rows()] = entries[e].value;
      }
      const size_t at = unit * tokens_ + t;
      int8_t* const low = low_.empty() ? nullptr : low_.data() + at * kUnitRows;
      scales_[at] = MatMulOf(kernels_, w_).round_unit(values, high_.data() + at * kUnitRows, low);
    }
  }

  // The sums of some tokens lie together and stay in the L1 cache: in y those of many would share a few lines of it.
  void Add(Span columns, Span tokens) {
    const size_t stride = columns.size();
    const Floats sums = AllocateFloats(tokens.size() * stride);
    for (size_t t = 0; t < tokens.size(); ++t) {
      for (size_t n = 0; n < stride; ++n) sums[t * stride + n] = bias_ ? bias_[columns.begin + n] : 0.0f;
    }
    const auto& exact = MatMulOf(AvailableKernels().front(), w_);
    for (size_t u = 0; u < lists_.blocks(); ++u) {
      const size_t first = u * tokens_ + tokens.begin;
      const Span rows{u * lists_.block_rows(), std::min(lists_.channels(), (u + 1) * lists_.block_rows())};
      const WholeUnit unit{high_.data() + first * kUnitRows, low_.empty() ? nullptr : low_.data() + first * kUnitRows,
                           scales_.data() + first, tokens.size()};
      MatMulOf(kernels_, w_).add_dots(unit, rows, lists_.channels(), w_, columns, sums.get(), stride);
      for (size_t t = 0; t < tokens.size(); ++t) {
        if (scales_[first + t].exact) continue;
        exact.add_rows(lists_.Entries(u, tokens.begin + t), lists_.Count(u, tokens.begin + t), nullptr, 0, w_, columns,
                       sums.get() + t * stride);
      }
    }
    for (size_t t = 0; t < tokens.size(); ++t) {
      std::copy_n(sums.get() + t * stride, stride, y_ + (tokens.begin + t) * w_.columns + columns.begin);
    }
  }

  const Call& call_;
  const Kernels& kernels_;
  const KeptLists& lists_;
  const W& w_;
  const float* bias_;
  float* y_;
  const size_t tokens_;
  std::vector<int8_t> high_, low_;  // [units][tokens][kUnitRows]
  std::vector<WholeScale> scales_;  // [units][tokens]
};

}  // namespace nmonnx
