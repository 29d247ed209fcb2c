// What the kernels of shrink share: the order of its sums, their operands and the slices.
//
// Each sum has one order, fixed by in_dim alone: kChainK columns one after the other, four such sums of a part in
// turn, and so the parts.
#pragma once

#include <common/mma.cuh>
#include <common/sgmv.cuh>

namespace lorakit {

constexpr int kChainK = 256;         // columns of in_dim that an accumulator sums
constexpr int kPartK = 4 * kChainK;  // columns of a block

// ---- Operands ----
// Of a tile that has 128 bytes of in_dim: A = 16 ranks from row `row` + `more` on, columns 16 j .. 16 j + 15. The
// compiler knows j and `more`, a multiple of 8: then all ranks and rows have one address and distances from it.
template <typename T>
__device__ void load_ranks(FragmentA<T>& a, SwizzledTile tile, int row, int more, int j) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4(a.pairs, tile.at(row + lane % 16, 2 * j + lane / 16) + more * SwizzledTile::kChunks);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int col = lane % 4 * 2 + i / 4 * 8;
      const auto pair = *tile.pair<T>(row + more + lane / 4 + i / 2 % 2 * 8, 16 * j + col);
      a.at[i] = pair.at[0];
      a.at[i + 1] = pair.at[1];
    }
  }
}

// B[0] and B[1]: eight rows of x from row `row` + `more` on, columns 32 j .. 32 j + 15 and the 16 after them.
template <typename T>
__device__ void load_rows(FragmentB<T> (&b)[2], SwizzledTile tile, int row, int more, int j) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    unsigned d[4];
    ldmatrix_x4(d, tile.at(row + lane % 8, 4 * j + lane / 8) + more * SwizzledTile::kChunks);
    b[0] = {{d[0], d[1]}};
    b[1] = {{d[2], d[3]}};
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const auto pair = *tile.pair<T>(row + more + lane / 4, 32 * j + lane % 4 * 2 + i * 4);
      b[i / 4].at[i % 4] = pair.at[0];
      b[i / 4].at[i % 4 + 1] = pair.at[1];
    }
  }
}

// ---- Slices ----

// One A for each slice of the outputs, all with the same x.
template <typename T>
struct ShrinkSlices {
  struct {
    const T* lora_a;        // [max_num_loras, max_lora_rank, in_dim] by strides
    const int* slot_ranks;  // [max_num_loras] or null
    long long max_lora_rank, slot_stride, rank_stride, stride;
    long long first_block;    // of 16 ranks, counted over all slices
    long long h_col, h_cols;  // first column in h, and how many there are
  } at[kMaxSlices];
};

// A block of 16 ranks.
struct RankBlock {
  int slice;
  int rank;           // the first, in its slice
  int live;           // ranks of it that the item has; none or less: nothing of it is read
  int h_col, h_cols;  // its columns of h, of which those that are not live become 0
};

template <typename T>
__device__ RankBlock rank_block(int block, int rank_blocks, const ShrinkSlices<T>& slices, int num_slices,
                                const Item& item) {
  int slice = 0;
  while (slice + 1 < num_slices && block >= slices.at[slice + 1].first_block) ++slice;
  const auto& of = slices.at[slice];
  const int rank = 16 * (block - static_cast<int>(of.first_block));
  const bool is_real = block < rank_blocks;
  return {slice, rank, is_real ? rank_of(item, of.slot_ranks, static_cast<int>(of.max_lora_rank)) - rank : 0,
          static_cast<int>(of.h_col) + rank, is_real ? min(static_cast<int>(of.h_cols) - rank, 16) : 0};
}

// ---- Parts ----

// Whether this block, having written its part, is the last of them to do so; the others' sums are then seen. Counts in
// `counter`, which is 0 before and after.
__device__ inline bool is_last_part(int* counter, int parts, int* is_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(counter, 1) == parts - 1;
    if (*is_last) *counter = 0;
  }
  __syncthreads();
  if (!*is_last) return false;
  __threadfence();
  return true;
}

}  // namespace lorakit
