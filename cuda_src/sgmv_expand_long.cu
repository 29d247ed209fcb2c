// Segmented LoRA products, the second half, for long segments and more than 16 ranks of 16-bit B: the sums of
// sgmv_expand.cu, in the same order.
//
//   expand   y[t, n] += sum over r < rank of h[t, r] * lora_b[s, n, r] + bias[s, n]
//
// MMAs, L2 (B, and h) and memory (y) each take a large part of the time, so all three must be busy at once: steps of
// 16 ranks follow one another from unit to unit without a break, B three steps ahead and y a unit ahead.
#include <common/sgmv_expand.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kColumnWarps = 4;                 // side by side
constexpr int kBlockN = kColumnWarps * kWarpN;  // columns of y
constexpr int kWarpRows = 64, kWarpEights = 8;  // rows of a warp, and by eights
constexpr int kRing = 4;                        // steps of B in shared memory

// Any grid, 128 * kRowWarps threads. A unit is 64 * kRowWarps rows of an item and 256 neighbouring columns, of which a
// warp makes 64 columns of 64 rows. A block takes runs of up to run_units units in turn. Rounds once, when y is stored.
//
// After shrink it starts before that has ended, and then reads all but h. Nothing is __restrict__: what the kernels
// before write would be read ahead of the wait for them.
template <typename T, typename Out, int kRowWarps, int kMaxSteps>
__global__ void __launch_bounds__(kColumnWarps * kRowWarps * kWarpSize, kRowWarps == 1 ? 2 : 1)
    sgmv_expand_long_kernel(const float* h,  // [total_tokens, h_stride]
                            const __grid_constant__ ExpandSlices<T, Out> slices,
                            const int* rows,   // [max_items, tiles * 64 * kRowWarps]
                            const int* items,  // [1 + max_items, 4]
                            int tiles,         // of an item's rows
                            int num_slices, int run_units, int h_stride, bool is_after_shrink) {
  constexpr int kRows = kWarpRows * kRowWarps, kEights = kRows / 8, kWarps = kColumnWarps * kRowWarps;
  constexpr bool kYAhead = sizeof(Out) == 2;                                  // y in tiles, or where it is
  constexpr int kYChunks = kYAhead ? kWarpRows * WarpTile<Out>::kChunks : 0;  // of a warp
  constexpr int kBChunks = 16 * WarpTile<T>::kChunks;                         // of a step
  constexpr int kYRows = WarpTile<Out>::kRowsAtOnce, kYLoads = kWarpRows / kYRows;
  constexpr int kBPiece = kPer16Bytes<T>, kYPiece = kPer16Bytes<Out>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
  const int row_warp = warp % kRowWarps, column_warp = warp / kRowWarps;
  SharedMemory shared;
  const WarpTile<Out> y_tile{shared.take<Vector<unsigned, 4>>(kWarps * kYChunks) + warp * kYChunks};
  auto* const b_ring =
      shared.take<Vector<unsigned, 4>>(kColumnWarps * kRing * kBChunks) + column_warp * kRing * kBChunks;
  auto* const fragments = shared.take<Vector<unsigned, 4>>(kEights * kMaxSteps * kWarpSize);
  auto* const scales = shared.take<float>(kRows);
  auto* const places = shared.take<unsigned>(kRows);             // the rows
  auto* const offsets = shared.take<unsigned long long>(kRows);  // of them in y, in bytes

  // This lane's part of the tiles: the swizzle is the same 16 rows of y further, and for two ranks of B.
  Vector<unsigned, 4>* y_own[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    y_own[i] = y_tile.at(lane / WarpTile<Out>::kChunks, i * kYRows, lane % WarpTile<Out>::kChunks);
  const WarpTile<T> b_tile{b_ring};
  const Vector<unsigned, 4>* const b_own[2] = {b_tile.at(4 * q, 0, g), b_tile.at(4 * q, 2, g)};
  const auto* const own_fragments = fragments + row_warp * kWarpEights * kMaxSteps * kWarpSize + lane;

  if (!is_after_shrink) griddepcontrol_wait();
  int slice_runs[kMaxSlices], tile_runs = 0;
#pragma unroll
  for (int i = 0; i < kMaxSlices; ++i) {
    slice_runs[i] =
        i < num_slices ? ceil_div(ceil_div(static_cast<int>(slices.at[i].out_dim), kBlockN), run_units) : 0;
    tile_runs += slice_runs[i];
  }
  const int runs = num_items(items) * tiles * tile_runs;
  if (runs == 0) griddepcontrol_wait();  // nobody else would

  // A run of units of the same rows and the same slice. Runs beside each other have columns beside each other, and take
  // turns in them: so that memory sees whole rows of y.
  for (int index = blockIdx.x; index < runs; index += gridDim.x) {
    const int tile = index / tile_runs;
    int slice = 0, first_block = index % tile_runs, stride = slice_runs[0];
#pragma unroll
    for (int i = 1; i < kMaxSlices; ++i) {
      if (slice == i - 1 && first_block >= stride) {
        first_block -= stride;
        slice = i;
        stride = slice_runs[i];
      }
    }
    const auto& of = slices.at[slice];
    const int run = ceil_div(ceil_div(static_cast<int>(of.out_dim), kBlockN) - first_block, stride);
    stride *= kBlockN;  // columns from unit to unit
    const Item item = load_item(items, tile / tiles);
    const int num_rows = min(item.rows - tile % tiles * kRows, kRows);
    if (num_rows <= 0) continue;
    const int rank = rank_of(item, of.slot_ranks, static_cast<int>(of.max_lora_rank));
    const int steps = ceil_div(rank, 16);
    __syncthreads();  // the run before is done
    if (threadIdx.x < kRows) {
      const unsigned row =
          threadIdx.x < num_rows ? rows[static_cast<long long>(tile) * kRows + threadIdx.x] : 0;
      places[threadIdx.x] = row;
      offsets[threadIdx.x] = row * static_cast<unsigned long long>(of.y_stride);
    }
    __syncthreads();

    // B: the next step of the run on its way to the ring. The warps of the same columns share the work.
    constexpr int kOwnRanks = 16 / kRowWarps;
    const int b_row = lane / WarpTile<T>::kChunks, b_chunk = lane % WarpTile<T>::kChunks;
    const int own_rank = row_warp * kOwnRanks;
    const int warp_col = first_block * kBlockN + column_warp * kWarpN;
    const int num_cols = static_cast<int>(of.out_dim) - warp_col;
    const T* b = of.lora_b + item.slot * of.slot_stride + (own_rank + b_row) * of.rank_stride + warp_col +
                 b_chunk * kBPiece;
    const T* from = b;
    int copy_slot = 0, steps_left = steps, units_left = steps > 0 ? run : 0;
    int ranks_left = b_chunk * kBPiece < num_cols ? rank - own_rank - b_row : 0;
    const auto copy_b = [&] {
      if (units_left > 0) {
        const WarpTile<T> to{b_ring + copy_slot * kBChunks};
#pragma unroll
        for (int i = 0; i < kOwnRanks; i += WarpTile<T>::kRowsAtOnce)
          cp_async_16(to.at(b_row, own_rank + i, b_chunk), from + i * of.rank_stride,
                      ranks_left > i ? 16 : 0);
        copy_slot = (copy_slot + 1) % kRing;
        from += 16 * of.rank_stride;
        ranks_left -= 16;
        if (--steps_left == 0) {  // the next unit
          --units_left;
          steps_left = steps;
          from = b += stride;
          ranks_left =
              (run - units_left) * stride + b_chunk * kBPiece < num_cols ? rank - own_rank - b_row : 0;
        }
      }
      cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kRing - 1; ++i) copy_b();

    // y: the next unit's on its way to the warp's tile. A lane moves 16 bytes of every kYRows-th row.
    const int own_row = row_warp * kWarpRows, own_rows = num_rows - own_row;
    const int y_row = lane / WarpTile<Out>::kChunks, y_chunk = lane % WarpTile<Out>::kChunks;
    const auto* const y_offsets = offsets + own_row + y_row;
    unsigned live_rows = 0;  // a bit for each
#pragma unroll
    for (int i = 0; i < kYLoads; ++i) live_rows |= (i * kYRows + y_row < own_rows) << i;
    Out* y = of.y + warp_col;
    const auto copy_y = [&](int columns) {
      const unsigned live = y_chunk * kYPiece < columns ? live_rows : 0;
      unsigned long long own_offsets[kYLoads];  // all at once, as copies stay in order with other reads
#pragma unroll
      for (int i = 0; kYAhead && i < kYLoads; ++i) own_offsets[i] = y_offsets[i * kYRows];
#pragma unroll
      for (int i = 0; kYAhead && i < kYLoads; ++i)
        cp_async_16(y_own[i % 4] + i / 4 * 4 * kWarpSize, advance(y + y_chunk * kYPiece, own_offsets[i]),
                    live >> i & 1 ? 16 : 0);
      cp_async_commit();
    };
    copy_y(num_cols);

    // h as the terms and fragments that the MMAs want, of up to kMaxSteps * 16 ranks: a lane has ranks 4q .. 4q + 3 of
    // row g of an eight.
    if (is_after_shrink) griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const auto load_h = [&](float (&values)[4], int eight, int step) {
      const int row = 8 * eight + g, live_ranks = row < num_rows ? rank - 16 * step - 4 * q : 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) values[n] = 0.0f;
      if (live_ranks > 0) {
        const unsigned long long h_row =
            places[row] * static_cast<unsigned long long>(h_stride * sizeof(float));
        load_four<true>(values, advance(h + of.h_col + 16 * step + 4 * q, h_row), live_ranks);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) values[n] = n < live_ranks ? values[n] : 0.0f;
    };
    if constexpr (is_half<T>) {
      for (int eight = warp; eight < kEights; eight += kWarps) {
        float largest = 0.0f;
        for (int step = 0; step < steps; ++step) {
          float values[4];
          load_h(values, eight, step);
#pragma unroll
          for (int n = 0; n < 4; ++n) largest = fmaxf(largest, fabsf(values[n]));
        }
        const float scale = scale_of(quad_max(largest));
        if (q == 0) scales[8 * eight + g] = scale;
      }
      __syncwarp();
    }
    const auto fill = [&](int first_step) {
      const int some_steps = min(steps - first_step, kMaxSteps);
      for (int eight = warp; eight < kEights; eight += kWarps) {
#pragma unroll 8
        for (int step = 0; step < some_steps; ++step) {
          float values[4];
          load_h(values, eight, first_step + step);
#pragma unroll
          for (int n = 0; is_half<T> && n < 4; ++n) values[n] *= scales[8 * eight + g];
          FragmentB<T> terms[kTerms<T>];
          split<T>(terms, values);
          fragments[(eight * kMaxSteps + step) * kWarpSize + lane] =
              *reinterpret_cast<const Vector<unsigned, 4>*>(&terms);
        }
      }
    };
    if (steps <= kMaxSteps) fill(0);
    __syncthreads();

    int slot = 0;
    for (int i = 0; i < run; ++i) {
      const int columns = num_cols - i * stride;  // of y, from the warp's first on
      float acc[kWarpEights][4][4] = {};
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        if (steps > kMaxSteps && step % kMaxSteps == 0) {
          __syncthreads();  // the h before has been read
          fill(step);
          __syncthreads();
        }
        if (step < kRing - 1) {  // y was asked for after B
          cp_async_wait<kRing - 1>();
        } else {
          cp_async_wait<kRing - 2>();
        }
        if constexpr (kRowWarps == 1) {
          __syncwarp();
        } else {
          named_barrier(1 + column_warp, kRowWarps * kWarpSize);
        }
        // All copies of this step are here, and the step before has been read.
        const int first_chunk = slot * kBChunks;
        slot = (slot + 1) % kRing;
        Row8<T> ranks[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) ranks[n] = {{b_own[n / 2][first_chunk + n % 2 * WarpTile<T>::kChunks]}};
        copy_b();  // while those come
        FragmentA<T> b_fragments[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) b_fragments[n] = columns_a(ranks, n);
        const auto* const own = own_fragments + step % kMaxSteps * kWarpSize;
#pragma unroll
        for (int m = 0; m < kWarpEights; ++m) {
          const Vector<unsigned, 4> packed = own[m * kMaxSteps * kWarpSize];
          const auto& terms = *reinterpret_cast<const FragmentB<T>(*)[kTerms<T>]>(&packed);
#pragma unroll
          for (int n = 0; n < 4; ++n) mma_split<T>(acc[m][n], b_fragments[n], terms);
        }
      }

      // Add to y: the lanes of the MMAs to the tile, the tile to memory.
      if (steps >= kRing - 1) {  // as many of B were asked for after y
        cp_async_wait<kRing - 1>();
      } else if (steps == kRing - 2) {
        cp_async_wait<kRing - 2>();
      } else {
        cp_async_wait<0>();
      }
      __syncwarp();
      Row8<T> bias{};
      if (of.bias != nullptr)
        load_row<false>(bias, of.bias + (item.slot + 1) * of.out_dim - columns + g * 8, 1, columns - g * 8);
#pragma unroll
      for (int m = 0; m < kWarpEights; ++m) {
#pragma unroll
        for (int j = 0; is_half<T> && j < 2; ++j) unscale(acc[m], j, scales[own_row + 8 * m + 2 * q + j]);
        if (of.bias != nullptr) add_bias(acc[m], bias);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = 8 * m + 2 * q + j;
          const bool is_live = row < own_rows && g * 8 < columns;
          Row8<Out> sums{};
          if constexpr (kYAhead) {
            sums = y_tile.row8(2 * q, row - 2 * q, g);
          } else {
            if (is_live) load_row<true>(sums, advance(y + g * 8, offsets[own_row + row]), 1, 8);
          }
          sums.add(acc[m], j);
          if constexpr (kYAhead) {
            y_tile.set_row8(2 * q, row - 2 * q, g, sums);
          } else {
            if (is_live) {
#pragma unroll
              for (int n = 0; n < Row8<Out>::kPieces; ++n)
                store_piece<true>(advance(y + g * 8 + n * kYPiece, offsets[own_row + row]), sums.pieces[n],
                                  kYPiece);
            }
          }
        }
      }
      if constexpr (kYAhead) {
        __syncwarp();
        const unsigned live = y_chunk * kYPiece < columns ? live_rows : 0;
#pragma unroll
        for (int i = 0; i < kYLoads; ++i) {
          if (live >> i & 1)
            store_piece<true>(advance(y + y_chunk * kYPiece, y_offsets[i * kYRows]),
                              y_own[i % 4][i / 4 * 4 * kWarpSize], kYPiece);
        }
      }
      y += stride;
      if (i + 1 < run) copy_y(columns - stride);
    }
    cp_async_wait<0>();
  }
}

}  // namespace lorakit
