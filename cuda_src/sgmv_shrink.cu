// Segmented LoRA products, the first half. For row t of an adapter in slot s, whose rank is
// min(R, slot_ranks[s], the batch's bound):
//
//   shrink   h[p, t, r] = sum over k in part p of x[t, k] * lora_a[s, r, k]   for r < rank, float32
//
// sgmv_route.cu says which rows share an adapter. Rows without one move no memory, and nothing past the rank is
// read. It is bound by memory: x and A.
//
// Ranks are the 16 rows of an MMA and rows of x its 8 columns.
//
// Each sum has one order, fixed by in_dim alone: a warp sums 256 columns, the four warps of a part are added in
// turn, and so are the parts, by the last block of shrink to end or by expand. sgmv_shrink_long.cu has the same.
#include <common/sgmv_shrink.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
static_assert(kPartK == kWarps * kChainK, "a warp has a chain");

template <typename T, int kRowBlocks, int kStages, bool kAligned>
constexpr int kShrinkBlocks = !kAligned         ? 1
                              : kRowBlocks == 1 ? (sizeof(T) == 2 ? 8 : 4)
                              : kStages == 4    ? 3
                                                : 5;  // of a multiprocessor

// Grid max_items * tiles * parts * rank_blocks, 128 threads; a block makes one part of 16
// ranks of some rows of an item, kStages tiles on their way. Columns of h past the rank become 0, to the end of the 16.
// With counters, which are 0 before and after, the last part's block adds up all parts of its ranks, into the first.
//
// Nothing is __restrict__: what the kernels before write would be read ahead of the wait for them.
template <typename T, int kRowBlocks, int kStages, bool kAligned>
__global__ void __launch_bounds__(kThreads, (kShrinkBlocks<T, kRowBlocks, kStages, kAligned>))
    sgmv_shrink_kernel(const T* x,  // [total_tokens, in_dim]
                       const __grid_constant__ ShrinkSlices<T> slices,
                       const int* rows,   // [max_items, tiles * kRows]
                       const int* items,  // [1 + max_items, 4]
                       int tiles,         // of an item's rows
                       float* h,          // [parts, total_tokens, h_stride]
                       int* counters,     // [row tiles, max_chunks] or null
                       int total_tokens, int in_dim, int num_slices, int rank_blocks, int parts, int h_stride,
                       int max_chunks) {
  constexpr int kRows = 8 * kRowBlocks, kTileRows = 16 + kRows;
  constexpr int kChunks = SwizzledTile::kChunks;
  constexpr int kStepK = kChunks * kPer16Bytes<T>, kSteps = kChainK / kStepK;
  constexpr int kRowsAtOnce = kWarpSize / kChunks;
  constexpr int kSumStride = 20;  // of a row of 16 ranks; no two of a warp's stores in one bank
  constexpr int kRing = kWarps * kStages * kTileRows * kChunks;
  static_assert(kRing * 4 >= kWarps * kRows * kSumStride, "sums are where the ring was");

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int block_index = static_cast<int>(blockIdx.x) % rank_blocks;
  const int part = static_cast<int>(blockIdx.x) / rank_blocks % parts;
  const int tile_index = static_cast<int>(blockIdx.x) / rank_blocks / parts;
  const int item_index = tile_index / tiles, first_row = tile_index % tiles * kRows;
  const Item item = load_item(items, item_index);
  if (item_index >= num_items(items) || first_row >= item.rows) return;
  const int num_rows = min(item.rows - first_row, kRows);
  const RankBlock block = rank_block(block_index, rank_blocks, slices, num_slices, item);
  if (block.live <= 0) return;
  const auto& of = slices.at[block.slice];

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
  const int copy_row = lane / kChunks, copy_chunk = lane % kChunks;  // that this lane copies
  const int own_r = threadIdx.x % 16, own_row = threadIdx.x / 16;  // of sums, this thread's of each 16 and 8
  SharedMemory shared;
  auto* memory = shared.take<Vector<unsigned, 4>>(kRing);
  auto* const row_places = shared.take<unsigned>(kRows);
  auto* const ring =
      memory + warp * kStages * kTileRows * kChunks;     // of the warp: [stage][rank or row][chunk]
  float* const sums = reinterpret_cast<float*>(memory);  // [warp][row][rank], where the ring was
  const auto tile_of = [&](int step) { return SwizzledTile{ring + step % kStages * kTileRows * kChunks}; };

  if (threadIdx.x < kRows)
    row_places[threadIdx.x] = rows[static_cast<long long>(tile_index) * kRows + threadIdx.x];
  __syncthreads();

  // What is not live is not loaded: it leaves no trace but in sums that nobody reads. Past in_dim there are zeros.
  int k = part * kPartK + warp * kChainK + copy_chunk * kPer16Bytes<T>;
  const long long a_stride = kAligned ? 1 : of.stride;
  const T* x_from[kRows / kRowsAtOnce];
  const T* a_from =
      of.lora_a + item.slot * of.slot_stride + (block.rank + copy_row) * of.rank_stride + k * a_stride;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i)
    x_from[i] = advance(
        x + k, row_places[i * kRowsAtOnce + copy_row] * static_cast<unsigned long long>(in_dim * sizeof(T)));
  const auto load = [&](int step) {
    if (step < kSteps) {
      const SwizzledTile tile = tile_of(step);
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        if (i * kRowsAtOnce + copy_row < num_rows)
          copy_piece<kAligned>(tile.at(16 + i * kRowsAtOnce + copy_row, copy_chunk), x_from[i], 1,
                               in_dim - k);
        x_from[i] += kStepK;
      }
#pragma unroll
      for (int r = 0; r < 16; r += kRowsAtOnce) {
        if (r + copy_row < block.live)
          copy_piece<kAligned>(tile.at(r + copy_row, copy_chunk), a_from + r * of.rank_stride, a_stride,
                               in_dim - k);
      }
      a_from += kStepK * a_stride;
      k += kStepK;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages; ++step) load(step);

  float acc[kRowBlocks][4] = {};
#pragma unroll(kStages == kSteps ? kSteps : 1)
  for (int step = 0; step < kSteps; ++step) {
    cp_async_wait<kStages - 1>();
    __syncwarp();
    const SwizzledTile tile = tile_of(step);
#pragma unroll
    for (int j = 0; j < kStepK / 32; ++j) {
      FragmentA<T> ranks[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_ranks(ranks[i], tile, 0, 0, 2 * j + i);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        FragmentB<T> x_rows[2];
        load_rows(x_rows, tile, 0, 16 + 8 * m, j);
#pragma unroll
        for (int i = 0; i < 2; ++i) mma(acc[m], ranks[i], x_rows[i]);
      }
    }
    __syncwarp();  // the tile has been read
    load(step + kStages);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring has been read

  // Add the warps' sums.
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sums[(warp * kRows + 8 * m + q * 2 + j % 2) * kSumStride + g + j / 2 * 8] = acc[m][j];
  }
  __syncthreads();
  float* own_h[kRowBlocks];
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
    own_h[m] = h + (static_cast<long long>(part) * total_tokens + row_places[8 * m + own_row]) * h_stride +
               block.h_col + own_r;
    const float* sums_of_row = sums + (8 * m + own_row) * kSumStride + own_r;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums_of_row[w * kRows * kSumStride];
    if (8 * m + own_row < num_rows && own_r < block.h_cols) *own_h[m] = own_r < block.live ? sum : 0.0f;
  }

  // Add the parts.
  if (counters == nullptr) return;
  int* const counter = counters + static_cast<long long>(tile_index) * max_chunks + block_index;
  if (!is_last_part(counter, parts, reinterpret_cast<int*>(memory))) return;
  const long long h_part = static_cast<long long>(total_tokens) * h_stride;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
    if (own_r >= block.live || 8 * m + own_row >= num_rows) continue;
    own_h[m] -= part * h_part;
    float total = 0.0f;
#pragma unroll 8
    for (int p = 0; p < parts; ++p) total += own_h[m][p * h_part];
    *own_h[m] = total;
  }
}

}  // namespace lorakit
