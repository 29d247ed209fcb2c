// Undefined behaviour that a CPU forgives and a GPU may not.
#include <common/ptx.cuh>
#include <common/shared.cuh>

namespace lorakit {

// A vector of 16 bytes at an odd element.
__global__ void misaligned_kernel(float* x, int offset) {
  *reinterpret_cast<float4*>(x + offset) = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
}

__global__ void index_kernel(int* out, int index) {
  int array[4] = {1, 2, 3, 4};
  out[0] = array[index];
}

__global__ void shift_kernel(int* out, int bits) { out[0] = 1 << bits; }

// Waits for what no other thread will do.
__global__ void endless_kernel(volatile int* flag) {
  while (*flag == 0) {
  }
}

__global__ void division_kernel(int* out, int divisor) { out[0] = 100 / divisor; }

// Writes far from any array.
__global__ void wild_kernel(float* x) { x[1ll << 40] = 1.0f; }

// Copies `bytes` of 16 from `offset` elements into x.
__global__ void copy_kernel(float* x, int offset, int bytes) {
  SharedMemory memory;
  float* array = memory.take<float>(4);
  cp_async_16(array, x + offset, bytes);
  cp_async_commit();
  cp_async_wait<0>();
  x[0] = array[0];
}

}  // namespace lorakit
