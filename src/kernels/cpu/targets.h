#pragma once
// Before any Highway header: which instruction sets the kernels are compiled for.
//
// x86 before AVX2 has no fused multiply-add, so it gains little over the scalar fallback, which stays. SVE and RVV have
// vectors without a size, which cannot be held in the structs that keep several accumulators; ARM runs NEON.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
