// y = (the kept channels) W, by the kernel that suits the number of tokens.
#pragma once

#include <cstdlib>
#include <memory>

#include "kept_lists.h"

namespace nmonnx {

struct FreeFloats {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

// Starts on a cache line.
Floats AllocateFloats(size_t count);

constexpr size_t kMaxTokens = 256;  // tokens of one product at most: bounds the memory of lists and accumulators

enum class Method { kRows, kPanels, kDots };

// How a product of `tokens` tokens with W is done, and the rows of W that a block of its lists has.
struct Plan {
  Method method;
  size_t block_rows;
};

// `panel_tokens`: from how many tokens on the panels are used; 0 leaves it to the table.
template <class W>
Plan PlanProduct(const Kernels& kernels, const W& w, Pattern pattern, size_t tokens, size_t channels, size_t panel_tokens);

// y [tokens, columns] = sum over the lists + bias, which may be nullptr.
template <class W>
void Multiply(const Call& call, const Kernels& kernels, const KeptLists& lists, const W& w, Method method,
              const float* bias, float* y);

}  // namespace nmonnx
