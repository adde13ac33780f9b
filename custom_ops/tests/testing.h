// What the test program of the kernels is written with.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "kernels/dispatch.h"
#include "kernels/portable.h"

namespace nmonnx {

inline std::mt19937 random_bits(1);

// A heap block of exactly `count` values that starts `offset` values into its allocation.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count, size_t offset = 0)
      : count_(count), block_(new T[offset + count]()), data_(block_.get() + offset) {}
  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  size_t count_;
  std::unique_ptr<T[]> block_;
  T* data_;
};

// Says what failed, as printf does, and ends the program.
__attribute__((format(printf, 2, 3))) inline void Require(bool condition, const char* format, ...) {
  if (condition) return;
  std::printf("FAILED ");
  va_list values;
  va_start(values, format);
  std::vprintf(format, values);
  va_end(values);
  std::printf("\n");
  std::exit(1);
}

// The tests of the products of every type of W, in matmul_test.cc.
void TestMatMuls(const Kernels& kernels);

}  // namespace nmonnx
