// One function per PTX instruction, named like it; no asm anywhere else. Pointers are generic.
#pragma once

#include <common/types.cuh>

namespace lorakit {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// PTX ISA, cp.async: copy 16 bytes from global to shared memory, bypassing L1. With source_bytes = 0
// nothing is read and zeros are written, so `global` may lie outside of its array; it must be aligned all the same.
__device__ inline void cp_async_16(void* shared, const void* global, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// PTX ISA, cp.async.commit_group: close the group of copies issued so far by this thread.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// PTX ISA, cp.async.wait_group: wait until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// PTX ISA, ldmatrix: four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of
// matrix l / 8; of matrix i it receives, in d[i], elements (l / 4, 2 * (l % 4)) and the next one.
__device__ inline void ldmatrix_x4(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: lane l receives elements (2 * (l % 4), l / 4) and the one below it.
__device__ inline void ldmatrix_x4_trans(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// PTX ISA, movmatrix: an 8x8 matrix of 16-bit elements, of which lane l has (l / 4, 2 * (l % 4)) and the next one,
// transposed.
__device__ inline unsigned movmatrix_trans(unsigned pair) {
  unsigned d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(d) : "r"(pair));
  return d;
}

// PTX ISA, mma.sync.m16n8k16: D[16 x 8] += A[16 x 16] B[16 x 8], float32 accumulators. With g = lane / 4
// and c = 2 * (lane % 4), a lane holds D (g, c..c+1), (g+8, c..c+1); A (g, c..), (g+8, c..), (g, c+8..),
// (g+8, c+8..); B rows (c.., c+8..) of column g.
__device__ inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// PTX ISA, barrier.sync: as __syncthreads, for `threads` of a block, whole warps, that meet at barrier `id`, 1 to 15.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// PTX ISA, griddepcontrol.wait: wait until the kernel before this one has ended, and so those that it waited for, and
// their writes are seen. For a kernel that was launched to start before that; nothing otherwise, nor before sm_90.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// PTX ISA, griddepcontrol.launch_dependents: when all blocks have come here or ended, the next kernel may start,
// if it was launched so.
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// PTX ISA, ex2.approx.ftz.f32: 2 ** x, at most 2 ulp off; 2 ** -inf is 0.
__device__ inline float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace lorakit
