#include "product.h"

#include <algorithm>
#include <new>

#include "by_dots.h"

namespace nmonnx {
namespace {

constexpr size_t kMaxTasks = 8;
constexpr size_t kTaskBytes = 1 << 17;     // bytes of W a task reads at least
constexpr size_t kSumsShare = 32;          // and times the bytes of its sums
constexpr size_t kLongRow = 32768;         // bytes from which on tasks split the columns, below that the rows
constexpr size_t kColumnStep = 64;
constexpr size_t kStripBytes = 8192;       // of a row, that several tokens add in turn while they are in the L2 cache
constexpr size_t kPanelRows = 32;
constexpr size_t kPanelSums = 1 << 17;     // bytes of the sums of a task: they stay in the L2 cache
constexpr size_t kPanelTasks = 2;          // at least, where there are as many panels

size_t CeilDiv(size_t a, size_t b) { return (a + b - 1) / b; }
size_t RoundUp(size_t a, size_t b) { return CeilDiv(a, b) * b; }

// The table that `benchmarks/kernels.py thresholds` measures: from how many tokens on panels are faster, and the kept
// rows that one sweep of a kernel takes.
constexpr size_t kNever = kMaxTokens + 1;
constexpr size_t kManyColumns = 4096;

template <class T>
size_t PanelTokens(const Kernels& kernels, const DenseWeight<T>& w) {
  const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 64 == 0;  // else every load of a row touches two lines
  return kernels.panel.lanes >= 16 || !aligned ? 5 : 10;
}
size_t PanelTokens(const Kernels& kernels, const BlockWeight<8>&) { return kernels.matmul_int8.add_dots ? 64 : 24; }
size_t PanelTokens(const Kernels& kernels, const BlockWeight<4>& w) {
  const bool dots = kernels.matmul_int4.add_dots != nullptr;
  if (!w.values_8_bits && !dots) return 48;
  return w.columns < kManyColumns ? kNever : dots ? 128 : 64;
}

// The same of dot products, which do not skip what a token does not keep.
template <class T>
size_t DotTokens(const Kernels&, const DenseWeight<T>&, Pattern) { return kNever; }
template <int kBits>
size_t DotTokens(const Kernels& kernels, const BlockWeight<kBits>& w, Pattern pattern) {
  if (!MatMulOf(kernels, w).add_dots || 2 * pattern.keep < pattern.group) return kNever;
  if (4 * pattern.keep >= 3 * pattern.group) return 4;
  return kBits == 8 ? 24 : w.columns < kManyColumns ? kNever : 16;
}
template <class T>
size_t UnitRows(const DenseWeight<T>&, size_t) { return kUnitRows; }

template <class T>
void Dots(const Call&, const Kernels&, const KeptLists&, const DenseWeight<T>&, const float*, float*) {}
template <int kBits>
void Dots(const Call& call, const Kernels& kernels, const KeptLists& lists, const BlockWeight<kBits>& w,
          const float* bias, float* y) {
  ByDots<BlockWeight<kBits>>(call, kernels, lists, w, bias, y).Run();
}

template <class T>
constexpr size_t SweepRows(const DenseWeight<T>&) { return 8; }
template <int kBits>
constexpr size_t SweepRows(const BlockWeight<kBits>&) { return 16; }

void Fill(const float* bias, Span columns, float* y) {
  if (bias) {
    std::copy(bias + columns.begin, bias + columns.end, y + columns.begin);
  } else {
    std::fill(y + columns.begin, y + columns.end, 0.0f);
  }
}

// One product by rows: what a task adds is a span of units, times a span of columns. The units of a single token are its
// entries, those of several are the blocks of rows.
template <class W>
class ByRows {
 public:
  ByRows(const Call& call, const MatMulKernels<W>& kernels, const KeptLists& lists, const W& w, const float* bias,
         float* y)
      : call_(call), kernels_(kernels), lists_(lists), w_(w), bias_(bias), y_(y),
        units_(lists.tokens() == 1 ? lists.Count(0, 0) : lists.blocks()) {}

  // The split depends on the shape alone, so that a result does not depend on the number of threads.
  void Run() {
    const size_t bytes = lists_.channels() * w_.RowBytes() / 2;
    const size_t least = std::max(kTaskBytes, kSumsShare * w_.columns * sizeof(float));
    const size_t tasks = std::clamp<size_t>(bytes / least, 1, kMaxTasks);
    if (tasks == 1 || w_.RowBytes() >= kLongRow) {
      SplitColumns(tasks);
    } else {
      SplitUnits(tasks);
    }
  }

 private:
  void SplitColumns(size_t tasks) {
    const size_t narrow = lists_.tokens() == 1 ? 1 : StripColumns();  // several tokens read no less of a row
    const size_t step = RoundUp(std::max(narrow, CeilDiv(w_.columns, tasks)), kColumnStep);
    call_.ParallelFor(CeilDiv(w_.columns, step), [&](size_t task) {
      const Span columns{task * step, std::min(w_.columns, (task + 1) * step)};
      for (size_t t = 0; t < lists_.tokens(); ++t) Fill(bias_, columns, y_ + t * w_.columns);
      Add({0, units_}, columns, y_);
    });
  }

  // Every task has sums of its own, which are added up at the end: rows stay whole, which is faster than short
  // pieces of them.
  void SplitUnits(size_t tasks) {
    const size_t step = RoundUp(CeilDiv(units_, tasks), lists_.tokens() == 1 ? SweepRows(w_) : 1);
    tasks = CeilDiv(units_, step);
    const size_t size = lists_.tokens() * w_.columns;
    const Floats parts = AllocateFloats((tasks - 1) * size);
    const Span all{0, w_.columns};
    for (size_t t = 0; t < lists_.tokens(); ++t) Fill(bias_, all, y_ + t * w_.columns);
    call_.ParallelFor(tasks, [&](size_t task) {
      float* part = task == 0 ? y_ : parts.get() + (task - 1) * size;
      if (task != 0) std::fill(part, part + size, 0.0f);
      Add({task * step, std::min(units_, (task + 1) * step)}, all, part);
    });
    for (size_t task = 1; task < tasks; ++task) {
      const float* part = parts.get() + (task - 1) * size;
      for (size_t i = 0; i < size; ++i) y_[i] += part[i];
    }
  }

  size_t StripColumns() const { return RoundUp(w_.columns * kStripBytes / w_.RowBytes(), kColumnStep); }

  void Add(Span units, Span columns, float* y) {
    if (lists_.tokens() == 1) {
      const Entry* entries = lists_.Entries(0, 0);
      return kernels_.add_rows(entries + units.begin, units.size(), entries + units.end, units_ - units.end, w_, columns,
                               y + columns.begin);
    }
    const size_t strip = StripColumns();
    for (size_t begin = columns.begin; begin < columns.end; begin += strip) {
      AddStrip(units, {begin, std::min(columns.end, begin + strip)}, y);
    }
  }

  // The rows of a block meet every token while they are in the cache; the first two tokens fetch most of the next ones.
  void AddStrip(Span units, Span columns, float* y) {
    for (size_t b = units.begin; b < units.end; ++b) {
      for (size_t t = 0; t < lists_.tokens(); ++t) {
        const bool fetch = t < 2 && b + 1 < units.end;
        kernels_.add_rows(lists_.Entries(b, t), lists_.Count(b, t), fetch ? lists_.Entries(b + 1, t) : nullptr,
                          fetch ? lists_.Count(b + 1, t) : 0, w_, columns, y + t * w_.columns + columns.begin);
      }
    }
  }

  const Call& call_;
  const MatMulKernels<W>& kernels_;
  const KeptLists& lists_;
  const W& w_;
  const float* bias_;
  float* y_;
  const size_t units_;
};

// The bytes of row `row` of W that panels read.
template <class T>
Ahead Bytes(const DenseWeight<T>& w, Span rows, Span columns) {
  return {w.data + rows.begin * w.columns + columns.begin, rows.size(), columns.size() * sizeof(T), w.RowBytes()};
}
template <int kBits>
Ahead Bytes(const BlockWeight<kBits>& w, Span rows, Span columns) {
  constexpr size_t kPerByte = 8 / kBits;
  return {w.data + rows.begin * w.RowBytes() + columns.begin / kPerByte, rows.size(), columns.size() / kPerByte,
          w.RowBytes()};
}

// Some columns of 32 rows of W are copied into the L1 cache, and the sums of a token are in registers. A task goes
// through several panels side by side, so that what it reads of a row is long.
template <class W>
class ByPanels {
 public:
  ByPanels(const Call& call, const Kernels& kernels, const KeptLists& lists, const W& w, const float* bias, float* y)
      : call_(call), kernels_(kernels), lists_(lists), w_(w), bias_(bias), y_(y), width_(kernels.panel.columns) {}

  void Run() {
    const size_t panels = CeilDiv(w_.columns, width_);
    const size_t fit = kPanelSums / (lists_.tokens() * width_ * sizeof(float));
    const size_t step = width_ * std::clamp<size_t>(fit, 1, CeilDiv(panels, kPanelTasks));
    call_.ParallelFor(CeilDiv(w_.columns, step), [&](size_t task) {
      const Span columns{task * step, std::min(w_.columns, (task + 1) * step)};
      const size_t size = lists_.tokens() * width_, count = CeilDiv(columns.size(), width_);
      const Floats sums = AllocateFloats(count * size);
      std::fill(sums.get(), sums.get() + count * size, 0.0f);
      Add(columns, sums.get());
      for (size_t p = 0; p < count; ++p) Store(PanelOf(columns, p), sums.get() + p * size);
    });
  }

 private:
  Span PanelOf(Span columns, size_t p) const {
    const size_t begin = columns.begin + p * width_;
    return {begin, std::min(columns.end, begin + width_)};
  }

  Span RowsOf(size_t block) const {
    return {block * kPanelRows, std::min(lists_.channels(), (block + 1) * kPanelRows)};
  }

  void Add(Span columns, float* sums) const {
    const auto& copy_panel = MatMulOf(kernels_, w_).copy_panel;
    const Floats panel = AllocateFloats(kPanelRows * width_);
    const size_t count = CeilDiv(columns.size(), width_), steps = lists_.blocks() * count;
    for (size_t i = 0; i < steps; ++i) {  // block by block, in each panel by panel
      const auto source = [&](size_t step) { return Bytes(w_, RowsOf(step / count), PanelOf(columns, step % count)); };
      copy_panel(w_, RowsOf(i / count), PanelOf(columns, i % count), panel.get());
      kernels_.panel.add(lists_.Block(i / count), panel.get(), i + 1 < steps ? source(i + 1) : Ahead{},
                         sums + i % count * lists_.tokens() * width_);
    }
  }

  void Store(Span columns, const float* sums) const {
    for (size_t t = 0; t < lists_.tokens(); ++t, sums += width_) {
      float* to = y_ + t * w_.columns + columns.begin;
      for (size_t n = 0; n < columns.size(); ++n) to[n] = bias_ ? sums[n] + bias_[columns.begin + n] : sums[n];
    }
  }

  const Call& call_;
  const Kernels& kernels_;
  const KeptLists& lists_;
  const W& w_;
  const float* bias_;
  float* y_;
  const size_t width_;
};

}  // namespace

Floats AllocateFloats(size_t count) {
  const size_t bytes = RoundUp(count * sizeof(float), 64);
  float* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(64, bytes)));
  if (!p) throw std::bad_alloc();
  return Floats(p);
}

template <class W>
Plan PlanProduct(const Kernels& kernels, const W& w, Pattern pattern, size_t tokens, size_t channels,
                 size_t panel_tokens) {
  if (tokens == 1) return {Method::kRows, std::max<size_t>(1, channels)};
  if (!panel_tokens && tokens >= DotTokens(kernels, w, pattern)) return {Method::kDots, UnitRows(w, channels)};
  if (tokens >= (panel_tokens ? panel_tokens : PanelTokens(kernels, w))) return {Method::kPanels, kPanelRows};
  const size_t groups = CeilDiv(SweepRows(w), static_cast<size_t>(pattern.keep));  // one sweep per token
  return {Method::kRows, groups * static_cast<size_t>(pattern.group)};
}

template <class W>
void Multiply(const Call& call, const Kernels& kernels, const KeptLists& lists, const W& w, Method method,
              const float* bias, float* y) {
  if (method == Method::kDots) return Dots(call, kernels, lists, w, bias, y);
  if (method == Method::kPanels) return ByPanels<W>(call, kernels, lists, w, bias, y).Run();
  ByRows<W>(call, MatMulOf(kernels, w), lists, w, bias, y).Run();
}

#define NMONNX_PRODUCT(W)                                                                                    \
  template Plan PlanProduct(const Kernels&, const W&, Pattern, size_t, size_t, size_t);                      \
  template void Multiply(const Call&, const Kernels&, const KeptLists&, const W&, Method, const float*, float*);
NMONNX_PRODUCT(DenseWeight<float>)
NMONNX_PRODUCT(DenseWeight<Half>)
NMONNX_PRODUCT(BlockWeight<8>)
NMONNX_PRODUCT(BlockWeight<4>)
#undef NMONNX_PRODUCT

}  // namespace nmonnx
