// Compiled only where CMake finds the official header: every slot and signature of our table against it.
#include <onnxruntime_c_api.h>

#include <type_traits>

#include "ort_api_table.h"

template <class F>
struct Plain;
template <class R, class... A>
struct Plain<R (*)(A...)> {
  using type = R (*)(A...);
};
template <class R, class... A>
struct Plain<R (*)(A...) noexcept> {
  using type = R (*)(A...);
};

#define NMONNX_CHECK(slot, since, name, result, arguments)                                  \
  static_assert(offsetof(OrtApi, name) == (slot) * sizeof(void*), #name ": wrong slot");    \
  static_assert(std::is_same_v<Plain<decltype(OrtApi::name)>::type, result(*) arguments>,   \
                #name ": wrong signature");
NMONNX_ORT_API(NMONNX_CHECK)

static_assert(offsetof(OrtCustomOp, KernelComputeV2) == 18 * sizeof(void*));
static_assert(offsetof(OrtCustomOp, ReleaseAliasMap) == 25 * sizeof(void*));
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == 1 && ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 == 2 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 == 3 && ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 == 6 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == 7 && ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == 10 &&
              ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE == 11 && ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL == 9);
static_assert(ORT_INVALID_ARGUMENT == 2 && INPUT_OUTPUT_OPTIONAL == 1);
