#include "ort_guard.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "ort.h"

namespace nmonnx {
namespace {

void Expect(bool same, const char* what) {
  if (!same) {
    throw std::runtime_error(std::string("nmonnx: this build of ONNX Runtime has another binary interface (") + what +
                             " came back changed); use an official release");
  }
}

void CheckStatus(const Api& api) {
  OrtStatus* status = api.CreateStatus(ORT_INVALID_ARGUMENT, "nmonnx");
  const bool same = status && api.GetErrorCode(status) == ORT_INVALID_ARGUMENT &&
                    std::strcmp(api.GetErrorMessage(status), "nmonnx") == 0;
  api.ReleaseStatus(status);
  Expect(same, "a status");
}

// The element type differs from the rank and the dimensions, so that swapped slots show.
void CheckShapeInfo(const Api& api) {
  const int64_t dims[] = {5, 7};
  int64_t dims_back[] = {0, 0};
  size_t rank = 0;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api, api.CreateTensorTypeAndShapeInfo(&info));
  OrtStatus* status = api.SetTensorElementType(info, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
  if (!status) status = api.SetDimensions(info, dims, 2);
  if (!status) status = api.GetTensorElementType(info, &type);
  if (!status) status = api.GetDimensionsCount(info, &rank);
  if (!status) status = api.GetDimensions(info, dims_back, rank < 2 ? rank : 2);
  api.ReleaseTensorTypeAndShapeInfo(info);
  Check(api, status);
  Expect(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE && rank == 2 && dims_back[0] == 5 && dims_back[1] == 7,
         "a shape");
}

}  // namespace

OrtVersion ParseOrtVersion(const char* text) {
  char* end = nullptr;
  const long major = std::strtol(text, &end, 10);
  if (end == text || *end != '.') return {0};
  if (major > 1) return {std::numeric_limits<int32_t>::max()};
  return {major == 1 ? std::strtol(end + 1, nullptr, 10) : 0};
}

OrtStatus* RefuseOldOrt(const OrtApi* ort, const char* version) {
  const auto create = reinterpret_cast<decltype(Api::CreateStatus)>(ort->slots[0]);
  const std::string message = std::string("nmonnx needs onnxruntime 1.") + std::to_string(abi_table::kOldest) +
                              " or newer; this is " + version;
  return create(ORT_FAIL, message.c_str());
}

void CheckAbi(const Api& api) {
  CheckStatus(api);
  CheckShapeInfo(api);
}

}  // namespace nmonnx
