#include "kept_lists.h"

#include <algorithm>

#include "kernels/portable.h"

namespace nmonnx {
namespace {

constexpr size_t kTaskSize = 1 << 14;  // channels a task selects at least

// The value that is multiplied: x - shift - center, rounded to the type of x as NMPrune does.
float ValueOf(const float* x, const float* moved, size_t k) { return moved ? moved[k] : x[k]; }
float ValueOf(const Half* x, const float* moved, size_t k) { return Widen(moved ? Narrow(moved[k]) : x[k]); }

// nu of one token after another; one per thread.
class Ratios {
 public:
  Ratios(const Kernels& kernels, bool needed, size_t channels)
      : kernels_(kernels), channels_(channels), z_(needed ? channels : 0), kept_(needed ? channels : 0),
        half_(needed ? channels : 0) {}

  float Of(const float* x, const float* moved, const uint64_t* bits) { return OfValues(moved ? moved : x, bits); }
  float Of(const Half* x, const float* moved, const uint64_t* bits) {
    if (moved) kernels_.prune.narrow(moved, channels_, half_.data());
    kernels_.prune.widen(moved ? half_.data() : x, channels_, z_.data());
    return OfValues(z_.data(), bits);
  }

 private:
  float OfValues(const float* z, const uint64_t* bits) {
    return VarianceRatio(kernels_, z, bits, channels_, kept_.data());
  }

  const Kernels& kernels_;
  const size_t channels_;
  std::vector<float> z_, kept_;
  std::vector<Half> half_;
};

// Most entries of a token in one block: with an order, where groups cross blocks, or for a dense token, a block may be
// kept whole.
size_t Capacity(size_t channels, size_t block_rows, Pattern pattern, const Criterion& criterion, bool any_dense) {
  if (any_dense) return std::min(block_rows, channels);
  const size_t kept = pattern.KeptOf(channels);
  if (block_rows >= channels) return kept;
  const bool uniform = criterion.order.empty() && block_rows % static_cast<size_t>(pattern.group) == 0;
  return uniform ? pattern.KeptOf(block_rows) : std::min(block_rows, kept);
}

}  // namespace

KeptLists::KeptLists(size_t tokens, size_t channels, size_t block_rows, Pattern pattern, const Criterion& criterion,
                     const DenseTokens& dense)
    : pattern_(pattern), criterion_(criterion), dense_(dense), tokens_(tokens), channels_(channels),
      block_rows_(block_rows), blocks_(std::max<size_t>(1, (channels + block_rows - 1) / block_rows)),
      capacity_(Capacity(channels, block_rows, pattern, criterion, dense.AnyOf(tokens))),
      entries_(blocks_ * tokens * capacity_), counts_(blocks_ * tokens),
      ratios_(criterion.correction.variance ? tokens : 0),
      centers_(criterion.correction.center != Center::kNone ? tokens : 0) {}

template <class T>
void KeptLists::Fill(const Call& call, const Kernels& kernels, const T* x) {
  const size_t tokens_per_task = std::max<size_t>(1, kTaskSize / std::max<size_t>(1, channels_));
  call.ParallelFor((tokens_ + tokens_per_task - 1) / tokens_per_task, [&](size_t task) {
    Selector selector(kernels, pattern_, criterion_, channels_);
    Ratios ratios(kernels, criterion_.correction.variance, channels_);
    const size_t end = std::min(tokens_, (task + 1) * tokens_per_task);
    for (size_t t = task * tokens_per_task; t < end; ++t) {
      const T* token = x + t * channels_;
      const uint64_t* bits = dense_(t) ? selector.SelectAll(token) : selector.Select(token);
      const float* moved = criterion_.MovesValues() ? selector.moved() : nullptr;
      FillToken(token, moved, bits, t);
      if (!centers_.empty()) centers_[t] = selector.center();
      if (criterion_.correction.variance) ratios_[t] = ratios.Of(token, moved, bits);
    }
  });
}

template void KeptLists::Fill(const Call&, const Kernels&, const float*);
template void KeptLists::Fill(const Call&, const Kernels&, const Half*);

template <class T>
void KeptLists::FillToken(const T* x, const float* moved, const uint64_t* bits, size_t token) {
  for (size_t block = 0; block < blocks_; ++block) {
    const size_t begin = block * block_rows_, end = std::min(channels_, begin + block_rows_);
    Entry* const entries = entries_.data() + (block * tokens_ + token) * capacity_;
    Entry* entry = entries;
    for (size_t base = begin / 64 * 64; base < end; base += 64) {
      uint64_t word = bits[base / 64];
      if (base < begin) word &= ~uint64_t{0} << (begin - base);
      if (end - base < 64) word &= (uint64_t{1} << (end - base)) - 1;
      for (; word != 0; word &= word - 1) {
        const size_t k = base + static_cast<size_t>(__builtin_ctzll(word));
        *entry++ = {static_cast<uint32_t>(k), ValueOf(x, moved, k)};
      }
    }
    counts_[block * tokens_ + token] = static_cast<uint32_t>(entry - entries);
  }
}

}  // namespace nmonnx
