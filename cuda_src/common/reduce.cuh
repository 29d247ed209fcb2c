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

}  // namespace lorakit
