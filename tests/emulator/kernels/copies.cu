// cp.async through a ring of two buffers, with the number of groups that may be pending as a parameter.
#include <common/ptx.cuh>
#include <common/shared.cuh>

namespace lorakit {

// out [steps, 4 * threads] = x, each thread reading what its neighbour copied. kPending = 1 is right.
template <int kPending, bool kBarrier>
__global__ void pipeline_kernel(float* out, const float* x, int steps) {
  SharedMemory memory;
  int width = 4 * blockDim.x;
  float* ring = memory.take<float>(2 * width);
  auto fetch = [&](int step) {
    if (step < steps) cp_async_16(&ring[step % 2 * width + 4 * threadIdx.x], &x[step * width + 4 * threadIdx.x], 16);
    cp_async_commit();
  };
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    fetch(step + 1);
    cp_async_wait<kPending>();
    if (kBarrier) __syncthreads();
    for (int i = 0; i < 4; ++i) {
      int column = (4 * threadIdx.x + 4 + i) % width;
      out[step * width + column] = ring[step % 2 * width + column];
    }
    __syncthreads();  // the buffer is free again
  }
  cp_async_wait<0>();
}

// Copies `source_bytes` of 16 and fills up with zeros; reads once before the wait and once after it.
__global__ void poison_kernel(float* before, float* after, const float* x, int source_bytes) {
  __shared__ __align__(16) float buffer[4];
  cp_async_16(buffer, x, source_bytes);
  cp_async_commit();
  for (int i = 0; i < 4; ++i) before[i] = buffer[i];
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) after[i] = buffer[i];
}

__global__ void forgotten_kernel(const float* x) {
  __shared__ __align__(16) float buffer[4];
  cp_async_16(buffer, x, 16);
}

}  // namespace lorakit
