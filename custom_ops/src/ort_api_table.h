// The functions of ONNX Runtime's C API that the ops use: X(slot, since, name, return type, arguments).
// `slot` is the index in OrtApi, `since` the API version that added it. The ABI only ever grows, so a slot
// never changes its meaning. Sorted by slot.
#pragma once

#define NMONNX_ORT_API(X)                                                                                    \
  X(0, 1, CreateStatus, OrtStatus*, (OrtErrorCode code, const char* message))                                \
  X(1, 1, GetErrorCode, OrtErrorCode, (const OrtStatus* status))                                             \
  X(2, 1, GetErrorMessage, const char*, (const OrtStatus* status))                                           \
  X(26, 1, CreateCustomOpDomain, OrtStatus*, (const char* domain, OrtCustomOpDomain** out))                  \
  X(27, 1, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain * domain, const OrtCustomOp* op))              \
  X(28, 1, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions * options, OrtCustomOpDomain* domain))          \
  X(51, 1, GetTensorMutableData, OrtStatus*, (OrtValue * value, void** out))                                 \
  X(57, 1, CreateTensorTypeAndShapeInfo, OrtStatus*, (OrtTensorTypeAndShapeInfo * *out))                     \
  X(58, 1, SetTensorElementType, OrtStatus*,                                                                 \
    (OrtTensorTypeAndShapeInfo * info, ONNXTensorElementDataType type))                                      \
  X(59, 1, SetDimensions, OrtStatus*,                                                                        \
    (OrtTensorTypeAndShapeInfo * info, const int64_t* dims, size_t count))                                   \
  X(60, 1, GetTensorElementType, OrtStatus*,                                                                 \
    (const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* out))                                 \
  X(61, 1, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, size_t* out))             \
  X(62, 1, GetDimensions, OrtStatus*,                                                                        \
    (const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count))                                    \
  X(63, 1, GetSymbolicDimensions, OrtStatus*,                                                                \
    (const OrtTensorTypeAndShapeInfo* info, const char** names, size_t count))                               \
  X(65, 1, GetTensorTypeAndShape, OrtStatus*, (const OrtValue* value, OrtTensorTypeAndShapeInfo** out))      \
  X(86, 1, KernelInfoGetAttribute_int64, OrtStatus*,                                                         \
    (const OrtKernelInfo* info, const char* name, int64_t* out))                                             \
  X(88, 1, KernelContext_GetInputCount, OrtStatus*, (const OrtKernelContext* context, size_t* out))          \
  X(90, 1, KernelContext_GetInput, OrtStatus*,                                                               \
    (const OrtKernelContext* context, size_t index, const OrtValue** out))                                   \
  X(91, 1, KernelContext_GetOutput, OrtStatus*,                                                              \
    (OrtKernelContext * context, size_t index, const int64_t* dims, size_t count, OrtValue** out))           \
  X(93, 1, ReleaseStatus, void, (OrtStatus * status))                                                        \
  X(99, 1, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo * info))                          \
  X(267, 17, ShapeInferContext_GetInputCount, OrtStatus*,                                                    \
    (const OrtShapeInferContext* context, size_t* out))                                                      \
  X(268, 17, ShapeInferContext_GetInputTypeShape, OrtStatus*,                                                \
    (const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** out))                    \
  X(270, 17, ShapeInferContext_SetOutputTypeShape, OrtStatus*,                                               \
    (const OrtShapeInferContext* context, size_t index, const OrtTensorTypeAndShapeInfo* info))              \
  X(271, 17, SetSymbolicDimensions, OrtStatus*,                                                              \
    (OrtTensorTypeAndShapeInfo * info, const char** names, size_t count))                                    \
  X(274, 17, KernelContext_ParallelFor, OrtStatus*,                                                          \
    (const OrtKernelContext* context, void (*task)(void*, size_t), size_t total, size_t batches, void* data))
