// Scalar types and the few functions every kernel needs. All arithmetic is float32; T is only storage.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lorakit {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline float infinity() { return __int_as_float(0x7f800000); }

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest even, the one rounding of an op.
template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// kCount elements moved by one load or store.
template <typename T, int kCount>
struct __align__(sizeof(T) * kCount) Vector {
  static_assert(sizeof(T) * kCount <= 16, "one load moves at most 16 bytes");
  T at[kCount];
};

// Two at once, which is one instruction for 16-bit types.
template <typename T>
__device__ Vector<T, 2> round_pair(float first, float second) {
  return {{from_float<T>(first), from_float<T>(second)}};
}
template <>
__device__ inline Vector<__half, 2> round_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return {{pair.x, pair.y}};
}
template <>
__device__ inline Vector<__nv_bfloat16, 2> round_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return {{pair.x, pair.y}};
}

template <typename T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<__half> = true;

template <typename T>
constexpr int kPer16Bytes = 16 / int(sizeof(T));

}  // namespace lorakit
