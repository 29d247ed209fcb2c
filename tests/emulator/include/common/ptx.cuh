// Twins of the functions in cuda_src/common/ptx.cuh: the same signatures, computed on the CPU. What touches
// memory is done here, in code that the sanitizers instrument; what moves between lanes is in runtime/.
#pragma once

#include <common/types.cuh>
#include <emulator/cuda.h>

namespace emulator {

// The row that this lane gives to ldmatrix, read here so that a sanitizer sees the read.
inline void load_row(unsigned short (&row)[8], const void* address, Site site) {
  if (size_t(address) % 16 != 0 || !is_shared(address, 16)) {
    fail(site, "ldmatrix: the row %p is not 16-byte aligned shared memory", address);
  }
  for (int i = 0; i < 8; ++i) row[i] = static_cast<const unsigned short*>(address)[i];
}

}  // namespace emulator

namespace lorakit {

// The destination is NaN until the thread waits for the copy, so that whoever reads too early computes NaN.
inline void cp_async_16(void* shared, const void* global, int source_bytes,
                        emulator::Site site = emulator::Site::here()) {
  if (source_bytes < 0 || source_bytes > 16) {
    emulator::fail(site, "cp_async_16: source_bytes is %d, must be 0 to 16", source_bytes);
  }
  if (size_t(global) % 16 != 0)
    emulator::fail(site, "cp_async_16: the source %p is not 16-byte aligned", global);
  if (size_t(shared) % 16 != 0 || !emulator::is_shared(shared, 16)) {
    emulator::fail(site, "cp_async_16: the destination %p is not 16-byte aligned shared memory", shared);
  }
  uint4 data = {0, 0, 0, 0};
  if (source_bytes == 16) {
    data = *static_cast<const uint4*>(global);
  } else {
    for (int i = 0; i < source_bytes; ++i) {
      reinterpret_cast<unsigned char*>(&data)[i] = static_cast<const unsigned char*>(global)[i];
    }
  }
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};
  emulator::issue_copy(shared, data);
}

inline void named_barrier(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::named_barrier(id, threads, site);
}

// Kernels run one after the other here.
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kPending>
inline void cp_async_wait() {
  emulator::Copy copy;
  while (emulator::next_copy(kPending, copy)) *static_cast<uint4*>(copy.to) = copy.data;
}

inline void ldmatrix_x4(unsigned (&d)[4], const void* row, emulator::Site site = emulator::Site::here()) {
  unsigned short elements[8];
  emulator::load_row(elements, row, site);
  emulator::distribute_matrices(d, elements, /*transposed=*/false, site);
}

inline void ldmatrix_x4_trans(unsigned (&d)[4], const void* row,
                              emulator::Site site = emulator::Site::here()) {
  unsigned short elements[8];
  emulator::load_row(elements, row, site);
  emulator::distribute_matrices(d, elements, /*transposed=*/true, site);
}

// Element (r, c) is in lane r * 4 + c / 2, its lower half if c is even.
inline unsigned movmatrix_trans(unsigned pair, emulator::Site site = emulator::Site::here()) {
  const int row = threadIdx.x % kWarpSize / 4, column = threadIdx.x % 4 * 2;
  const unsigned upper = __shfl_sync(kFullMask, pair, column * 4 + row / 2, kWarpSize, site);
  const unsigned lower = __shfl_sync(kFullMask, pair, (column + 1) * 4 + row / 2, kWarpSize, site);
  const int shift = row % 2 * 16;
  return (upper >> shift & 0xffffu) | (lower >> shift & 0xffffu) << 16;
}

inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half,
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply_m16n8k16(d, a, b, emulator::Format::kFloat16, site);
}
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16,
                         emulator::Site site = emulator::Site::here()) {
  emulator::multiply_m16n8k16(d, a, b, emulator::Format::kBfloat16, site);
}

// .ftz: subnormal inputs and results are zero.
inline float ex2(float x) {
  float y = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

}  // namespace lorakit
