#include "linear.h"

#include <algorithm>

#include "kernels/portable.h"
#include "product.h"

namespace nmonnx {
namespace {

// y = nu y + center row_sum + bias, token by token, after the product.
void Correct(const Call& call, const KeptLists& lists, size_t columns, const float* row_sum, const float* bias,
             float* y) {
  call.ParallelFor(lists.tokens(), [&](size_t t) {
    const float nu = lists.Ratio(t), center = row_sum ? lists.Center(t) : 0.0f;
    float* row = y + t * columns;
    for (size_t n = 0; n < columns; ++n) {
      row[n] *= nu;
      if (row_sum) row[n] += center * row_sum[n];
      if (bias) row[n] += bias[n];
    }
  });
}

const float* AsFloats(const PruneKernels&, const float* values, size_t, Floats&) { return values; }
const float* AsFloats(const PruneKernels& kernels, const Half* values, size_t count, Floats& copy) {
  copy = AllocateFloats(count);
  kernels.widen(values, count, copy.get());
  return copy.get();
}

// The bias as N floats, nullptr where it adds nothing.
template <class X>
const float* ReadBias(const Call& call, const PruneKernels& kernels, const LinearInputs& inputs, size_t columns,
                      Floats& copy) {
  const std::optional<Tensor> bias = call.OptionalInput(inputs.optional);
  if (!bias) return nullptr;
  const size_t count = bias->Count();
  const bool is_row = bias->dims.empty() || static_cast<size_t>(bias->dims.back()) == count;
  if (!is_row || (count != columns && count != 1)) {
    throw Refusal(std::string(inputs.op) + ": bias has shape " + ToString(bias->dims) + "; it must be [" +
                  std::to_string(columns) + "] (the columns of W) or [1]");
  }
  if (count == columns) return AsFloats(kernels, bias->As<X>(), count, copy);
  const float value = Widen(*bias->As<X>());
  if (value == 0.0f) return nullptr;
  copy = AllocateFloats(columns);
  std::fill(copy.get(), copy.get() + columns, value);
  return copy.get();
}

// What W adds up to, column by column: a center meets it. Nothing without a center.
const float* ReadRowSum(const Call& call, Center center, const LinearInputs& inputs, size_t columns) {
  if (center == Center::kNone) return nullptr;
  const std::string op = inputs.op;
  const std::optional<Tensor> row_sum = call.OptionalInput(inputs.optional + 4);
  if (!row_sum) throw Refusal(op + ": the attribute 'center' needs the input row_sum, the sum of the rows of W");
  if (row_sum->dims.size() != 1 || row_sum->Count() != columns) {
    throw Refusal(op + ": row_sum has shape " + ToString(row_sum->dims) + "; it must be [" + std::to_string(columns) +
                  "] (the columns of W)");
  }
  return row_sum->As<float>();
}

void Store(const PruneKernels&, const float*, size_t, float*) {}
void Store(const PruneKernels& kernels, const float* sums, size_t count, Half* y) { kernels.narrow(sums, count, y); }
float* SumsIn(float* y, size_t, Floats&) { return y; }
float* SumsIn(Half*, size_t count, Floats& scratch) {
  scratch = AllocateFloats(count);
  return scratch.get();
}

}  // namespace

template <class X, class W>
void Linear(const Call& call, const Attributes& attributes, const Kernels& kernels, const LinearInputs& inputs,
            const W& w) {
  const Correction& correction = attributes.correction;
  const size_t channels = inputs.channels, columns = w.columns;
  Dims dims = inputs.x.dims;
  dims.pop_back();
  const size_t tokens = Elements(dims);
  dims.push_back(static_cast<int64_t>(columns));
  const Criterion criterion = ReadCriterion(call, inputs.optional + 1, channels, correction);
  const DenseTokens dense = ReadDense(call, inputs.optional + 5, tokens);
  Floats bias_copy, scratch;
  const float* bias = ReadBias<X>(call, kernels.prune, inputs, columns, bias_copy);
  const float* row_sum = ReadRowSum(call, correction.center, inputs, columns);
  X* y = static_cast<X*>(call.Output(dims));
  if (tokens == 0 || columns == 0) return;

  for (size_t first = 0; first < tokens; first += kMaxTokens) {
    const size_t some = std::min(kMaxTokens, tokens - first);
    const Plan plan = PlanProduct(kernels, w, attributes.pattern, some, channels, attributes.panel_tokens);
    KeptLists lists(some, channels, plan.block_rows, attributes.pattern, criterion, dense.From(first));
    lists.Fill(call, kernels, inputs.x.As<X>() + first * channels);
    float* sums = SumsIn(y + first * columns, some * columns, scratch);
    Multiply(call, kernels, lists, w, plan.method, correction.None() ? bias : nullptr, sums);
    if (!correction.None()) Correct(call, lists, columns, row_sum, bias, sums);
    Store(kernels.prune, sums, some * columns, y + first * columns);
  }
}

#define NMONNX_LINEAR(X, W) \
  template void Linear<X, W>(const Call&, const Attributes&, const Kernels&, const LinearInputs&, const W&);
NMONNX_LINEAR(float, DenseWeight<float>)
NMONNX_LINEAR(float, DenseWeight<Half>)
NMONNX_LINEAR(Half, DenseWeight<Half>)
NMONNX_LINEAR(float, BlockWeight<8>)
NMONNX_LINEAR(Half, BlockWeight<8>)
NMONNX_LINEAR(float, BlockWeight<4>)
NMONNX_LINEAR(Half, BlockWeight<4>)
#undef NMONNX_LINEAR

}  // namespace nmonnx
