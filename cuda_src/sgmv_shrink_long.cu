// Segmented LoRA products, the first half, for long segments of 16-bit rows: the sums of sgmv_shrink.cu, in the same
// order, with tiles that read x and A fewer times.
//
//   shrink   h[t, r] = sum over k of x[t, k] * lora_a[s, r, k]   for r < rank, float32
//
// All warps of a block read the tile that all of them load, 64 columns of in_dim at a time.
#include <common/sgmv_shrink.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunks = SwizzledTile::kChunks;

// Grid max_items * tiles * groups * ceil(blocks of 16 ranks / (kRankBlocks * kRankWarps)), 256 threads; a block makes
// a group of parts, one after the other, of some ranks of some rows of an item, each warp 16 * kRankBlocks ranks of
// 8 * kRowBlocks rows. Columns of h past the rank become 0, to the end of its block of 16. Whichever group's block ends
// last adds up all parts of its ranks, into the first.
//
// Nothing is __restrict__: what the kernels before write would be read ahead of the wait for them.
template <typename T, int kRankBlocks, int kRankWarps, int kRowBlocks>
__global__ void __launch_bounds__(kThreads, kRankBlocks* kRankWarps <= 3 ? 2 : 1)
    sgmv_shrink_long_kernel(const T* x,  // [total_tokens, in_dim]
                            const __grid_constant__ ShrinkSlices<T> slices,
                            const int* rows,   // [max_items, tiles * rows of a block]
                            const int* items,  // [1 + max_items, 4]
                            int tiles,         // of an item's rows
                            float* h,          // [parts, total_tokens, h_stride]
                            int* counters,  // [row tiles, max_chunks], 0 before and after; null for one part
                            int total_tokens, int in_dim, int num_slices, int rank_blocks, int parts,
                            int groups, int h_stride, int max_chunks) {
  constexpr int kRanks = 16 * kRankBlocks * kRankWarps, kRows = 8 * kRowBlocks * kWarps / kRankWarps;
  constexpr int kTileRows = kRanks + kRows, kStages = kTileRows <= 192 ? 4 : 3;
  constexpr int kRowsAtOnce = kThreads / kChunks, kLoads = ceil_div(kTileRows, kRowsAtOnce);
  constexpr int kStepK = kChunks * kPer16Bytes<T>;

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int chunks = ceil_div(rank_blocks, kRanks / 16);
  const int chunk = static_cast<int>(blockIdx.x) % chunks;
  const int group = static_cast<int>(blockIdx.x) / chunks % groups;
  const int tile_index = static_cast<int>(blockIdx.x) / chunks / groups, item_index = tile_index / tiles;
  if (item_index >= num_items(items)) return;
  const Item item = load_item(items, item_index);
  const int num_rows = min(item.rows - tile_index % tiles * kRows, kRows);
  if (num_rows <= 0) return;
  const int first_part = parts * group / groups, last_part = parts * (group + 1) / groups;

  // Which ranks and rows.
  SharedMemory shared;
  auto* const ring = shared.take<Vector<unsigned, 4>>(kStages * kTileRows * kChunks);
  auto* const blocks = shared.take<RankBlock>(kRanks / 16);
  auto* const places = shared.take<unsigned>(kRows);
  auto* const is_last = shared.take<int>(1);
  if (threadIdx.x < kRows)
    places[threadIdx.x] =
        threadIdx.x < num_rows ? rows[static_cast<long long>(tile_index) * kRows + threadIdx.x] : 0;
  if (threadIdx.x < kRanks / 16) {
    const int index = chunk * kRanks / 16 + static_cast<int>(threadIdx.x);
    blocks[threadIdx.x] = rank_block(index, rank_blocks, slices, num_slices, item);
  }
  __syncthreads();
  int most = 0;
#pragma unroll
  for (int i = 0; i < kRanks / 16; ++i) most = max(most, blocks[i].live);
  if (most <= 0) return;

  // What this thread copies. In place of what is not live there are zeros.
  const int copy_row = threadIdx.x / kChunks, copy_chunk = threadIdx.x % kChunks;
  const T* from[kLoads];
  unsigned live = 0;  // a bit for each
  int k = first_part * kPartK + copy_chunk * kPer16Bytes<T>;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = i * kRowsAtOnce + copy_row;
    if (row < kRanks) {
      const RankBlock block = blocks[row / 16];
      const auto& of = slices.at[block.slice];
      const bool has_rank = row % 16 < block.live;
      live |= has_rank << i;
      from[i] = has_rank
                    ? of.lora_a + item.slot * of.slot_stride + (block.rank + row % 16) * of.rank_stride + k
                    : x;
    } else {
      const int m = min(row - kRanks, kRows - 1);
      live |= (m < num_rows) << i;
      from[i] = advance(x + k, places[m] * static_cast<unsigned long long>(in_dim * sizeof(T)));
    }
  }
  const auto tile_of = [&](int stage) { return SwizzledTile{ring + stage * kTileRows * kChunks}; };
  int steps_left = (last_part - first_part) * (kPartK / kStepK), load_stage = 0;
  const auto load = [&] {
    if (steps_left-- > 0) {
      auto* const own =
          tile_of(load_stage).at(copy_row, copy_chunk);  // of all its rows, with the same swizzle
      const unsigned some = k < in_dim ? live : 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if ((i + 1) * kRowsAtOnce <= kTileRows || copy_row < kTileRows % kRowsAtOnce)
          cp_async_16(own + i * kRowsAtOnce * kChunks, from[i], some >> i & 1 ? 16 : 0);
        from[i] += kStepK;
      }
      k += kStepK;
      load_stage = load_stage == kStages - 1 ? 0 : load_stage + 1;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load();

  // This warp's ranks and rows. Element j of a lane's sums is rank g + j / 2 * 8 of row 2 q + j % 2.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
  const int first_block = warp % kRankWarps * kRankBlocks, first_row = warp / kRankWarps * 8 * kRowBlocks;
  const unsigned long long h_row = h_stride * sizeof(float), h_part = total_tokens * h_row;
  // Of row 8 m + 2 q + j in h, or null.
  const auto row_of = [&](int m, int j) {
    const int row = first_row + 8 * m + 2 * q + j;
    return row < num_rows ? advance(h + g, places[row] * h_row) : nullptr;
  };

  int stage = 0;
#pragma unroll 1
  for (int part = first_part; part < last_part; ++part) {
    float sums[kRankBlocks][kRowBlocks][4] = {};
#pragma unroll 1
    for (int chain = 0; chain < kPartK / kChainK; ++chain) {
      float acc[kRankBlocks][kRowBlocks][4] = {};
#pragma unroll 1
      for (int step = 0; step < kChainK / kStepK; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the tile is here, and the one before it has been read
        load();
        const SwizzledTile tile = tile_of(stage);
        stage = stage == kStages - 1 ? 0 : stage + 1;
#pragma unroll
        for (int j = 0; j < kStepK / 32; ++j) {
          FragmentB<T> x_rows[kRowBlocks][2];
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) load_rows(x_rows[m], tile, first_row, kRanks + 8 * m, j);
#pragma unroll
          for (int r = 0; r < kRankBlocks; ++r) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              FragmentA<T> ranks;
              load_ranks(ranks, tile, 16 * first_block, 16 * r, 2 * j + i);
#pragma unroll
              for (int m = 0; m < kRowBlocks; ++m) mma(acc[r][m], ranks, x_rows[m][i]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRankBlocks; ++r) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[r][m][j] += acc[r][m][j];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float* const own = row_of(m, j);
        if (own == nullptr) continue;
#pragma unroll
        for (int r = 0; r < kRankBlocks; ++r) {
          const RankBlock& block = blocks[first_block + r];
          float* const to = advance(own + block.h_col, part * h_part);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (g + 8 * i < block.h_cols) to[8 * i] = g + 8 * i < block.live ? sums[r][m][j + 2 * i] : 0.0f;
          }
        }
      }
    }
  }
  cp_async_wait<0>();

  // Add the parts.
  int* const counter = counters + static_cast<long long>(tile_index) * max_chunks + chunk;
  if (parts == 1 || (groups > 1 && !is_last_part(counter, groups, is_last))) return;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float* const own = row_of(m, j);
      if (own == nullptr) continue;
      float totals[kRankBlocks][2] = {};
#pragma unroll 4
      for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int r = 0; r < kRankBlocks; ++r) {
          const RankBlock& block = blocks[first_block + r];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (g + 8 * i < block.live) totals[r][i] += advance(own + block.h_col, part * h_part)[8 * i];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRankBlocks; ++r) {
        const RankBlock& block = blocks[first_block + r];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (g + 8 * i < block.live) own[block.h_col + 8 * i] = totals[r][i];
        }
      }
    }
  }
}

}  // namespace lorakit
