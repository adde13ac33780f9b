// NMMatMul(x, W, bias?, scale?, shift?, order?, row_sum?, dense?) -> y: y = NMPrune(x) W + bias. Rows of W that no
// token keeps are not read; a `dense` token keeps all. W lies as ONNX stores it and is never copied. Where the
// attributes `variance` and `center` ask for it, the product is multiplied by nu and center * row_sum is added, before
// the bias.
//
// Which product runs depends on the number of tokens T in the call:
//   T = 1     Gemv: 8 kept rows side by side
//   T = 2..5  row-outer: the rows of a small block meet every token while they are in the cache
//   T >= 6    panel: 32 rows x some columns of W copied into the L1 cache, accumulators in registers

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kept_lists.h"
#include "kernels/portable.h"
#include "ops.h"

namespace nmonnx {
namespace {

constexpr size_t kPanelTokens = 6;      // from here on panels
constexpr size_t kPanelRows = 32;
constexpr size_t kMaxTokens = 256;      // tokens handled at once: bounds the memory of lists and accumulators
constexpr size_t kMaxTasks = 8;
constexpr size_t kTaskBytes = 1 << 17;  // bytes of W a task reads at least
constexpr size_t kLongRow = 8192;       // columns from which on tasks split the columns, below that the rows
constexpr size_t kColumnStep = 64;

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

// Starts on a cache line.
Floats Allocate(size_t count) {
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  float* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(64, bytes)));
  if (!p) throw std::bad_alloc();
  return Floats(p);
}

template <class T>
struct Weight {
  const T* data;
  size_t columns;
  const MatMulKernels<T>& kernels;
};

size_t CeilDiv(size_t a, size_t b) { return (a + b - 1) / b; }

void Fill(const float* bias, size_t begin, size_t end, float* y) {
  if (bias) {
    std::copy(bias + begin, bias + end, y);
  } else {
    std::fill(y, y + (end - begin), 0.0f);
  }
}

// A share of the rows of W for one task, in units that Gemv and row-outer choose.
struct Range {
  size_t begin, end;
};

// y[tokens][begin..end) += what the units of a task add; `y` points to column 0.
template <class T>
void AddUnits(const KeptLists& lists, const Weight<T>& w, Range units, Range columns, float* y) {
  const T* data = w.data + columns.begin;
  const size_t width = columns.end - columns.begin;
  if (lists.tokens() == 1) {  // one block, whose entries are the units
    return w.kernels.add_rows(lists.Entries(0, 0) + units.begin, units.end - units.begin, nullptr, 0, data, w.columns,
                              width, y + columns.begin);
  }
  for (size_t b = units.begin; b < units.end; ++b) {
    for (size_t t = 0; t < lists.tokens(); ++t) {
      const bool last = b + 1 == units.end;
      w.kernels.add_rows(lists.Entries(b, t), lists.Count(b, t), last ? nullptr : lists.Entries(b + 1, t),
                         last ? 0 : lists.Count(b + 1, t), data, w.columns, width,
                         y + t * w.columns + columns.begin);
    }
  }
}

template <class T>
void ByColumns(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, size_t units,
               size_t tasks, float* y) {
  const size_t step = CeilDiv(CeilDiv(w.columns, tasks), kColumnStep) * kColumnStep;
  call.ParallelFor(CeilDiv(w.columns, step), [&](size_t task) {
    const Range columns{task * step, std::min(w.columns, (task + 1) * step)};
    for (size_t t = 0; t < lists.tokens(); ++t) {
      Fill(bias, columns.begin, columns.end, y + t * w.columns + columns.begin);
    }
    AddUnits(lists, w, {0, units}, columns, y);
  });
}

// Every task has sums of its own, which are added up at the end: rows stay whole, which is faster than short
// pieces of them.
template <class T>
void ByRows(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, size_t units,
            size_t tasks, float* y) {
  const size_t step = CeilDiv(CeilDiv(units, tasks), 8) * 8;
  tasks = CeilDiv(units, step);
  const size_t size = lists.tokens() * w.columns;
  const Floats parts = Allocate((tasks - 1) * size);
  for (size_t t = 0; t < lists.tokens(); ++t) Fill(bias, 0, w.columns, y + t * w.columns);
  call.ParallelFor(tasks, [&](size_t task) {
    float* part = task == 0 ? y : parts.get() + (task - 1) * size;
    if (task != 0) std::fill(part, part + size, 0.0f);
    AddUnits(lists, w, {task * step, std::min(units, (task + 1) * step)}, {0, w.columns}, part);
  });
  for (size_t task = 1; task < tasks; ++task) {
    const float* part = parts.get() + (task - 1) * size;
    for (size_t i = 0; i < size; ++i) y[i] += part[i];
  }
}

// The split depends on the shape alone, so that a result does not depend on the number of threads.
template <class T>
void FewTokens(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  const size_t units = lists.tokens() == 1 ? lists.Count(0, 0) : lists.blocks();
  const size_t bytes = lists.channels() * w.columns * sizeof(T) / 2;
  const size_t tasks = std::clamp<size_t>(bytes / kTaskBytes, 1, kMaxTasks);
  if (tasks == 1 || w.columns >= kLongRow) {
    ByColumns(call, lists, w, bias, units, tasks, y);
  } else {
    ByRows(call, lists, w, bias, units, tasks, y);
  }
}

// The sums of all tokens in one panel of columns: sums[t * panel_columns + n].
template <class T>
void AddPanelColumns(const KeptLists& lists, const Weight<T>& w, size_t begin, size_t columns, float* sums) {
  const Floats panel = Allocate(kPanelRows * w.kernels.panel_columns);
  const auto rows_of = [&](size_t b) { return std::min(kPanelRows, lists.channels() - b * kPanelRows); };
  const auto start_of = [&](size_t b) { return w.data + b * kPanelRows * w.columns + begin; };
  for (size_t b = 0; b < lists.blocks(); ++b) {
    Ahead ahead{};
    if (b + 1 < lists.blocks()) ahead = {start_of(b + 1), rows_of(b + 1), columns * sizeof(T), w.columns * sizeof(T)};
    w.kernels.copy_panel(start_of(b), w.columns, rows_of(b), columns, panel.get());
    w.kernels.add_panel(lists.Block(b), panel.get(), ahead, sums);
  }
}

template <class T>
void Panels(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  const size_t width = w.kernels.panel_columns;
  call.ParallelFor(CeilDiv(w.columns, width), [&](size_t task) {
    const size_t begin = task * width, columns = std::min(width, w.columns - begin);
    const Floats sums = Allocate(lists.tokens() * width);
    std::fill(sums.get(), sums.get() + lists.tokens() * width, 0.0f);
    AddPanelColumns(lists, w, begin, columns, sums.get());
    for (size_t t = 0; t < lists.tokens(); ++t) {
      const float* from = sums.get() + t * width;
      float* to = y + t * w.columns + begin;
      for (size_t n = 0; n < columns; ++n) to[n] = bias ? from[n] + bias[begin + n] : from[n];
    }
  });
}

// Row-outer wants about 8 kept rows in a block: that is one sweep per token.
size_t BlockRows(Pattern pattern, size_t tokens, size_t channels) {
  if (tokens == 1) return std::max<size_t>(1, channels);
  if (tokens >= kPanelTokens) return kPanelRows;
  return static_cast<size_t>(pattern.group) * CeilDiv(8, static_cast<size_t>(pattern.keep));
}

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

template <class T>
void Multiply(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  if (lists.tokens() < kPanelTokens) return FewTokens(call, lists, w, bias, y);
  Panels(call, lists, w, bias, y);
}

const float* AsFloats(const PruneKernels&, const float* values, size_t, Floats&) { return values; }
const float* AsFloats(const PruneKernels& kernels, const Half* values, size_t count, Floats& copy) {
  copy = Allocate(count);
  kernels.widen(values, count, copy.get());
  return copy.get();
}

// The bias as N floats, nullptr where it adds nothing.
template <class X>
const float* ReadBias(const Call& call, const PruneKernels& kernels, size_t columns, Floats& copy) {
  const std::optional<Tensor> bias = call.OptionalInput(2);
  if (!bias) return nullptr;
  const size_t count = bias->Count();
  const bool is_row = bias->dims.empty() || static_cast<size_t>(bias->dims.back()) == count;
  if (!is_row || (count != columns && count != 1)) {
    throw Refusal("NMMatMul: bias has shape " + ToString(bias->dims) + "; it must be [" + std::to_string(columns) +
                  "] (the columns of W) or [1]");
  }
  if (count == columns) return AsFloats(kernels, bias->As<X>(), count, copy);
  const float value = Widen(*bias->As<X>());
  if (value == 0.0f) return nullptr;
  copy = Allocate(columns);
  std::fill(copy.get(), copy.get() + columns, value);
  return copy.get();
}

// What W adds up to, column by column: a center meets it. Nothing without a center.
const float* ReadRowSum(const Call& call, Center center, size_t columns) {
  if (center == Center::kNone) return nullptr;
  const std::optional<Tensor> row_sum = call.OptionalInput(6);
  if (!row_sum) throw Refusal("NMMatMul: the attribute 'center' needs the input row_sum, the sum of the rows of W");
  if (row_sum->dims.size() != 1 || row_sum->Count() != columns) {
    throw Refusal("NMMatMul: row_sum has shape " + ToString(row_sum->dims) + "; it must be [" +
                  std::to_string(columns) + "] (the columns of W)");
  }
  return row_sum->As<float>();
}

void Store(const PruneKernels&, const float*, size_t, float*) {}
void Store(const PruneKernels& kernels, const float* sums, size_t count, Half* y) { kernels.narrow(sums, count, y); }
float* SumsIn(float* y, size_t, Floats&) { return y; }
float* SumsIn(Half*, size_t count, Floats& scratch) {
  scratch = Allocate(count);
  return scratch.get();
}

template <class X, class W>
void MatMul(const Call& call, Pattern pattern, Correction correction, const Kernels& kernels) {
  const Tensor x = call.Input(0), weight = call.Input(1);
  if (x.dims.empty() || weight.dims.size() != 2 || x.dims.back() != weight.dims[0]) {
    throw Refusal("NMMatMul: x has shape " + ToString(x.dims) + " and W has shape " + ToString(weight.dims) +
                  "; W must be [K, N] where K is the last dimension of x");
  }
  const size_t channels = static_cast<size_t>(weight.dims[0]), columns = static_cast<size_t>(weight.dims[1]);
  Dims dims = x.dims;
  dims.back() = weight.dims[1];
  size_t tokens = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= static_cast<size_t>(dims[i]);
  const Criterion criterion = ReadCriterion(call, 3, channels, correction);
  const DenseTokens dense = ReadDense(call, 7, tokens);
  Floats bias_copy, scratch;
  const float* bias = ReadBias<X>(call, kernels.prune, columns, bias_copy);
  const float* row_sum = ReadRowSum(call, correction.center, columns);
  X* y = static_cast<X*>(call.Output(dims));
  if (tokens == 0 || columns == 0) return;

  const Weight<W> w{weight.As<W>(), columns, MatMulOf<W>(kernels)};
  for (size_t first = 0; first < tokens; first += kMaxTokens) {
    const size_t some = std::min(kMaxTokens, tokens - first);
    KeptLists lists(some, channels, BlockRows(pattern, some, channels), pattern, criterion, dense.From(first));
    lists.Fill(call, kernels, x.As<X>() + first * channels);
    float* sums = SumsIn(y + first * columns, some * columns, scratch);
    Multiply(call, lists, w, correction.None() ? bias : nullptr, sums);
    if (!correction.None()) Correct(call, lists, columns, row_sum, bias, sums);
    Store(kernels.prune, sums, some * columns, y + first * columns);
  }
}

OpSpec Spec(ONNXTensorElementDataType x, ONNXTensorElementDataType w, decltype(OpSpec::compute) compute) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kBool = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  constexpr auto kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  return {"NMMatMul", {x, w, x, kFloat, kFloat, kAny, kFloat, kBool}, 2, {x}, false, true, compute};
}

}  // namespace

std::vector<OpSpec> MatMulOps() {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  return {Spec(kFloat, kFloat, MatMul<float, float>), Spec(kHalf, kHalf, MatMul<Half, Half>),
          Spec(kFloat, kHalf, MatMul<float, Half>)};
}

}  // namespace nmonnx
