// Reductions over lanes, in a fixed order.
#pragma once

#include <common/types.cuh>

namespace lorakit {

// The largest, or the sum, over the four lanes that share a row of an accumulator.
__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}
__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value + __shfl_xor_sync(kFullMask, value, 2);
}

// And over the eight that share two columns.
__device__ inline float column_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 4));
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 8));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 16));
}
__device__ inline float column_sum(float value) {
  value += __shfl_xor_sync(kFullMask, value, 4);
  value += __shfl_xor_sync(kFullMask, value, 8);
  return value + __shfl_xor_sync(kFullMask, value, 16);
}

}  // namespace lorakit
