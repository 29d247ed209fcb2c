// Segmented LoRA products, the first half. For row t of an adapter in slot s, whose rank is
// min(R, slot_ranks[s], the batch's bound):
//
//   shrink   h[p, t, r] = sum over k in part p of x[t, k] * lora_a[s, r, k]   for r < rank, float32
//
// sgmv_route.cu says which rows share an adapter. Rows without one move no memory, and nothing past the rank is
// read. It is bound by memory: x and A.
//
// Ranks are the 16 rows of an MMA and rows of x its 8 columns. The order of a sum's terms within an MMA does not
// matter as long as both operands have the same: so a lane takes 16 bytes of neighbours, which are its share of
// one or two MMAs, and nothing is ever transposed.
//
// Each sum has one order, fixed by in_dim alone: a warp sums 256 columns, the four warps of a part are added in
// turn, and so are the parts, by the last block of shrink to end or by expand.
#include <common/mma.cuh>
#include <common/sgmv.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpK = 256;  // columns of in_dim that a warp sums
constexpr int kPartK = kWarps * kWarpK;

// Products of a piece: its elements are k = 4 j .. 4 j + 3 of product j.
template <typename T>
constexpr int kProducts = kPer16Bytes<T> / 4;

template <typename T>
__device__ FragmentA<T> piece_a(const Piece<T>& top, const Piece<T>& bottom, int j) {
  FragmentA<T> a;
  if constexpr (sizeof(T) == 2) {
    const auto* t = reinterpret_cast<const unsigned*>(&top);
    const auto* b = reinterpret_cast<const unsigned*>(&bottom);
    a = {{t[2 * j], b[2 * j], t[2 * j + 1], b[2 * j + 1]}};
  } else {
    a = {
        {top.at[0], top.at[1], bottom.at[0], bottom.at[1], top.at[2], top.at[3], bottom.at[2], bottom.at[3]}};
  }
  return a;
}

template <typename T>
__device__ FragmentB<T> piece_b(const Piece<T>& column, int j) {
  if constexpr (sizeof(T) == 2) {
    const auto* c = reinterpret_cast<const unsigned*>(&column);
    return {{c[2 * j], c[2 * j + 1]}};
  } else {
    return {{column.at[0], column.at[1], column.at[2], column.at[3]}};
  }
}

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

template <typename T, int kRankBlocks, int kRowBlocks, int kStages, bool kAligned>
constexpr int kShrinkBlocks = !kAligned                       ? 1
                              : kRankBlocks * kRowBlocks == 1 ? (sizeof(T) == 2 ? 8 : 4)
                              : kRankBlocks * kRowBlocks == 2 ? (kStages == 4 ? 3 : 5)
                                                              : 2;  // of a multiprocessor

// Grid max_items * (item_rows / (8 * kRowBlocks)) * parts * ceil(blocks of 16 ranks / kRankBlocks), 128 threads; a
// block makes one part of some ranks of some rows of an item, kStages tiles on their way. Columns of h past the
// rank become 0, to the end of its block of 16. With counters, which are 0 before and after, the last part's block
// adds up all parts of its ranks, into the first.
//
// Nothing is __restrict__: what the kernels before write would be read ahead of the wait for them.
template <typename T, int kRankBlocks, int kRowBlocks, int kStages, bool kAligned>
__global__ void __launch_bounds__(kThreads, (kShrinkBlocks<T, kRankBlocks, kRowBlocks, kStages, kAligned>))
    sgmv_shrink_kernel(const T* x,  // [total_tokens, in_dim]
                       const __grid_constant__ ShrinkSlices<T> slices,
                       const int* rows,   // [max_items, item_rows]
                       const int* items,  // [1 + max_items, 4]
                       float* h,          // [parts, total_tokens, h_stride]
                       int* counters,     // [row tiles, max_chunks] or null
                       int total_tokens, int in_dim, int num_slices, int rank_blocks, int parts,
                       int item_rows, int h_stride, int max_chunks) {
  constexpr int kBlockR = 16 * kRankBlocks, kBlockM = 8 * kRowBlocks, kTileRows = kBlockR + kBlockM;
  constexpr int kChunks =
      kTileRows <= 96 ? 8 : 4;  // of 16 bytes, of a row of a tile; eight as long as two tiles fit
  constexpr int kStepK = kChunks * kPer16Bytes<T>, kSteps = kWarpK / kStepK;
  constexpr int kRowsAtOnce = kWarpSize / kChunks;
  constexpr int kSumStride = kBlockR + 4;  // no two of a warp's stores in one bank
  constexpr int kRing = kWarps * kStages * kTileRows * kChunks, kSums = kWarps * kBlockM * kSumStride;

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const int chunks = ceil_div(rank_blocks, kRankBlocks);
  const int chunk = static_cast<int>(blockIdx.x) % chunks;
  const int part = static_cast<int>(blockIdx.x) / chunks % parts;
  const int tile_index = static_cast<int>(blockIdx.x) / chunks / parts, tiles = item_rows / kBlockM;
  const int item_index = tile_index / tiles, first_row = tile_index % tiles * kBlockM;
  const Item item = load_item(items, item_index);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
  const int copy_row = lane / kChunks, copy_chunk = lane % kChunks;  // that this lane copies
  if (item_index >= num_items(items) || first_row >= item.rows) return;
  const int num_rows = min(item.rows - first_row, kBlockM);

  // Which ranks: for each block of 16 its A, how many ranks are live, and its columns of h.
  const int first_k = part * kPartK + warp * kWarpK;
  const T* a[kRankBlocks];
  long long rank_stride[kRankBlocks], a_stride[kRankBlocks];
  int live[kRankBlocks], h_col[kRankBlocks], h_cols[kRankBlocks], most = 0;
#pragma unroll
  for (int i = 0; i < kRankBlocks; ++i) {
    const int block = chunk * kRankBlocks + i;
    int slice = 0;
    while (slice + 1 < num_slices && block >= slices.at[slice + 1].first_block) ++slice;
    const auto& of = slices.at[slice];
    const int rank = 16 * (block - static_cast<int>(of.first_block));
    const bool is_real = block < rank_blocks;
    live[i] = is_real ? rank_of(item, of.slot_ranks, static_cast<int>(of.max_lora_rank)) - rank : 0;
    h_col[i] = static_cast<int>(of.h_col) + rank;
    h_cols[i] = is_real ? min(static_cast<int>(of.h_cols) - rank, 16) : 0;
    most = max(most, live[i]);
    rank_stride[i] = of.rank_stride;
    a_stride[i] = of.stride;
    a[i] = of.lora_a + item.slot * of.slot_stride + (rank + copy_row) * of.rank_stride;
  }
  if (most <= 0) return;

  const int own_r = threadIdx.x % 16, own_row = threadIdx.x / 16;  // of sums, this thread's of each 16 and 8
  SharedMemory shared;
  auto* memory = shared.take<Vector<unsigned, 4>>(max(kRing, kSums / 4));
  auto* const row_places = shared.take<unsigned>(kBlockM);
  auto* const ring =
      memory + warp * kStages * kTileRows * kChunks;     // of the warp: [stage][rank or row][chunk]
  float* const sums = reinterpret_cast<float*>(memory);  // [warp][row][rank], where the ring was
  const auto place = [](int row, int i) {
    return row * kChunks + (kChunks == 8 ? i ^ (row & 1) << 2 : i);  // two rows' neighbours in all banks
  };

  if (threadIdx.x < kBlockM)
    row_places[threadIdx.x] = rows[static_cast<long long>(tile_index) * kBlockM + threadIdx.x];
  __syncthreads();

  // What is not live is not loaded: it leaves no trace but in sums that nobody reads. Past in_dim there are zeros.
  const T* x_from[kBlockM / kRowsAtOnce];
  const T* a_from[kBlockR / kRowsAtOnce];
  int k = first_k + copy_chunk * kPer16Bytes<T>;
#pragma unroll
  for (int i = 0; i < kBlockM / kRowsAtOnce; ++i)
    x_from[i] = advance(
        x + k, row_places[i * kRowsAtOnce + copy_row] * static_cast<unsigned long long>(in_dim * sizeof(T)));
#pragma unroll
  for (int i = 0; i < kBlockR / kRowsAtOnce; ++i) {
    const int block = i * kRowsAtOnce / 16, r = i * kRowsAtOnce % 16;
    a_from[i] = a[block] + r * rank_stride[block] + k * a_stride[block];
  }
  const auto load = [&](int step) {
    if (step < kSteps) {
      Vector<unsigned, 4>* const own =
          ring + step % kStages * kTileRows * kChunks + place(copy_row, copy_chunk);
#pragma unroll
      for (int i = 0; i < kBlockM / kRowsAtOnce; ++i) {
        if (i * kRowsAtOnce + copy_row < num_rows)
          copy_piece<kAligned>(own + (kBlockR + i * kRowsAtOnce) * kChunks, x_from[i], 1, in_dim - k);
        x_from[i] += kStepK;
      }
#pragma unroll
      for (int i = 0; i < kBlockR / kRowsAtOnce; ++i) {
        const int block = i * kRowsAtOnce / 16;
        const long long stride = kAligned ? 1 : a_stride[block];
        if (i * kRowsAtOnce % 16 + copy_row < live[block])
          copy_piece<kAligned>(own + i * kRowsAtOnce * kChunks, a_from[i], stride, in_dim - k);
        a_from[i] += kStepK * stride;
      }
      k += kStepK;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages; ++step) load(step);

  float acc[kRankBlocks][kRowBlocks][4] = {};
#pragma unroll(kStages == kSteps ? kSteps : 1)
  for (int step = 0; step < kSteps; ++step) {
    cp_async_wait<kStages - 1>();
    __syncwarp();
    const auto* tile = reinterpret_cast<const Piece<T>*>(ring + step % kStages * kTileRows * kChunks);
#pragma unroll
    for (int four = 0; four < kChunks / 4; ++four) {
      const int i = 4 * four + q;
      Piece<T> a_pieces[2 * kRankBlocks];
#pragma unroll
      for (int r = 0; r < 2 * kRankBlocks; ++r) a_pieces[r] = tile[place(g, i) + 8 * r * kChunks];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        const Piece<T> x_piece = tile[place(g, i) + (kBlockR + 8 * m) * kChunks];
#pragma unroll
        for (int j = 0; j < kProducts<T>; ++j) {
#pragma unroll
          for (int r = 0; r < kRankBlocks; ++r)
            mma(acc[r][m], piece_a(a_pieces[2 * r], a_pieces[2 * r + 1], j), piece_b(x_piece, j));
        }
      }
    }
    __syncwarp();  // the tile has been read
    load(step + kStages);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring has been read

  // Add the warps' sums.
#pragma unroll
  for (int i = 0; i < kRankBlocks; ++i) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = 16 * i + g + j / 2 * 8, row = 8 * m + q * 2 + j % 2;
        sums[(warp * kBlockM + row) * kSumStride + r] = acc[i][m][j];
      }
    }
  }
  __syncthreads();
  float* own_h[kRowBlocks];
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m)
    own_h[m] =
        h + (static_cast<long long>(part) * total_tokens + row_places[8 * m + own_row]) * h_stride + own_r;
#pragma unroll
  for (int i = 0; i < kRankBlocks; ++i) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      const float* sums_of_row = sums + (8 * m + own_row) * kSumStride + 16 * i + own_r;
      float sum = sums_of_row[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += sums_of_row[w * kBlockM * kSumStride];
      if (8 * m + own_row < num_rows && own_r < h_cols[i]) own_h[m][h_col[i]] = own_r < live[i] ? sum : 0.0f;
    }
  }

  // Add the parts.
  if (counters == nullptr) return;
  __threadfence();
  __syncthreads();
  int* is_last = reinterpret_cast<int*>(memory);
  if (threadIdx.x == 0) {
    int* counter = counters + static_cast<long long>(tile_index) * max_chunks + chunk;
    *is_last = atomicAdd(counter, 1) == parts - 1;
    if (*is_last) *counter = 0;
  }
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  const long long h_part = static_cast<long long>(total_tokens) * h_stride;
  const auto is_mine = [&](int i, int m) { return own_r < live[i] && 8 * m + own_row < num_rows; };
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) own_h[m] -= part * h_part;
  float totals[kRankBlocks][kRowBlocks] = {};
  constexpr int kLoads = kRankBlocks * kRowBlocks;  // of a part, each of which takes as long as all of them
#pragma unroll(kLoads <= 4 ? 8 : kLoads <= 16 ? 4 : kLoads <= 24 ? 2 : 1)
  for (int p = 0; p < parts; ++p) {
#pragma unroll
    for (int i = 0; i < kRankBlocks; ++i) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        if (is_mine(i, m)) totals[i][m] += own_h[m][p * h_part + h_col[i]];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRankBlocks; ++i) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      if (is_mine(i, m)) own_h[m][h_col[i]] = totals[i][m];
    }
  }
}

}  // namespace lorakit
