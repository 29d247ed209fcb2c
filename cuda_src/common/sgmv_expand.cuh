// What the kernels of expand share: the slices, tiles of a warp, and the operands of their MMAs.
//
// Columns of y are the 16 rows of an MMA and rows of h its 8 columns. Each sum has one order: 16 ranks at a time, then
// the bias, then y.
#pragma once

#include <common/mma.cuh>
#include <common/reduce.cuh>
#include <common/sgmv.cuh>

namespace lorakit {

constexpr int kWarpN = 64;  // columns of y that a warp makes

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
      // bfloat16 is the upper half of a float: two instructions, not three.
      if constexpr (!is_half<T>) return {{__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000)}};
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

  // Add the sums of columns_a's MMAs: of the first or of the second of a lane's two rows.
  __device__ void add(const float (&acc)[4][4], int j) {
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      const auto old = pair(n / 2);
      set_pair(n / 2, old.at[0] + acc[n % 4][j + n / 4 * 2], old.at[1] + acc[n % 4 + 1][j + n / 4 * 2]);
    }
  }
};

// Sums of columns_a's MMAs: element j + n / 4 * 2 of MMA n % 4 is column n of a lane's first or second row.
template <typename T>
__device__ void add_bias(float (&acc)[4][4], const Row8<T>& bias) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) acc[n % 4][j + n / 4 * 2] += bias.pair(n / 2).at[n % 2];
  }
}
__device__ inline void unscale(float (&acc)[4][4], int j, float scale) {
  const float factor = 1.0f / scale;
#pragma unroll
  for (int n = 0; n < 8; ++n) acc[n % 4][j + n / 4 * 2] *= factor;
}

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

}  // namespace lorakit
