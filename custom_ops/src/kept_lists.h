// The kept channels of a few tokens as lists of (row of W, value), which the products walk through.
#pragma once

#include <vector>

#include "criterion.h"

namespace nmonnx {

// Every token has the same number of entries, in rising order of rows. `starts` cuts each token's list at every
// block of `block_rows` rows of W: the entries of block b are [Starts(t)[b], Starts(t)[b + 1]).
class KeptLists {
 public:
  KeptLists(size_t tokens, size_t channels, size_t kept, size_t block_rows);

  template <class T>
  void Fill(const Call& call, const Kernels& kernels, Pattern pattern, const Criterion& criterion, const T* x);

  size_t tokens() const { return tokens_; }
  size_t kept() const { return kept_; }
  size_t channels() const { return channels_; }
  size_t blocks() const { return blocks_; }
  size_t block_rows() const { return block_rows_; }
  size_t starts_stride() const { return blocks_ + 1; }
  const Entry* Entries(size_t token) const { return entries_.data() + token * kept_; }
  const uint32_t* Starts(size_t token) const { return starts_.data() + token * starts_stride(); }

 private:
  template <class T>
  void FillToken(const T* x, const float* shifted, const uint64_t* bits, size_t token);

  size_t tokens_, channels_, kept_, block_rows_, blocks_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> starts_;
};

}  // namespace nmonnx
