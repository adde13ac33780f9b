// NMMatMul(x, W, bias?, scale?, shift?, order?) -> y: y = NMPrune(x) W + bias. Rows of W that no token keeps are
// not read. W lies as ONNX stores it and is never copied.
//
// Which product runs depends on the number of tokens T in the call:
//   T = 1         Gemv: 8 kept rows side by side, over all columns
//   T < 24        row-outer: the rows of one block meet every token while they are in the cache
//   T >= 24       panel: 32 rows x some columns of W copied into the L1 cache, accumulators in registers

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kept_lists.h"
#include "kernels/portable.h"
#include "ops.h"

namespace nmonnx {
namespace {

constexpr size_t kPanelTokens = 24;     // from here on panels
constexpr size_t kPanelRows = 32;
constexpr size_t kMaxTokens = 256;      // tokens handled at once: bounds the memory of lists and accumulators
constexpr size_t kMaxTasks = 8;
constexpr size_t kTaskBytes = 1 << 17;  // bytes of W a task reads at least
constexpr size_t kLongRow = 8192;       // columns from which on Gemv splits the columns, below that the rows
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

template <class T>
void GemvByColumns(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, size_t tasks,
                   float* y) {
  const size_t step = CeilDiv(CeilDiv(w.columns, tasks), kColumnStep) * kColumnStep;
  call.ParallelFor(CeilDiv(w.columns, step), [&](size_t task) {
    const size_t begin = task * step, end = std::min(w.columns, begin + step);
    Fill(bias, begin, end, y + begin);
    w.kernels.add_rows(lists.Entries(0), lists.kept(), w.data + begin, w.columns, end - begin, y + begin);
  });
}

template <class T>
void GemvByRows(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, size_t tasks,
                float* y) {
  const size_t step = CeilDiv(CeilDiv(lists.kept(), tasks), 8) * 8;
  const Floats parts = Allocate((tasks - 1) * w.columns);
  Fill(bias, 0, w.columns, y);
  tasks = CeilDiv(lists.kept(), step);
  call.ParallelFor(tasks, [&](size_t task) {
    float* part = task == 0 ? y : parts.get() + (task - 1) * w.columns;
    if (task != 0) Fill(nullptr, 0, w.columns, part);
    const size_t begin = task * step, end = std::min(lists.kept(), begin + step);
    w.kernels.add_rows(lists.Entries(0) + begin, end - begin, w.data, w.columns, w.columns, part);
  });
  for (size_t task = 1; task < tasks; ++task) {
    const float* part = parts.get() + (task - 1) * w.columns;
    for (size_t n = 0; n < w.columns; ++n) y[n] += part[n];
  }
}

// The split depends on the shape alone, so that a result does not depend on the number of threads.
template <class T>
void Gemv(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  const size_t bytes = lists.kept() * w.columns * sizeof(T);
  const size_t tasks = std::clamp<size_t>(bytes / kTaskBytes, 1, kMaxTasks);
  if (tasks == 1 || w.columns >= kLongRow) {
    GemvByColumns(call, lists, w, bias, tasks, y);
  } else {
    GemvByRows(call, lists, w, bias, tasks, y);
  }
}

size_t StripOf(size_t tokens, size_t columns) {
  if (tokens <= 4) return columns;
  return tokens <= 12 ? 512 : 128;
}

template <class T>
void RowOuter(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  const size_t bytes = lists.channels() * w.columns * sizeof(T);
  const size_t tasks = std::clamp<size_t>(std::min(bytes / kTaskBytes, w.columns / 256), 1, kMaxTasks);
  const size_t step = CeilDiv(CeilDiv(w.columns, tasks), kColumnStep) * kColumnStep;
  const size_t strip = StripOf(lists.tokens(), step);
  call.ParallelFor(CeilDiv(w.columns, step), [&](size_t task) {
    const size_t last = std::min(w.columns, (task + 1) * step);
    for (size_t begin = task * step; begin < last; begin += strip) {
      const size_t end = std::min(last, begin + strip);
      for (size_t t = 0; t < lists.tokens(); ++t) Fill(bias, begin, end, y + t * w.columns + begin);
      for (size_t b = 0; b < lists.blocks(); ++b) {
        for (size_t t = 0; t < lists.tokens(); ++t) {
          const uint32_t* range = lists.Starts(t) + b;
          w.kernels.add_rows(lists.Entries(t) + range[0], range[1] - range[0], w.data + begin, w.columns,
                             end - begin, y + t * w.columns + begin);
        }
      }
    }
  });
}

template <class T>
void Panels(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  const size_t width = w.kernels.panel_columns;
  call.ParallelFor(CeilDiv(w.columns, width), [&](size_t task) {
    const size_t begin = task * width, end = std::min(w.columns, begin + width);
    const Floats panel = Allocate(kPanelRows * width);
    const Floats sums = Allocate(lists.tokens() * width);
    std::fill(sums.get(), sums.get() + lists.tokens() * width, 0.0f);
    if (bias) {
      for (size_t t = 0; t < lists.tokens(); ++t) Fill(bias, begin, end, sums.get() + t * width);
    }
    for (size_t b = 0; b < lists.blocks(); ++b) {
      const size_t row = b * kPanelRows, rows = std::min(kPanelRows, lists.channels() - row);
      w.kernels.copy_panel(w.data + row * w.columns + begin, w.columns, rows, end - begin, panel.get());
      w.kernels.add_panel(lists.Entries(0), lists.kept(), lists.Starts(0) + b, lists.starts_stride(),
                          lists.tokens(), row, panel.get(), sums.get());
    }
    for (size_t t = 0; t < lists.tokens(); ++t) {
      std::copy(sums.get() + t * width, sums.get() + t * width + (end - begin), y + t * w.columns + begin);
    }
  });
}

// Row-outer wants about 8 kept rows in a block: that is one sweep per token.
size_t BlockRows(Pattern pattern, size_t tokens) {
  if (tokens >= kPanelTokens) return kPanelRows;
  return static_cast<size_t>(pattern.group) * CeilDiv(8, static_cast<size_t>(pattern.keep));
}

template <class T>
void Multiply(const Call& call, const KeptLists& lists, const Weight<T>& w, const float* bias, float* y) {
  if (lists.tokens() == 1) return Gemv(call, lists, w, bias, y);
  if (lists.tokens() < kPanelTokens) return RowOuter(call, lists, w, bias, y);
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
  if (bias->dims.size() > 1 || (count != columns && count != 1)) {
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

void Store(const PruneKernels&, const float*, size_t, float*) {}
void Store(const PruneKernels& kernels, const float* sums, size_t count, Half* y) { kernels.narrow(sums, count, y); }
float* SumsIn(float* y, size_t, Floats&) { return y; }
float* SumsIn(Half*, size_t count, Floats& scratch) {
  scratch = Allocate(count);
  return scratch.get();
}

template <class X, class W>
void MatMul(const Call& call, Pattern pattern, const Kernels& kernels) {
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
  const Criterion criterion = ReadCriterion(call, 3, channels);
  Floats bias_copy, scratch;
  const float* bias = ReadBias<X>(call, kernels.prune, columns, bias_copy);
  X* y = static_cast<X*>(call.Output(dims));
  if (tokens == 0 || columns == 0) return;

  const Weight<W> w{weight.As<W>(), columns, MatMulOf<W>(kernels)};
  for (size_t first = 0; first < tokens; first += kMaxTokens) {
    const size_t some = std::min(kMaxTokens, tokens - first);
    KeptLists lists(some, channels, pattern.KeptOf(channels), BlockRows(pattern, some));
    lists.Fill(call, kernels, pattern, criterion, x.As<X>() + first * channels);
    float* sums = SumsIn(y + first * columns, some * columns, scratch);
    Multiply(call, lists, w, bias, sums);
    Store(kernels.prune, sums, some * columns, y + first * columns);
  }
}

OpSpec Spec(ONNXTensorElementDataType x, ONNXTensorElementDataType w, decltype(OpSpec::compute) compute) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return {"NMMatMul", {x, w, x, kFloat, kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED}, 2, x, false, true, compute};
}

}  // namespace

std::vector<OpSpec> MatMulOps() {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  return {Spec(kFloat, kFloat, MatMul<float, float>), Spec(kHalf, kHalf, MatMul<Half, Half>),
          Spec(kFloat, kHalf, MatMul<float, Half>)};
}

}  // namespace nmonnx
