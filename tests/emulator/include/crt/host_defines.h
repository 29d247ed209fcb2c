// Stands in for NVIDIA's header of this name, which their runtime wheel lacks: CUDA's keywords for g++.
#pragma once

#define __host__
#define __device__
#define __global__ static  // else g++ 14 refuses static shared memory of templates in a section with others
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Static shared memory: one copy, because blocks run one after another. A section of its own lets the
// runtime fill it with NaN before each block.
#define __shared__ static __attribute__((section("emulator_shared")))

// Names that NVIDIA's headers use.
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __inline_hint__
#define __specialization_static static
#define CUDARTAPI
#define CUDARTAPI_CDECL
