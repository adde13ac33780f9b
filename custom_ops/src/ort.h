// ONNX Runtime as the ops see it: one call with its tensors, its output and its thread pool.
#pragma once

#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace nmonnx {

// Ends a call with one sentence for the user.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Dims = std::vector<int64_t>;

std::string ToString(const Dims& dims);
size_t Elements(const Dims& dims);

// A tensor that ORT owns.
struct Tensor {
  ONNXTensorElementDataType type;
  Dims dims;
  void* data;

  size_t Count() const;
  template <class T>
  T* As() const {
    return static_cast<T*>(data);
  }
};

// Throws what a failed API function said.
void Check(const Api& api, OrtStatus* status);

// Runs `body`; what it throws becomes a status.
template <class Body>
OrtStatus* Guarded(const Api& api, Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const Refusal& e) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "nmonnx: out of memory");
  } catch (const std::exception& e) {
    return api.CreateStatus(ORT_FAIL, e.what());
  }
}

// One run of an op.
class Call {
 public:
  Call(const Api& api, OrtKernelContext* context);

  Tensor Input(size_t index) const;
  // Nothing where the input is absent or has an empty name.
  std::optional<Tensor> OptionalInput(size_t index) const;
  void* Output(const Dims& dims) const;
  // nullptr where nothing reads the output.
  void* OptionalOutput(size_t index, const Dims& dims) const;

  // Runs task(0) .. task(count - 1) on the session's threads.
  template <class Task>
  void ParallelFor(size_t count, Task&& task) const {
    if (count == 1) return task(size_t{0});
    Parallel<Task> parallel{task, {}, nullptr};
    RunParallel(&Parallel<Task>::Run, count, &parallel);
    if (parallel.error) std::rethrow_exception(parallel.error);
  }

 private:
  template <class Task>
  struct Parallel {
    Task& task;
    std::mutex mutex;
    std::exception_ptr error;

    static void Run(void* data, size_t index) {
      auto* self = static_cast<Parallel*>(data);
      try {
        self->task(index);
      } catch (...) {  // must not unwind through ORT's threads
        const std::lock_guard<std::mutex> lock(self->mutex);
        self->error = std::current_exception();
      }
    }
  };

  void RunParallel(void (*run)(void*, size_t), size_t count, void* data) const;

  const Api& api_;
  OrtKernelContext* context_;
  size_t inputs_ = 0;
};

}  // namespace nmonnx
