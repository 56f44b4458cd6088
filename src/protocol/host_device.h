#pragma once
// Marks arithmetic that kernels and the CPU engine share.
#ifdef __CUDACC__
#define TY_HOST_DEVICE __host__ __device__
#else
#define TY_HOST_DEVICE
#endif
