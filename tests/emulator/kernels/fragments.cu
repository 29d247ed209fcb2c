// What each lane of a warp receives from ldmatrix and movmatrix, and what it gives to and receives from mma: registers as they
// are, so that the test and not the kernel says which element is where.
#include <common/ptx.cuh>
#include <common/shared.cuh>

namespace lorakit {

template <bool kTranspose>
__global__ void ldmatrix_kernel(unsigned* registers,            // [32, 4]
                                const unsigned short* matrices  // [4, 8, 8]
) {
  SharedMemory memory;
  unsigned short* rows = memory.take<unsigned short>(4 * 8 * 8);
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 8 * 8; i += 32) rows[i] = matrices[i];
  __syncthreads();
  unsigned received[4];
  if constexpr (kTranspose)
    ldmatrix_x4_trans(received, rows + lane * 8);
  else
    ldmatrix_x4(received, rows + lane * 8);
  for (int i = 0; i < 4; ++i) registers[lane * 4 + i] = received[i];
}

__global__ void movmatrix_kernel(unsigned* registers  // [32]: transposed in place
) {
  registers[threadIdx.x] = movmatrix_trans(registers[threadIdx.x]);
}

template <typename T>
__global__ void mma_kernel(float* d,           // [32, 4]: added to
                           const unsigned* a,  // [32, 4]
                           const unsigned* b   // [32, 2]
) {
  const int lane = threadIdx.x;
  float sum[4];
  unsigned a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) sum[i] = d[lane * 4 + i];
  for (int i = 0; i < 4; ++i) a_registers[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b_registers[i] = b[lane * 2 + i];
  mma_m16n8k16(sum, a_registers, b_registers, T());
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

}  // namespace lorakit
