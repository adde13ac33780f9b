// The SIMD targets that are built. Included by the kernels before and after Highway's foreach_target.h.

// Only levels that make a difference for these kernels. Scalable vectors (SVE) cannot live in the arrays of
// the sorting network; such CPUs run NEON. Highway's own scalar targets are not used: portable.cc is ours.
#include <hwy/detect_compiler_arch.h>
#ifndef HWY_DISABLED_TARGETS
#if HWY_ARCH_X86
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | NMONNX_NEWER_TARGETS)
#elif HWY_ARCH_ARM
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#endif
#endif
#include <hwy/detect_targets.h>

#ifndef NMONNX_TARGETS

// Known only after the header has been read; HWY_DISABLED_TARGETS is expanded where it is used.
#ifdef HWY_AVX3_ZEN4
#define NMONNX_NEWER_TARGETS (HWY_AVX3_ZEN4 | HWY_AVX3_SPR)
#else
#define NMONNX_NEWER_TARGETS 0
#endif

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
#if HWY_TARGETS & HWY_NEON
#define NMONNX_NEON(X) X(NEON, "neon")
#else
#define NMONNX_NEON(X)
#endif
// Slowest first.
#define NMONNX_TARGETS(X) NMONNX_SSE2(X) NMONNX_SSE4(X) NMONNX_AVX2(X) NMONNX_AVX3(X) NMONNX_NEON(X)

#endif
