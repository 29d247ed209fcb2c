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
#include <common/mma.cuh>
#include <common/reduce.cuh>
#include <common/sgmv.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpN = 64;  // columns of y that a warp makes
constexpr int kPartsAtOnce = 8;

template <typename T, typename Out>
struct ExpandSlices {
  struct {
    const T* lora_b;        // [max_num_loras, out_dim, max_lora_rank] by strides
    const T* bias;          // [max_num_loras, out_dim] or null
    const int* slot_ranks;  // [max_num_loras] or null
    Out* y;                 // [total_tokens, out_dim], rows y_stride bytes apart
    long long max_lora_rank, out_dim, slot_stride, rank_stride, stride, y_stride;
    long long first_block;  // of 256 columns, counted over all slices
    long long h_col;        // first column in h
  } at[kMaxSlices];
};

// Eight neighbouring elements of a row, as words: halves of registers are slow to keep.
template <typename T>
struct Row8 {
  static constexpr int kPieces = 8 / kPer16Bytes<T>;
  Vector<unsigned, 4> pieces[kPieces];

  __device__ unsigned word(int i) const { return pieces[i / 4].at[i % 4]; }
  __device__ Vector<float, 2> pair(int i) const {
    if constexpr (sizeof(T) == 4) {
      return {{__uint_as_float(word(2 * i)), __uint_as_float(word(2 * i + 1))}};
    } else {
      const unsigned both = word(i);
      const auto two = *reinterpret_cast<const Vector<T, 2>*>(&both);
      return {{to_float(two.at[0]), to_float(two.at[1])}};
    }
  }
  __device__ void set_pair(int i, float first, float second) {
    if constexpr (sizeof(T) == 4) {
      pieces[i / 2].at[i % 2 * 2] = __float_as_uint(first);
      pieces[i / 2].at[i % 2 * 2 + 1] = __float_as_uint(second);
    } else {
      pieces[i / 4].at[i % 4] = pack<T>(first, second);
    }
  }
};

template <bool kAligned, typename T>
__device__ void load_row(Row8<T>& to, const T* from, long long stride, int count) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < Row8<T>::kPieces; ++i)
      to.pieces[i] = reinterpret_cast<const Vector<unsigned, 4>*>(from)[i];
  } else {
    T elements[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) elements[i] = from[i * stride];
    }
    to = *reinterpret_cast<const Row8<T>*>(&elements);
  }
}

template <bool kAligned, typename T>
__device__ void store_piece(T* to, const Vector<unsigned, 4>& piece, int count) {
  if constexpr (kAligned) {
    *reinterpret_cast<Vector<unsigned, 4>*>(to) = piece;
  } else {
    const auto& elements = reinterpret_cast<const Piece<T>&>(piece);
#pragma unroll
    for (int i = 0; i < kPer16Bytes<T>; ++i) {
      if (i < count) to[i] = elements.at[i];
    }
  }
}

// A warp's 64 columns of some rows in shared memory. Between global memory and here eight lanes move 128
// neighbouring bytes, or L2 would be asked four times as often; an MMA's lane takes eight columns of a row.
template <typename T>
struct WarpTile {
  static constexpr int kChunks = kWarpN / kPer16Bytes<T>;  // of 16 bytes, of a row
  static constexpr int kRowsAtOnce = kWarpSize / kChunks;  // that a warp moves
  Vector<unsigned, 4>* memory;                             // [rows][kChunks]

  // Swizzled: no two lanes are in one bank when a quarter of a warp takes two neighbouring chunks of rows 0, 2, 4, 6,
  // or of rows 0, 4, 8, 12.
  __device__ static constexpr int swizzle(int row) {
    return ((row >> 1 ^ row >> 3) & 1) << 2 | (row >> 2 & 1) << 1;
  }
  // Of row `row` + `more`, which have no bit in common: what depends on the lane is apart from what does not.
  __device__ Vector<unsigned, 4>* at(int row, int more, int chunk) const {
    return memory + (row + more) * kChunks + (chunk ^ swizzle(row) ^ swizzle(more));
  }
  __device__ Row8<T> row8(int row, int more, int eight) const {
    Row8<T> columns;
#pragma unroll
    for (int i = 0; i < Row8<T>::kPieces; ++i)
      columns.pieces[i] = *at(row, more, eight * Row8<T>::kPieces + i);
    return columns;
  }
  __device__ void set_row8(int row, int more, int eight, const Row8<T>& columns) const {
#pragma unroll
    for (int i = 0; i < Row8<T>::kPieces; ++i)
      *at(row, more, eight * Row8<T>::kPieces + i) = columns.pieces[i];
  }
};

template <bool kAligned>
__device__ void load_four(float (&to)[4], const float* from, int count) {
  if constexpr (kAligned) {
    *reinterpret_cast<Vector<float, 4>*>(&to) = *reinterpret_cast<const Vector<float, 4>*>(from);
  } else {
    for (int i = 0; i < 4 && i < count; ++i) to[i] = from[i];
  }
}

// Of four ranks of eight columns; rows g and g + 8 of the MMA are columns i and i + 4.
template <typename T>
__device__ FragmentA<T> columns_a(const Row8<T> (&b)[4], int i) {
  if constexpr (sizeof(T) == 2) {
    const unsigned which = i % 2 == 0 ? 0x5410 : 0x7632;  // the lower halves of two pairs, or the upper ones
    const int low = i / 2, high = i / 2 + 2;
    return {{__byte_perm(b[0].word(low), b[1].word(low), which),
             __byte_perm(b[0].word(high), b[1].word(high), which),
             __byte_perm(b[2].word(low), b[3].word(low), which),
             __byte_perm(b[2].word(high), b[3].word(high), which)}};
  } else {
    const auto at = [&](int rank, int n) { return __uint_as_float(b[rank].word(n)); };
    return {{at(0, i), at(1, i), at(0, i + 4), at(1, i + 4), at(2, i), at(3, i), at(2, i + 4), at(3, i + 4)}};
  }
}

// The power of two that brings the largest of a row's h just under 2^15, for float16, whose range a float32
// rank vector may leave; 1 for the other types and for rows that are zero or not finite.
__device__ inline float scale_of(float largest) {
  if (largest == 0.0f || largest == infinity()) return 1.0f;
  int exponent;
  frexpf(largest, &exponent);
  return ldexpf(1.0f, 15 - max(exponent, -100));
}

template <typename T, typename Out, int kItemRows, int kRowBlocks, bool kAligned>
constexpr int kExpandBlocks = kRowBlocks > 2                ? 2
                              : !kAligned || sizeof(T) == 4 ? 1
                              : kItemRows == 16             ? 4
                              : kItemRows == 64             ? sizeof(Out) == 4 ? 2 : 5
                                                            : 7;  // of a multiprocessor

// Any grid, 128 threads. A block takes 4 * 64 neighbouring columns and all rows of an item, then the next of its
// share of such units; a warp makes 64 columns of one slice, kRowBlocks times 8 rows at a time. Rounds once, when y is stored.
//
// h goes to shared memory as the terms and fragments that the MMAs want, kMaxSteps times 16 ranks at a time. Items of
// 64 rows have h in one part.
//
// After shrink it starts before that has ended, and then reads all but h. Nothing is __restrict__: what the kernels
// before write would be read ahead of the wait for them.
template <typename T, typename Out, int kItemRows, int kRowBlocks, bool kAligned>
__global__ void __launch_bounds__(kThreads, (kExpandBlocks<T, Out, kItemRows, kRowBlocks, kAligned>))
    sgmv_expand_kernel(const float* h,  // [parts, total_tokens, h_stride]
                       const __grid_constant__ ExpandSlices<T, Out> slices,
                       const int* rows,   // [max_items, kItemRows]
                       const int* items,  // [1 + max_items, 4]
                       int total_tokens, int num_slices, int column_blocks, int parts, int h_stride,
                       bool is_after_shrink) {
  constexpr int kEights = kItemRows / 8, kStages = kEights / kRowBlocks;
  constexpr bool kInTurns = kStages > 1;                               // rows
  constexpr bool kAnyRank = !kInTurns || !kAligned || sizeof(T) == 4;  // else up to 16
  constexpr int kMaxSteps = kInTurns ? 1
                            : kRowBlocks == 8 && sizeof(Out) == 4
                                ? 4
                                : 8;  // of which h is in shared memory at once
  constexpr int kAhead = kInTurns                              ? 1
                         : kRowBlocks == 8 && sizeof(Out) == 2 ? 4
                                                               : 2;  // steps of B on their way
  constexpr int kYChunks = kItemRows * WarpTile<Out>::kChunks,
                kBChunks = 16 * WarpTile<T>::kChunks;  // of a warp
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
  SharedMemory shared;
  const WarpTile<Out> y_tile{shared.take<Vector<unsigned, 4>>(kWarps * kYChunks) + warp * kYChunks};
  auto* const b_tiles =
      shared.take<Vector<unsigned, 4>>(kWarps * kAhead * kBChunks) + warp * kAhead * kBChunks;
  auto* const fragments = shared.take<Vector<unsigned, 4>>(kEights * kMaxSteps * kWarpSize);
  auto* const scales = shared.take<float>(kItemRows);
  auto* const places = shared.take<unsigned>(kItemRows);  // the item's rows
  if (!is_after_shrink) griddepcontrol_wait();
  const int units = num_items(items) * column_blocks;
  if (units == 0) griddepcontrol_wait();  // nobody else would

  const int first_unit = static_cast<int>(static_cast<long long>(units) * blockIdx.x / gridDim.x);
  const int last_unit = static_cast<int>(static_cast<long long>(units) * (blockIdx.x + 1) / gridDim.x);

  int item_index = -1, slice = -1;
  Item item{};
  for (int unit = first_unit; unit < last_unit; ++unit) {
    // Which rows, and which columns, of the warp and of the lane in an MMA.
    const int column_block = unit % column_blocks, old_item = item_index, old_slice = slice;
    item_index = unit / column_blocks;
    slice = 0;
    while (slice + 1 < num_slices && column_block >= slices.at[slice + 1].first_block) ++slice;
    const bool is_new = item_index != old_item || slice != old_slice;
    if (item_index != old_item) {
      item = load_item(items, item_index);
      if (old_item >= 0) __syncthreads();  // the rows have been read
      if (threadIdx.x < kItemRows)
        places[threadIdx.x] = rows[static_cast<long long>(item_index) * kItemRows + threadIdx.x];
      __syncthreads();
    }
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
    const auto target_of = [&](int row) {
      const unsigned long long stride = of.y_stride;
      return advance(y, places[row] * (kAligned ? stride & 0xffffffff : stride));
    };
    const int live_rows = y_count > 0 ? item.rows : 0;
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {  // first, as the products wait for it
      if (step < steps) copy_b(step);
      if (!kInTurns) cp_async_commit();
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
#pragma unroll
      for (int i = 0; i < 8 * kRowBlocks; i += WarpTile<Out>::kRowsAtOnce) {
        const int row = stage * 8 * kRowBlocks + i + y_row;
        if (row < live_rows)
          copy_piece<kAligned>(y_tile.at(y_row, row - y_row, y_chunk), target_of(row), 1, y_count);
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
      const int live_ranks = row < item.rows ? rank - 16 * step - 4 * q : 0;
      const float* from = advance(h + of.h_col + 4 * q + 16 * step,
                                  places[row] * static_cast<unsigned long long>(h_stride * sizeof(float)));
#pragma unroll
      for (int n = 0; n < 4; ++n) values[n] = 0.0f;
      if constexpr (kItemRows == 64) {
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
      constexpr int kAtOnce = kItemRows < 64 ? 1 : kMaxSteps == 1 ? kOwnEights : 4;
      float values[kAtOnce][4];
      if constexpr (kMaxSteps == 1) {
#pragma unroll
        for (int i = 0; i < kOwnEights; ++i) load_h(values[i], warp + i * kWarps, first_step);
#pragma unroll
        for (int i = 0; i < kOwnEights; ++i) put_h(values[i], warp + i * kWarps, first_step);
      } else {
        const int last_step = min(first_step + kMaxSteps, steps);
#pragma unroll 1
        for (int eight = warp % kEights; eight < kEights; eight += kWarps) {
#pragma unroll 1
          for (int step = first_step + warp / kEights; step < last_step; step += kTeams * kAtOnce) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) load_h(values[i], eight, step + i);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) put_h(values[i], eight, step + i);
          }
        }
      }
    };

    float acc[kRowBlocks][4][4];
    // A bias is added at the end where sums are scaled.
    const auto start_sums = [&] {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int n = 0; n < 8; ++n)
          acc[m][n % 4][n / 4 * 2] = acc[m][n % 4][n / 4 * 2 + 1] =
              is_half<T> ? 0.0f : bias.pair(n / 2).at[n % 2];
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
    const auto add_ranks = [&](int stage, int step) {
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
      if (8 * kRowBlocks * stage >= item.rows) break;
      start_sums();
      if (is_short) {
        if (steps > 0) add_ranks(stage, 0);
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
          add_ranks(stage, step);
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
        for (int j = 0; j < 2; ++j) {
          const int row = (stage * kRowBlocks + m) * 8 + 2 * q + j;
          const float unscale = is_half<T> ? 1.0f / scales[row] : 1.0f;
          Row8<Out> sums = y_tile.row8(2 * q, row - 2 * q, g);
#pragma unroll
          for (int n = 0; n < 8; n += 2) {
            float first = acc[m][n % 4][j + n / 4 * 2], second = acc[m][n % 4 + 1][j + n / 4 * 2];
            if constexpr (is_half<T>) {
              first = first * unscale + bias.pair(n / 2).at[0];
              second = second * unscale + bias.pair(n / 2).at[1];
            }
            const auto old = sums.pair(n / 2);
            sums.set_pair(n / 2, old.at[0] + first, old.at[1] + second);
          }
          y_tile.set_row8(2 * q, row - 2 * q, g, sums);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 8 * kRowBlocks; i += WarpTile<Out>::kRowsAtOnce) {
        const int row = stage * 8 * kRowBlocks + i + y_row;
        if (row < live_rows)
          store_piece<kAligned>(target_of(row), *y_tile.at(y_row, row - y_row, y_chunk), y_count);
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // the tiles have been read
  }
}

}  // namespace lorakit
