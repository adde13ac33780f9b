// The kept channels of a few tokens as lists of (row of W, value), which the products walk through.
#pragma once

#include <vector>

#include "criterion.h"

namespace nmonnx {

// W is cut into blocks of `block_rows` rows. The entries of all tokens in one block lie together, as a product
// reads them; within a block each token has room for the most entries it can have there. There is at least one block.
class KeptLists {
 public:
  KeptLists(size_t tokens, size_t channels, size_t block_rows, Pattern pattern, const Criterion& criterion,
            const DenseTokens& dense);

  template <class T>
  void Fill(const Call& call, const Kernels& kernels, const T* x);

  size_t tokens() const { return tokens_; }
  size_t channels() const { return channels_; }
  size_t blocks() const { return blocks_; }
  size_t block_rows() const { return block_rows_; }
  const Entry* Entries(size_t block, size_t token) const {
    return entries_.data() + (block * tokens_ + token) * capacity_;
  }
  // What the product of a token is multiplied by; 1 where the criterion does not correct the variance.
  float Ratio(size_t token) const { return ratios_.empty() ? 1.0f : ratios_[token]; }
  // What a token was centred on; only where the criterion has a center.
  float Center(size_t token) const { return centers_[token]; }
  size_t Count(size_t block, size_t token) const { return counts_[block * tokens_ + token]; }
  BlockEntries Block(size_t block) const {
    return {Entries(block, 0), counts_.data() + block * tokens_, capacity_, tokens_, block * block_rows_};
  }

 private:
  template <class T>
  void FillToken(const T* x, const float* moved, const uint64_t* bits, size_t token);

  const Pattern pattern_;
  const Criterion& criterion_;
  const DenseTokens dense_;
  size_t tokens_, channels_, block_rows_, blocks_, capacity_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> counts_;
  std::vector<float> ratios_;
  std::vector<float> centers_;
};

}  // namespace nmonnx
