// The SIMD targets that are built. Included by the kernels before and after Highway's foreach_target.h.

// Only levels that make a difference for these kernels. Scalable vectors (SVE) cannot live in the arrays of
// the sorting network; such CPUs run NEON. Highway's own scalar targets are not used (portable.cc is ours), but they
// may be all that the flags of the compiler promise.
#include <hwy/detect_compiler_arch.h>
#if !defined(HWY_DISABLED_TARGETS) && (HWY_ARCH_X86 || HWY_ARCH_ARM)
#define HWY_DISABLED_TARGETS NMONNX_UNUSED_TARGETS  // expanded where it is used: known once the header has been read
#endif
#include <hwy/detect_targets.h>

#ifndef NMONNX_TARGETS

#ifdef HWY_SSE2  // not in the oldest releases
#define NMONNX_X86_TARGETS (HWY_SSE2 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3)
#else
#define NMONNX_X86_TARGETS (HWY_SSE4 | HWY_AVX2 | HWY_AVX3)
#endif
#ifdef HWY_NEON_WITHOUT_AES  // newer releases also have NEON with AES, and with bfloat16
#define NMONNX_NEON_TARGET HWY_NEON_WITHOUT_AES
#else
#define NMONNX_NEON_TARGET HWY_NEON
#endif
#define NMONNX_UNUSED_TARGETS (~(NMONNX_X86_TARGETS | NMONNX_NEON_TARGET | HWY_SCALAR | HWY_EMU128))

#if HWY_TARGETS & HWY_SSE2
#define NMONNX_SSE2(X) X(SSE2, "sse2")
#else
#define NMONNX_SSE2(X)
#endif
#if HWY_TARGETS & HWY_SSE4
#define NMONNX_SSE4(X) X(SSE4, "sse4")
#else
#define NMONNX_SSE4(X)
#endif
#if HWY_TARGETS & HWY_AVX2
#define NMONNX_AVX2(X) X(AVX2, "avx2")
#else
#define NMONNX_AVX2(X)
#endif
#if HWY_TARGETS & HWY_AVX3
#define NMONNX_AVX3(X) X(AVX3, "avx3")
#else
#define NMONNX_AVX3(X)
#endif
#if !(HWY_TARGETS & NMONNX_NEON_TARGET)
#define NMONNX_NEON(X)
#elif defined(HWY_NEON_WITHOUT_AES)
#define NMONNX_NEON(X) X(NEON_WITHOUT_AES, "neon")
#else
#define NMONNX_NEON(X) X(NEON, "neon")
#endif
// Slowest first.
#define NMONNX_TARGETS(X) NMONNX_SSE2(X) NMONNX_SSE4(X) NMONNX_AVX2(X) NMONNX_AVX3(X) NMONNX_NEON(X)

#endif
