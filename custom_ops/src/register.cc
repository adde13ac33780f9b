// RegisterCustomOps: the only symbol of the library.

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <optional>

#include "kernels/dispatch.h"
#include "ops.h"
#include "ort.h"
#include "ort_guard.h"

namespace nmonnx {
namespace {

constexpr const char* kDomain = "ai.nmonnx";
constexpr int64_t kMaxCount = int64_t{1} << 40;
constexpr int64_t kNewestCustomOp = 18;  // the version of OrtCustomOp that ort_abi.h declares
constexpr int64_t kSafeInference = 24;   // before it, ORT's shape inference crashes on an input with an empty name

uint32_t UsableApi(OrtVersion version) { return static_cast<uint32_t>(std::min(version.api, kNewestCustomOp)); }

struct Library;

struct Op : OrtCustomOp {
  Op(const Library& library, OpSpec spec, OrtVersion ort);

  const Library& library;
  const OpSpec spec;
};

struct Kernel {
  const Op& op;
  const Attributes attributes;
};

// What one copy of ORT in the process, and one choice of kernels, needs. Sessions refer to it until the end of
// the process, so it is never freed.
struct Library {
  Library(const OrtApi* ort, OrtVersion version, const Kernels& kernels);

  const Api api;
  const Kernels& kernels;
  std::deque<Op> ops;
  OrtCustomOpDomain* domain = nullptr;
};

const Op& Self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

std::optional<int64_t> FindAttribute(const Op& op, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  const Api& api = op.library.api;
  OrtStatus* status = api.KernelInfoGetAttribute_int64(info, name, &value);
  if (!status) return value;
  api.ReleaseStatus(status);
  return std::nullopt;
}

int64_t ReadAttribute(const Op& op, const OrtKernelInfo* info, const char* name) {
  const std::optional<int64_t> value = FindAttribute(op, info, name);
  if (!value) throw Refusal(std::string(op.spec.name) + ": the integer attribute '" + name + "' is missing");
  return *value;
}

// An attribute that says 0 where it is absent, and is at most `highest`.
int64_t ReadChoice(const Op& op, const OrtKernelInfo* info, const char* name, int64_t highest) {
  const int64_t value = FindAttribute(op, info, name).value_or(0);
  if (value >= 0 && value <= highest) return value;
  throw Refusal(std::string(op.spec.name) + ": the attribute '" + name + "' is " + std::to_string(value) +
                "; it must be 0 to " + std::to_string(highest));
}

OrtStatus* CreateKernel(const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const Op& op = Self(self);
  return Guarded(op.library.api, [&] {
    const int64_t keep = ReadAttribute(op, info, "keep");
    const int64_t group = ReadAttribute(op, info, "group");
    if (group < 1 || group > kMaxGroup || keep < 1 || keep > group) {
      throw Refusal(std::string(op.spec.name) + ": cannot keep " + std::to_string(keep) + " of every " +
                    std::to_string(group) + " channels; 'group' must be 1 to " + std::to_string(kMaxGroup) +
                    " and 'keep' 1 to 'group'");
    }
    const Correction correction{ReadChoice(op, info, "variance", 1) == 1,
                                static_cast<Center>(ReadChoice(op, info, "center", 2))};
    const int64_t panel_tokens = ReadChoice(op, info, "panel_tokens", kMaxCount);
    *kernel = new Kernel{op,
                         {{static_cast<int>(keep), static_cast<int>(group)},
                          correction,
                          ReadChoice(op, info, "bits", 8),
                          ReadChoice(op, info, "block_size", kMaxCount),
                          ReadChoice(op, info, "accuracy_level", 4),
                          static_cast<size_t>(panel_tokens)}};
  });
}

OrtStatus* Compute(void* kernel, OrtKernelContext* context) {
  const Kernel& self = *static_cast<const Kernel*>(kernel);
  const Library& library = self.op.library;
  return Guarded(library.api, [&] {
    self.op.spec.compute(Call(library.api, context), self.attributes, library.kernels);
  });
}

struct Shape {
  ONNXTensorElementDataType type;
  Dims dims;
  std::vector<const char*> names;
};

// ORT reports a shape it does not know as that of a scalar.
Shape InputShape(const Api& api, const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // stays ORT's
  Check(api, api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  Check(api, api.GetDimensionsCount(info, &rank));
  Shape shape{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, Dims(rank), std::vector<const char*>(rank)};
  Check(api, api.GetTensorElementType(info, &shape.type));
  Check(api, api.GetDimensions(info, shape.dims.data(), rank));
  Check(api, api.GetSymbolicDimensions(info, shape.names.data(), rank));
  return shape;
}

// ORT asks the first overload of a name for all of them: the type of the output is that of x, not of the overload.
// The second output of NMPrune is left alone: ORT does not say whether the node has one, and does not check.
OrtStatus* InferShape(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const Op& op = Self(self);
  const Api& api = op.library.api;
  return Guarded(api, [&] {
    Shape shape = InputShape(api, context, 0);
    if (shape.dims.empty()) return;
    if (op.spec.columns_of != 0) {
      const Shape weight = InputShape(api, context, op.spec.columns_of);
      if (weight.dims.size() != 2) return;
      shape.dims.back() = weight.dims[1];
      shape.names.back() = weight.names[1];
    }
    for (size_t i = 0; i < shape.dims.size(); ++i) {
      if (shape.dims[i] < 0 && !*shape.names[i]) return;  // neither a number nor a name: cannot be passed on
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Check(api, api.CreateTensorTypeAndShapeInfo(&info));
    OrtStatus* status = api.SetTensorElementType(info, shape.type);
    if (!status) status = api.SetDimensions(info, shape.dims.data(), shape.dims.size());
    if (!status) status = api.SetSymbolicDimensions(info, shape.names.data(), shape.names.size());
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
    api.ReleaseTensorTypeAndShapeInfo(info);
    Check(api, status);
  });
}

Op::Op(const Library& owner, OpSpec description, OrtVersion ort)
    : OrtCustomOp{}, library(owner), spec(std::move(description)) {
  version = UsableApi(ort);
  GetName = [](const OrtCustomOp* op) { return Self(op).spec.name; };
  GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  GetInputType = [](const OrtCustomOp* op, size_t i) { return Self(op).spec.inputs[i]; };
  GetInputTypeCount = [](const OrtCustomOp* op) { return Self(op).spec.inputs.size(); };
  GetOutputType = [](const OrtCustomOp* op, size_t i) { return Self(op).spec.outputs[i]; };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return Self(op).spec.outputs.size(); };
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return i < Self(op).spec.required_inputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  CreateKernelV2 = nmonnx::CreateKernel;
  KernelComputeV2 = Compute;
  InferOutputShapeFn = ort.api >= kSafeInference ? InferShape : nullptr;
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
  static int first[] = {0};
  GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    *inputs = *outputs = first;
    return 1;
  };
  ReleaseMayInplace = [](int*, int*) {};
  if (!spec.may_inplace) {
    GetMayInplace = [](int**, int**) -> size_t { return 0; };
  }
  GetAliasMap = [](int**, int**) -> size_t { return 0; };
  ReleaseAliasMap = [](int*, int*) {};
}

Library::Library(const OrtApi* ort, OrtVersion version, const Kernels& chosen) : api(ort), kernels(chosen) {
  CheckAbi(api);
  for (const auto& list : {PruneOps(), MatMulOps(), MatMulNBitsOps()}) {
    for (const OpSpec& spec : list) ops.emplace_back(*this, spec, version);
  }
  Check(api, api.CreateCustomOpDomain(kDomain, &domain));
  for (const Op& op : ops) Check(api, api.CustomOpDomain_Add(domain, &op));
}

const Kernels& ChosenKernels() {
  const char* name = std::getenv("NMONNX_TARGET");
  const Kernels* kernels = FindKernels(name ? name : "");
  if (kernels) return *kernels;
  std::string known;
  for (const Kernels& table : AvailableKernels()) known += std::string(" ") + table.target;
  throw Refusal("NMONNX_TARGET='" + std::string(name) + "' is not a SIMD target of this CPU; these are:" + known);
}

const Library& LibraryOf(const OrtApiBase* base, const OrtApi* ort, OrtVersion version) {
  static std::mutex mutex;
  static auto* libraries = new std::map<std::pair<const OrtApiBase*, const Kernels*>, Library*>();
  const Kernels& kernels = ChosenKernels();
  const std::lock_guard<std::mutex> lock(mutex);
  Library*& library = (*libraries)[{base, &kernels}];
  if (!library) library = new Library(ort, version, kernels);
  return *library;
}

}  // namespace
}  // namespace nmonnx

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace nmonnx;
  const OrtVersion version = ParseOrtVersion(base->GetVersionString());
  const OrtApi* ort = base->GetApi(UsableApi(version));
  if (!ort) return nullptr;
  if (version.api < abi_table::kOldest) return RefuseOldOrt(ort, base->GetVersionString());
  const Api api(ort);
  return Guarded(api, [&] {
    const Library& library = LibraryOf(base, ort, version);
    Check(api, api.AddCustomOpDomain(options, library.domain));
  });
}
