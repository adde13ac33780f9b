#include "kernels/dispatch.h"

#include "kernels/portable.h"
#include "kernels/targets.h"
#include "kernels/tables.h"

#if HWY_ARCH_X86
#include <cpuid.h>
#endif

namespace nmonnx {
namespace {

#if HWY_ARCH_X86
bool HasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// What Highway's targets of these names are compiled for. __builtin_cpu_supports asks the system too.
[[maybe_unused]] bool CpuHasSSE2() { return true; }
[[maybe_unused]] bool CpuHasSSE4() {
  return __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("aes") &&
         __builtin_cpu_supports("pclmul");
}
[[maybe_unused]] bool CpuHasAVX2() {
  return CpuHasSSE4() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && HasF16c();
}
[[maybe_unused]] bool CpuHasAVX3() {
  return CpuHasAVX2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd");
}
#endif
[[maybe_unused]] bool CpuHasNEON() { return true; }
[[maybe_unused]] bool CpuHasNEON_WITHOUT_AES() { return true; }

std::vector<Kernels> Available() {
  std::vector<Kernels> tables = {PortableKernels()};
#define NMONNX_ADD(target, name)                                                                                     \
  if (CpuHas##target()) {                                                                                            \
    using namespace N_##target;                                                                                      \
    tables.push_back({name, PruneTable(), PanelTable(), MatMulTableFloat(), MatMulTableHalf(), MatMulTableInt8(),    \
                      MatMulTableInt4(), MomentTable()});                                                            \
  }
  NMONNX_TARGETS(NMONNX_ADD)
#undef NMONNX_ADD
#if HWY_TARGETS & HWY_AVX3
  if (CpuHasAVX3() && __builtin_cpu_supports("avx512vnni")) {
    Kernels table = tables.back();
    table.target = "avx3_vnni";
    table.matmul_int8 = N_AVX3::MatMulTableVnniInt8();
    table.matmul_int4 = N_AVX3::MatMulTableVnniInt4();
    tables.push_back(table);
  }
#endif
  return tables;
}

}  // namespace

const std::vector<Kernels>& AvailableKernels() {
  static const std::vector<Kernels> tables = Available();
  return tables;
}

const Kernels* FindKernels(const std::string& target) {
  const std::vector<Kernels>& tables = AvailableKernels();
  if (target.empty()) return &tables.back();
  for (const Kernels& table : tables) {
    if (target == table.target) return &table;
  }
  return nullptr;
}

}  // namespace nmonnx
