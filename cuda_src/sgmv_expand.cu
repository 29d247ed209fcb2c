// Segmented LoRA products, the second half. For row t of an adapter in slot s, whose rank is
// min(R, slot_ranks[s], the batch's bound):
//
//   expand   y[t, n] += sum over r < rank of (sum over p of h[p, t, r]) * lora_b[s, n, r] + bias[s, n]
//
// sgmv_route.cu says which rows share an adapter. Rows without one move no memory, and nothing past the rank is
// read. It is bound by memory: it reads B, and reads and writes y.
//
// Columns of y are the 16 rows of an MMA and rows of h its 8 columns. Each sum has one order: parts in turn, then
// 16 ranks at a time.
#include <common/sgmv_expand.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPartsAtOnce = 8;

template <typename T, typename Out, int kRows, bool kAligned>
constexpr int kExpandBlocks = !kAligned || sizeof(T) == 4 ? 1
                              : kRows == 8                ? 7
                              : kRows == 16               ? 4
                              : sizeof(Out) == 2          ? 5
                                                          : 2;  // of a multiprocessor

// Any grid, 128 threads. A block takes 4 * 64 neighbouring columns and kRows rows of an item, then the next of its
// share of such units; a warp makes 64 columns of one slice, of 64 rows eight at a time. Rounds once, when y is stored.
//
// h goes to shared memory as the terms and fragments that the MMAs want, kMaxSteps times 16 ranks at a time. Tiles of
// 64 rows have h in one part, and up to 16 ranks where sgmv_expand_long.cu takes more.
//
// After shrink it starts before that has ended, and then reads all but h. Nothing is __restrict__: what the kernels
// before write would be read ahead of the wait for them.
template <typename T, typename Out, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads, (kExpandBlocks<T, Out, kRows, kAligned>))
    sgmv_expand_kernel(const float* h,  // [parts, total_tokens, h_stride]
                       const __grid_constant__ ExpandSlices<T, Out> slices,
                       const int* rows,   // [max_items, tiles * kRows]
                       const int* items,  // [1 + max_items, 4]
                       int tiles,         // of an item's rows
                       int total_tokens, int num_slices, int column_blocks, int parts, int h_stride,
                       bool is_after_shrink) {
  constexpr bool kInTurns = kRows == 64;  // eights of rows
  constexpr bool kAnyRank = !kInTurns || !kAligned || sizeof(T) == 4;
  constexpr int kEights = kRows / 8, kRowBlocks = kInTurns ? 1 : kEights, kStages = kEights / kRowBlocks;
  constexpr int kMaxSteps = kInTurns ? 1 : 8;  // of which h is in shared memory at once
  constexpr int kAhead = kInTurns ? 1 : 2;     // steps of B on their way
  constexpr int kYChunks = kRows * WarpTile<Out>::kChunks, kBChunks = 16 * WarpTile<T>::kChunks;  // of a warp
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
  SharedMemory shared;
  const WarpTile<Out> y_tile{shared.take<Vector<unsigned, 4>>(kWarps * kYChunks) + warp * kYChunks};
  auto* const b_tiles =
      shared.take<Vector<unsigned, 4>>(kWarps * kAhead * kBChunks) + warp * kAhead * kBChunks;
  auto* const fragments = shared.take<Vector<unsigned, 4>>(kEights * kMaxSteps * kWarpSize);
  auto* const scales = shared.take<float>(kRows);
  auto* const places = shared.take<unsigned>(kRows);  // the rows
  if (!is_after_shrink) griddepcontrol_wait();
  const int units = num_items(items) * tiles * column_blocks;
  if (units == 0) griddepcontrol_wait();  // nobody else would

  const int first_unit = static_cast<int>(static_cast<long long>(units) * blockIdx.x / gridDim.x);
  const int last_unit = static_cast<int>(static_cast<long long>(units) * (blockIdx.x + 1) / gridDim.x);

  int tile = -1, slice = -1, num_rows = 0;
  Item item{};
  for (int unit = first_unit; unit < last_unit; ++unit) {
    // Which rows, and which columns, of the warp and of the lane in an MMA.
    const int column_block = unit % column_blocks, old_tile = tile, old_slice = slice;
    tile = unit / column_blocks;
    slice = 0;
    while (slice + 1 < num_slices && column_block >= slices.at[slice + 1].first_block) ++slice;
    const bool is_new = tile != old_tile || slice != old_slice;
    if (tile != old_tile) {
      item = load_item(items, tile / tiles);
      num_rows = min(item.rows - tile % tiles * kRows, kRows);
      if (old_tile >= 0) __syncthreads();  // the rows have been read
      if (threadIdx.x < kRows) places[threadIdx.x] = rows[static_cast<long long>(tile) * kRows + threadIdx.x];
      __syncthreads();
    }
    if (num_rows <= 0) continue;
    const auto& of = slices.at[slice];
    const int warp_col = ((column_block - static_cast<int>(of.first_block)) * kWarps + warp) * kWarpN;
    const int num_cols = static_cast<int>(of.out_dim) - warp_col, col = warp_col + g * 8;
    const int rank = rank_of(item, of.slot_ranks, static_cast<int>(of.max_lora_rank));
    const int steps = ceil_div(rank, 16);

    // B of 16 ranks, and y, on their way to the warp's tiles.
    constexpr int kBPiece = kPer16Bytes<T>, kYPiece = kPer16Bytes<Out>;
    const int b_row = lane / WarpTile<T>::kChunks, b_chunk = lane % WarpTile<T>::kChunks;
    const int y_row = lane / WarpTile<Out>::kChunks, y_chunk = lane % WarpTile<Out>::kChunks;
    const T* const b = of.lora_b + item.slot * of.slot_stride + b_row * of.rank_stride +
                       (warp_col + b_chunk * kBPiece) * of.stride;
    const int b_count = num_cols - b_chunk * kBPiece, y_count = num_cols - y_chunk * kYPiece;  // live columns
    const auto copy_b = [&](int step) {
      const WarpTile<T> tile{b_tiles + step % kAhead * kBChunks};
      const T* from = b + 16 * step * of.rank_stride;
#pragma unroll
      for (int row = 0; row < 16; row += WarpTile<T>::kRowsAtOnce) {
        const int count = 16 * step + row + b_row < rank ? b_count : 0;
        copy_piece<kAligned>(tile.at(b_row, row, b_chunk), count > 0 ? from : of.lora_b, of.stride, count);
        from += WarpTile<T>::kRowsAtOnce * of.rank_stride;
      }
    };
    Out* const y = of.y + warp_col + y_chunk * kYPiece;
    constexpr int kYRows = WarpTile<Out>::kRowsAtOnce, kStageRows = 8 * kRowBlocks / kYRows;
    unsigned y_places[kRows / kYRows];  // all at once, as copies stay in order with other reads
#pragma unroll
    for (int i = 0; i < kRows / kYRows; ++i) y_places[i] = places[i * kYRows + y_row];
    const auto target_of = [&](int i) {
      const unsigned long long stride = of.y_stride;
      return advance(y, y_places[i] * (kAligned ? stride & 0xffffffff : stride));
    };
    const int live_rows = y_count > 0 ? num_rows : 0;
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {  // first, as the products wait for it
      if (step < steps) copy_b(step);
      if (!kInTurns) cp_async_commit();
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll
      for (int i = stage * kStageRows; i < (stage + 1) * kStageRows; ++i) {
        if (i * kYRows + y_row < live_rows)
          copy_piece<kAligned>(y_tile.at(y_row, i * kYRows, y_chunk), target_of(i), 1, y_count);
      }
      cp_async_commit();
    }
    Row8<T> bias{};
    if (of.bias != nullptr)
      load_row<false>(bias, of.bias + item.slot * of.out_dim + col, 1, num_cols - g * 8);

    // h of up to kMaxSteps * 16 ranks: warps share out the eights of rows and the steps; a lane has ranks 4q .. 4q + 3
    // of row g.
    if (is_after_shrink) griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    constexpr int kOwnEights = kEights < kWarps ? 1 : kEights / kWarps;
    constexpr int kTeams = kEights < kWarps ? kWarps / kEights : 1;  // of warps, for each eight
    const unsigned long long h_part =
        static_cast<unsigned long long>(total_tokens) * h_stride * sizeof(float);
    const auto load_h = [&](float (&values)[4], int eight, int step) {
      const int row = 8 * eight + g;
      const int live_ranks = row < num_rows ? rank - 16 * step - 4 * q : 0;
      const float* from = advance(h + of.h_col + 4 * q + 16 * step,
                                  places[row] * static_cast<unsigned long long>(h_stride * sizeof(float)));
#pragma unroll
      for (int n = 0; n < 4; ++n) values[n] = 0.0f;
      if constexpr (kInTurns) {
        if (live_ranks > 0) load_four<kAligned>(values, from, live_ranks);
      } else {
#pragma unroll 1
        for (int part = 0; part < (live_ranks > 0 ? parts : 0); part += kPartsAtOnce) {
          float loaded[kPartsAtOnce][4] = {};
#pragma unroll
          for (int p = 0; p < kPartsAtOnce; ++p) {
            if (part + p < parts) load_four<kAligned>(loaded[p], from, live_ranks);
            from = advance(from, h_part);
          }
#pragma unroll
          for (int p = 0; p < kPartsAtOnce; ++p) {
#pragma unroll
            for (int n = 0; n < 4; ++n) values[n] += loaded[p][n];
          }
        }
      }
    };
    const auto drop_dead_ranks = [&](float (&values)[4], int step) {
#pragma unroll
      for (int n = 0; n < 4; ++n) values[n] = 16 * step + 4 * q + n < rank ? values[n] : 0.0f;
    };
    if (is_new && unit > first_unit) __syncthreads();  // h and its scales have been read
    if (is_half<T> && is_new) {
      for (int eight = warp; eight < kEights; eight += kWarps) {
        float largest = 0.0f;
        for (int step = 0; step < steps; ++step) {
          float values[4];
          load_h(values, eight, step);
          drop_dead_ranks(values, step);
#pragma unroll
          for (int n = 0; n < 4; ++n) largest = fmaxf(largest, fabsf(values[n]));
        }
        const float scale = scale_of(quad_max(largest));
        if (q == 0) scales[8 * eight + g] = scale;
      }
      __syncthreads();
    }
    const auto put_h = [&](float (&values)[4], int eight, int step) {
      drop_dead_ranks(values, step);
#pragma unroll
      for (int n = 0; is_half<T> && n < 4; ++n) values[n] *= scales[8 * eight + g];
      FragmentB<T> terms[kTerms<T>];
      split<T>(terms, values);
      fragments[(eight * kMaxSteps + step % kMaxSteps) * kWarpSize + lane] =
          *reinterpret_cast<const Vector<unsigned, 4>*>(&terms);
    };
    const auto fill = [&](int first_step) {
      if constexpr (kMaxSteps == 1) {
        float values[kOwnEights][4];
#pragma unroll
        for (int i = 0; i < kOwnEights; ++i) load_h(values[i], warp + i * kWarps, first_step);
#pragma unroll
        for (int i = 0; i < kOwnEights; ++i) put_h(values[i], warp + i * kWarps, first_step);
      } else {
        const int last_step = min(first_step + kMaxSteps, steps), eight = warp % kEights;
#pragma unroll 1
        for (int step = first_step + warp / kEights; step < last_step; step += kTeams) {
          float values[4];
          load_h(values, eight, step);
          put_h(values, eight, step);
        }
      }
    };

    FragmentA<T> b_fragments[4];
    const auto take_b = [&](int step) {
      const WarpTile<T> tile{b_tiles + step % kAhead * kBChunks};
      __syncwarp();  // all lanes' copies are here
      Row8<T> ranks[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) ranks[i] = tile.row8(4 * q, i, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) b_fragments[i] = columns_a(ranks, i);
      __syncwarp();  // the tile has been read
    };
    const auto add_ranks = [&](float (&acc)[kRowBlocks][4][4], int stage, int step) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        const Vector<unsigned, 4> packed =
            fragments[((stage * kRowBlocks + m) * kMaxSteps + step % kMaxSteps) * kWarpSize + lane];
        const auto& terms = *reinterpret_cast<const FragmentB<T>(*)[kTerms<T>]>(&packed);
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_split<T>(acc[m][i], b_fragments[i], terms);
      }
    };

    const bool is_short = kInTurns && steps <= 1;
    if (is_short) {
      if (is_new) {
        if (steps > 0) fill(0);
        __syncthreads();
      }
      cp_async_wait<kStages - 1>();
      if (steps > 0) take_b(0);
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (8 * kRowBlocks * stage >= num_rows) break;
      float acc[kRowBlocks][4][4] = {};
      if (is_short) {
        if (steps > 0) add_ranks(acc, stage, 0);
      } else if constexpr (kAnyRank) {
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          if (step % kMaxSteps == 0 && (is_new || steps > kMaxSteps)) {
            if (!is_new || step > 0 || stage > 0) __syncthreads();  // the h before has been read
            fill(step);
            __syncthreads();
          }
          if (kInTurns && (step > 0 || stage > 0)) copy_b(step);
          if (kInTurns) cp_async_commit();
          if (!kInTurns && step < kAhead) {
            cp_async_wait<kAhead>();  // not for y
          } else {
            cp_async_wait<kAhead - 1>();
          }
          take_b(step);
          add_ranks(acc, stage, step);
          if (!kInTurns && step + kAhead < steps) copy_b(step + kAhead);
          if (!kInTurns) cp_async_commit();
        }
      }

      // Add to y: the lanes of the MMAs to the tile, the tile to memory.
      cp_async_wait<kStages - 1>();
      cp_async_commit();
      __syncwarp();
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int j = 0; is_half<T> && j < 2; ++j)
          unscale(acc[m], j, scales[(stage * kRowBlocks + m) * 8 + 2 * q + j]);
        if (of.bias != nullptr) add_bias(acc[m], bias);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = (stage * kRowBlocks + m) * 8 + 2 * q + j;
          Row8<Out> sums = y_tile.row8(2 * q, row - 2 * q, g);
          sums.add(acc[m], j);
          y_tile.set_row8(2 * q, row - 2 * q, g, sums);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = stage * kStageRows; i < (stage + 1) * kStageRows; ++i) {
        if (i * kYRows + y_row < live_rows)
          store_piece<kAligned>(target_of(i), *y_tile.at(y_row, i * kYRows, y_chunk), y_count);
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // the tiles have been read
  }
}

}  // namespace lorakit
