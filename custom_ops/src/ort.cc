#include "ort.h"

namespace nmonnx {

std::string ToString(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

size_t Elements(const Dims& dims) {
  size_t count = 1;
  for (const int64_t dim : dims) count *= static_cast<size_t>(dim);
  return count;
}

size_t Tensor::Count() const { return Elements(dims); }

void Check(const Api& api, OrtStatus* status) {
  if (!status) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

Call::Call(const Api& api, OrtKernelContext* context) : api_(api), context_(context) {
  Check(api_, api_.KernelContext_GetInputCount(context_, &inputs_));
}

Tensor Call::Input(size_t index) const {
  std::optional<Tensor> tensor = OptionalInput(index);
  if (!tensor) throw Refusal("input " + std::to_string(index) + " is required but was not given");
  return *std::move(tensor);
}

std::optional<Tensor> Call::OptionalInput(size_t index) const {
  if (index >= inputs_) return std::nullopt;
  const OrtValue* value = nullptr;
  Check(api_, api_.KernelContext_GetInput(context_, index, &value));
  if (!value) return std::nullopt;
  Tensor tensor{};
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api_, api_.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api_.GetTensorElementType(info, &tensor.type);
  size_t rank = 0;
  if (!status) status = api_.GetDimensionsCount(info, &rank);
  tensor.dims.resize(rank);
  if (!status) status = api_.GetDimensions(info, tensor.dims.data(), rank);
  api_.ReleaseTensorTypeAndShapeInfo(info);
  Check(api_, status);
  Check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

void* Call::Output(const Dims& dims) const { return OptionalOutput(0, dims); }

void* Call::OptionalOutput(size_t index, const Dims& dims) const {
  OrtValue* value = nullptr;
  Check(api_, api_.KernelContext_GetOutput(context_, index, dims.data(), dims.size(), &value));
  if (!value) return nullptr;
  void* data = nullptr;
  Check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

void Call::RunParallel(void (*run)(void*, size_t), size_t count, void* data) const {
  Check(api_, api_.KernelContext_ParallelFor(context_, run, count, 0, data));
}

}  // namespace nmonnx
