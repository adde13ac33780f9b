// NMPrune(x, scale?, shift?, order?, dense?) -> y, center?: y is x - shift - center with all but the best channels of
// each group zero, times nu where the attribute `variance` asks for it. A token that is `dense` keeps all its channels.

#include <algorithm>
#include <vector>

#include "kernels/portable.h"
#include "ops.h"

namespace nmonnx {
namespace {

constexpr size_t kChunk = 4096;       // channels selected, then written, while they are in the L1 cache
constexpr size_t kTaskSize = 1 << 16;  // channels a task handles at least

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr auto kOnnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
};
template <>
struct Type<Half> {
  static constexpr auto kOnnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
};
template <>
struct Type<double> {
  static constexpr auto kOnnx = ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
};

void Apply(const PruneKernels& kernels, const float* x, const uint64_t* bits, size_t count, float* y) {
  kernels.apply_f32(x, bits, count, y);
}
void Apply(const PruneKernels& kernels, const Half* x, const uint64_t* bits, size_t count, Half* y) {
  kernels.apply_f16(x, bits, count, y);
}
void Apply(const PruneKernels&, const double* x, const uint64_t* bits, size_t count, double* y) {
  PortableApply(x, bits, count, y);
}

// y = x - shift - center of the token that was selected last, rounded to the type of x.
void Move(const PruneKernels&, const Selector& selector, const std::vector<float>&, const float*, size_t channels,
          float* y) {
  std::copy(selector.moved(), selector.moved() + channels, y);
}
void Move(const PruneKernels& kernels, const Selector& selector, const std::vector<float>&, const Half*,
          size_t channels, Half* y) {
  kernels.narrow(selector.moved(), channels, y);
}
void Move(const PruneKernels&, const Selector& selector, const std::vector<float>& shift, const double* x,
          size_t channels, double* y) {
  const double center = selector.center();
  for (size_t k = 0; k < channels; ++k) y[k] = (shift.empty() ? x[k] : x[k] - static_cast<double>(shift[k])) - center;
}

void Put(float value, float& to) { to = value; }
void Put(float value, Half& to) { to = Narrow(value); }
void Put(float value, double& to) { to = value; }

// y = nu times the kept values of z, which may lie where y does.
class Rescaler {
 public:
  Rescaler(const Kernels& kernels, bool needed, size_t channels)
      : kernels_(kernels), channels_(channels), z_(needed ? channels : 0), kept_(needed ? channels : 0) {}

  void Run(const float* z, const uint64_t* bits, float* y) {
    const float nu = VarianceRatio(kernels_, z, bits, channels_, kept_.data());
    for (size_t k = 0; k < channels_; ++k) y[k] = kept_[k] * nu;
  }
  void Run(const Half* z, const uint64_t* bits, Half* y) {
    kernels_.prune.widen(z, channels_, z_.data());
    const float nu = VarianceRatio(kernels_, z_.data(), bits, channels_, kept_.data());
    for (float& value : kept_) value *= nu;
    kernels_.prune.narrow(kept_.data(), channels_, y);
  }
  void Run(const double* z, const uint64_t* bits, double* y) {
    std::vector<double> kept(channels_);
    PortableApply(z, bits, channels_, kept.data());
    const double nu = VarianceRatio(z, kept.data(), channels_);
    for (size_t k = 0; k < channels_; ++k) y[k] = kept[k] * nu;
  }

 private:
  const Kernels& kernels_;
  const size_t channels_;
  std::vector<float> z_, kept_;
};

// Tokens do not matter where groups never cross them: `count` channels as one long token.
template <class T>
void PruneFlat(const Call& call, Pattern pattern, const Kernels& kernels, const T* x, size_t count, T* y) {
  const size_t group = static_cast<size_t>(pattern.group);
  const size_t chunk = kChunk / group * group;
  const size_t chunks = (count + chunk - 1) / chunk;
  const size_t chunks_per_task = std::max<size_t>(1, kTaskSize / chunk);
  const Criterion plain;
  call.ParallelFor((chunks + chunks_per_task - 1) / chunks_per_task, [&](size_t task) {
    Selector whole(kernels, pattern, plain, chunk);
    const size_t end = std::min(count, (task + 1) * chunks_per_task * chunk);
    size_t i = task * chunks_per_task * chunk;
    for (; i + chunk <= end; i += chunk) Apply(kernels.prune, x + i, whole.Select(x + i), chunk, y + i);
    if (i == end) return;
    Selector rest(kernels, pattern, plain, end - i);
    Apply(kernels.prune, x + i, rest.Select(x + i), end - i, y + i);
  });
}

template <class T>
void PruneTokens(const Call& call, Pattern pattern, const Kernels& kernels, const Criterion& criterion,
                 const DenseTokens& dense, const T* x, size_t tokens, size_t channels, T* y, T* centers) {
  const size_t tokens_per_task = std::max<size_t>(1, kTaskSize / channels);
  call.ParallelFor((tokens + tokens_per_task - 1) / tokens_per_task, [&](size_t task) {
    Selector selector(kernels, pattern, criterion, channels);
    Rescaler rescaler(kernels, criterion.correction.variance, channels);
    const size_t end = std::min(tokens, (task + 1) * tokens_per_task);
    for (size_t t = task * tokens_per_task; t < end; ++t) {
      const T* from = x + t * channels;
      T* to = y + t * channels;
      const uint64_t* bits = dense(t) ? selector.SelectAll(from) : selector.Select(from);
      if (centers) Put(selector.center(), centers[t]);
      if (criterion.MovesValues()) {
        Move(kernels.prune, selector, criterion.shift, from, channels, to);
        from = to;
      }
      if (criterion.correction.variance) {
        rescaler.Run(from, bits, to);
      } else {
        Apply(kernels.prune, from, bits, channels, to);
      }
    }
  });
}

template <class T>
void Prune(const Call& call, const Attributes& attributes, const Kernels& kernels) {
  const Pattern pattern = attributes.pattern;
  const Tensor x = call.Input(0);
  if (x.dims.empty()) throw Refusal("NMPrune: x is a scalar; its last axis must be the channels");
  const size_t channels = static_cast<size_t>(x.dims.back());
  Dims one_each = x.dims;
  one_each.back() = 1;
  const size_t tokens = Elements(one_each);
  const Criterion criterion = ReadCriterion(call, 1, channels, attributes.correction);
  const DenseTokens dense = ReadDense(call, 4, tokens);
  T* y = static_cast<T*>(call.Output(x.dims));
  T* centers = static_cast<T*>(call.OptionalOutput(1, one_each));
  const size_t count = x.Count();
  if (centers) std::fill(centers, centers + tokens, T{0});
  if (count == 0) return;
  if (criterion.IsPlain() && !dense.AnyOf(tokens) &&
      (channels % static_cast<size_t>(pattern.group) == 0 || count == channels)) {
    PruneFlat(call, pattern, kernels, x.As<T>(), count, y);
  } else {
    PruneTokens(call, pattern, kernels, criterion, dense, x.As<T>(), tokens, channels, y, centers);
  }
}

template <class T>
OpSpec Spec() {
  return {"NMPrune",
          {Type<T>::kOnnx, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
           ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
          1, {Type<T>::kOnnx, Type<T>::kOnnx}, true, 0, Prune<T>};
}

}  // namespace

std::vector<OpSpec> PruneOps() { return {Spec<float>(), Spec<Half>(), Spec<double>()}; }

}  // namespace nmonnx
