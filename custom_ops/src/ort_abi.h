// The part of ONNX Runtime's C ABI that the ops use, declared here because no package ships the official
// header everywhere. check_abi.cc compares it with that header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ort_api_table.h"

enum OrtErrorCode : int { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };

enum ONNXTensorElementDataType : int {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,  // as an op's input type: any type
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE = 11,
};

enum OrtCustomOpInputOutputCharacteristic : int { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };
enum OrtMemType : int { OrtMemTypeDefault = 0 };

struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

struct OrtApi {
  void (*slots[1])();
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
static_assert(offsetof(OrtCustomOp, ReleaseAliasMap) == 25 * sizeof(void*));

namespace nmonnx {

// The functions of the table, fetched from their slots.
struct Api {
#define NMONNX_MEMBER(slot, since, name, result, arguments) result(*name) arguments;
  NMONNX_ORT_API(NMONNX_MEMBER)
#undef NMONNX_MEMBER

  explicit Api(const OrtApi* api) {
#define NMONNX_FETCH(slot, since, name, result, arguments) \
  name = reinterpret_cast<decltype(name)>(api->slots[slot]);
    NMONNX_ORT_API(NMONNX_FETCH)
#undef NMONNX_FETCH
  }
};

namespace abi_table {
#define NMONNX_SLOT(slot, since, name, result, arguments) slot,
#define NMONNX_SINCE(slot, since, name, result, arguments) since,
constexpr int kSlots[] = {NMONNX_ORT_API(NMONNX_SLOT)};
constexpr int kSince[] = {NMONNX_ORT_API(NMONNX_SINCE)};
#undef NMONNX_SLOT
#undef NMONNX_SINCE

constexpr int kOldest = 17;  // the oldest API version that has every slot

constexpr bool IsSorted() {
  for (size_t i = 1; i < sizeof(kSlots) / sizeof(int); ++i) {
    if (kSlots[i - 1] >= kSlots[i] || kSince[i - 1] > kSince[i]) return false;
  }
  return kSince[sizeof(kSince) / sizeof(int) - 1] <= kOldest;
}
static_assert(IsSorted(), "ort_api_table.h: slots must rise, and no slot may be newer than kOldest");
}  // namespace abi_table

}  // namespace nmonnx
