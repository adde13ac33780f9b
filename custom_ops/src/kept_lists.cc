#include "kept_lists.h"

#include <algorithm>

#include "kernels/portable.h"

namespace nmonnx {
namespace {

constexpr size_t kTaskSize = 1 << 14;  // channels a task selects at least

// The value that is multiplied: x - shift, rounded to the type of x as NMPrune does.
float ValueOf(const float* x, const float* shifted, size_t k) { return shifted ? shifted[k] : x[k]; }
float ValueOf(const Half* x, const float* shifted, size_t k) { return Widen(shifted ? Narrow(shifted[k]) : x[k]); }

}  // namespace

KeptLists::KeptLists(size_t tokens, size_t channels, size_t kept, size_t block_rows)
    : tokens_(tokens), channels_(channels), kept_(kept), block_rows_(block_rows),
      blocks_((channels + block_rows - 1) / block_rows), entries_(tokens * kept), starts_(tokens * (blocks_ + 1)) {}

template <class T>
void KeptLists::Fill(const Call& call, const Kernels& kernels, Pattern pattern, const Criterion& criterion,
                     const T* x) {
  const size_t tokens_per_task = std::max<size_t>(1, kTaskSize / std::max<size_t>(1, channels_));
  call.ParallelFor((tokens_ + tokens_per_task - 1) / tokens_per_task, [&](size_t task) {
    Selector selector(kernels, pattern, criterion, channels_);
    const size_t end = std::min(tokens_, (task + 1) * tokens_per_task);
    for (size_t t = task * tokens_per_task; t < end; ++t) {
      const T* token = x + t * channels_;
      const uint64_t* bits = selector.Select(token);
      FillToken(token, criterion.shift.empty() ? nullptr : selector.shifted(), bits, t);
    }
  });
}

template void KeptLists::Fill(const Call&, const Kernels&, Pattern, const Criterion&, const float*);
template void KeptLists::Fill(const Call&, const Kernels&, Pattern, const Criterion&, const Half*);

template <class T>
void KeptLists::FillToken(const T* x, const float* shifted, const uint64_t* bits, size_t token) {
  Entry* entry = entries_.data() + token * kept_;
  uint32_t* starts = starts_.data() + token * starts_stride();
  size_t block = 0;
  for (size_t base = 0; base < channels_; base += 64) {
    for (uint64_t word = bits[base / 64]; word != 0; word &= word - 1) {
      const size_t k = base + static_cast<size_t>(__builtin_ctzll(word));
      const auto at = static_cast<uint32_t>(entry - Entries(token));
      for (; block * block_rows_ <= k; ++block) starts[block] = at;
      *entry++ = {static_cast<uint32_t>(k), ValueOf(x, shifted, k)};
    }
  }
  for (; block <= blocks_; ++block) starts[block] = static_cast<uint32_t>(kept_);
}

}  // namespace nmonnx
