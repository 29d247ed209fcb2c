// One warp multiplies A [16 x 16] by B [16 x 8], both row-major, through ldmatrix and mma.
#include <common/ptx.cuh>
#include <common/shared.cuh>

namespace lorakit {

template <typename T>
__global__ void multiply_kernel(float* d, const T* a, const T* b) {
  SharedMemory memory;
  T* a_tile = memory.take<T>(16 * 16);
  T* b_tile = memory.take<T>(16 * 16);  // 16 columns, of which 8 are used
  int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += 32) a_tile[i] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) b_tile[i / 8 * 16 + i % 8] = b[i];
  for (int i = lane; i < 16 * 8; i += 32) b_tile[i / 8 * 16 + 8 + i % 8] = b[i];
  __syncthreads();

  unsigned a_fragment[4], b_fragment[4];
  // Matrices 0..3 of A: (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  ldmatrix_x4(a_fragment, &a_tile[lane % 16 * 16 + lane / 16 * 8]);
  ldmatrix_x4_trans(b_fragment, &b_tile[lane % 16 * 16 + lane / 16 * 8]);
  unsigned b_left[2] = {b_fragment[0], b_fragment[1]};
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_m16n8k16(sum, a_fragment, b_left, T());

  int row = lane / 4, column = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

}  // namespace lorakit
