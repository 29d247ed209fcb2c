// Barriers, shuffles, votes, atomics and shared memory, used well and badly.
#include <common/ptx.cuh>
#include <common/shared.cuh>

namespace lorakit {

// out [blocks] = the sum of each block's `width` elements of x, by a tree in static shared memory.
__global__ void tree_sum_kernel(float* out, const float* x) {
  __shared__ float partial[256];
  partial[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}

// Adds x [threads] up with atomics of each type.
__global__ void atomics_kernel(float* sum, int* count, unsigned* bits, const float* x) {
  atomicAdd(sum, x[threadIdx.x]);
  atomicAdd(count, 1);
  atomicOr(bits, 1u << threadIdx.x % 32);
}

// out [5, 32]: what a warp's shuffles give, of lane numbers.
__global__ void shuffles_kernel(int* out) {
  int lane = threadIdx.x;
  out[0 * 32 + lane] = __shfl_sync(0xffffffffu, lane, 5, 8);
  out[1 * 32 + lane] = __shfl_xor_sync(0xffffffffu, lane, 3);
  out[2 * 32 + lane] = __shfl_down_sync(0xffffffffu, lane, 2, 16);
  out[3 * 32 + lane] = int(__shfl_down_sync(0xffffffffu, float(lane), 1));
  // Half-warps apart from each other.
  unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) {
    out[4 * 32 + lane] = __shfl_xor_sync(half, 100 + lane, 8);
  } else {
    out[4 * 32 + lane] = __shfl_xor_sync(half, 200 + lane, 1);
  }
}

__global__ void votes_kernel(unsigned* out) {
  int lane = threadIdx.x;
  unsigned odd = __ballot_sync(0xffffffffu, lane % 2);
  int any = __any_sync(0xffffffffu, lane == 7), all = __all_sync(0xffffffffu, lane < 31);
  if (lane == 0) {
    out[0] = odd;
    out[1] = any;
    out[2] = all;
  }
}

// out [2, threads]: dynamic and static shared memory that nobody wrote; the launch's second block sees none
// of what the first one left.
__global__ void uninitialised_kernel(float* out) {
  __shared__ float fixed[64];
  SharedMemory memory;
  float* array = memory.take<float>(64);
  out[threadIdx.x] = fixed[threadIdx.x];
  out[blockDim.x + threadIdx.x] = array[threadIdx.x];
  fixed[threadIdx.x] = array[threadIdx.x] = 1.0f;
}

// Threads that return early; the others' barrier does not wait for them.
__global__ void early_return_kernel(int* out, int threads) {
  __shared__ int value;
  if (threadIdx.x >= threads) return;
  if (threadIdx.x == threads - 1) value = 42;
  __syncthreads();
  out[threadIdx.x] = value;
}

// Each round, a thread reads what its successor wrote; the last one reads its own. Without the second barrier
// a fast thread overwrites what a slow one has not read yet, which never happens when threads run in order.
template <bool kSecondBarrier>
__global__ void neighbour_kernel(int* out, int rounds) {
  __shared__ int slots[64];
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    slots[threadIdx.x] = round * 1000 + threadIdx.x;
    __syncthreads();
    sum += slots[min(threadIdx.x + 1, blockDim.x - 1)];
    if (kSecondBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// The same within each half of the block, which has a barrier of its own; the second half goes twice as many rounds.
template <bool kSecondBarrier>
__global__ void halves_kernel(int* out, int rounds) {
  __shared__ int slots[128];
  const int half = threadIdx.x / 64, last = 64 * half + 63;
  int sum = 0;
  for (int round = 0; round < rounds * (1 + half); ++round) {
    slots[threadIdx.x] = round * 1000 + threadIdx.x;
    named_barrier(1 + half, 64);
    sum += slots[min(static_cast<int>(threadIdx.x) + 1, last)];
    if (kSecondBarrier) named_barrier(1 + half, 64);
  }
  out[threadIdx.x] = sum;
}

__global__ void barrier_number_kernel() { named_barrier(0, 64); }
__global__ void part_of_a_warp_kernel() { named_barrier(1, 48); }
__global__ void too_many_for_barrier_kernel() { named_barrier(1, 96); }
__global__ void other_counts_kernel() { named_barrier(1, threadIdx.x < 32 ? 32 + 32 : 32); }
__global__ void named_deadlock_kernel() {
  if (threadIdx.x < 32) named_barrier(2, 64);
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 33) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void divergent_shuffle_kernel(int* out) {
  if (threadIdx.x < 8) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  } else {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 1);
  }
}

__global__ void wrong_mask_kernel(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 1); }

__global__ void returned_lane_kernel(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 3);
}

__global__ void greedy_kernel() {
  SharedMemory memory;
  memory.take<float>(4);
  memory.take<float>(5);
}

// Writes `offset` elements past the beginning of three kinds of memory of 8 elements.
__global__ void outside_kernel(float* global, int kind, int offset) {
  __shared__ float fixed[8];
  SharedMemory memory;
  float* array = memory.take<float>(8);
  float* next = memory.take<float>(8);
  float local[8] = {};
  float* all[] = {global, fixed, array, local};
  fixed[0] = array[0] = next[0] = 0.0f;
  all[kind][offset] = 1.0f;
  global[0] = local[0] + local[7];
}

template <bool kBarrier>
__global__ void race_kernel(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 42;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = value;
}

// The same within a warp.
template <bool kBarrier>
__global__ void warp_race_kernel(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 42;
  if (kBarrier) {
    __syncwarp();
  } else {
    __shfl_sync(0xffffffffu, 0, 0);  // shuffles order no memory
  }
  out[threadIdx.x] = value;
}

}  // namespace lorakit
