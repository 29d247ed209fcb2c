// One warp's product D[16 x 8] += A[16 x 16] B[16 x 8] for every storage type, float32 accumulators.
//
// 16-bit types use the tensor cores. float32 has no tensor-core instruction that keeps its precision, so
// the same fragments, an element of T where the 16-bit ones have half a register, are multiplied with FMAs,
// their elements passed between lanes by shuffles.
//
// Layout, with g = lane / 4 and c = 2 * (lane % 4): a lane holds
//   D  (g, c) (g, c+1)   (g+8, c) (g+8, c+1)
//   A  (g, c) (g, c+1)   (g+8, c) (g+8, c+1)   (g, c+8) (g, c+9)   (g+8, c+8) (g+8, c+9)
//   B  (c, g) (c+1, g)   (c+8, g) (c+9, g)
#pragma once

#include <common/tile.cuh>

namespace lorakit {

template <typename T>
struct FragmentA {
  unsigned pairs[4];
};
template <>
struct FragmentA<float> {
  float at[8];
};

template <typename T>
struct FragmentB {
  unsigned pairs[2];
};
template <>
struct FragmentB<float> {
  float at[4];
};

// ---- Load from a tile ----

// A = tile[row .. row+16, k .. k+16].
template <typename T, int kCols, bool kSwizzled>
__device__ void load_a(FragmentA<T>& a, SharedTile<T, kCols, kSwizzled> tile, int row, int k) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4(a.pairs, tile.at(row, k, lane % 16, lane / 16 * 8));
  } else {
    for (int i = 0; i < 8; ++i) {
      a.at[i] = *tile.at(row, k, lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8);
    }
  }
}

// The same from a tile whose rows are columns of A: A = tile[k .. k+16, row .. row+16] transposed.
template <typename T, int kCols, bool kSwizzled>
__device__ void load_a_cols(FragmentA<T>& a, SharedTile<T, kCols, kSwizzled> tile, int k, int row) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(a.pairs, tile.at(k, row, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
  } else {
    for (int i = 0; i < 8; ++i) {
      a.at[i] = *tile.at(k, row, lane % 4 * 2 + i % 2 + i / 4 * 8, lane / 4 + i / 2 % 2 * 8);
    }
  }
}

// B[0] and B[1]: columns n .. n+8 and n+8 .. n+16, from a tile whose rows are columns of B: tile[n, k].
template <typename T, int kCols, bool kSwizzled>
__device__ void load_b_rows(FragmentB<T> (&b)[2], SharedTile<T, kCols, kSwizzled> tile, int n, int k) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    unsigned d[4];
    ldmatrix_x4(d, tile.at(n, k, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
    b[0] = {d[0], d[1]};
    b[1] = {d[2], d[3]};
  } else {
    for (int i = 0; i < 8; ++i) {
      b[i / 4].at[i % 4] = *tile.at(n, k, i / 4 * 8 + lane / 4, lane % 4 * 2 + i % 2 + i / 2 % 2 * 8);
    }
  }
}

// The same from a tile stored as B is: tile[k, n].
template <typename T, int kCols, bool kSwizzled>
__device__ void load_b_cols(FragmentB<T> (&b)[2], SharedTile<T, kCols, kSwizzled> tile, int k, int n) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    unsigned d[4];
    ldmatrix_x4_trans(d, tile.at(k, n, lane % 16, lane / 16 * 8));
    b[0] = {d[0], d[1]};
    b[1] = {d[2], d[3]};
  } else {
    for (int i = 0; i < 8; ++i) {
      b[i / 4].at[i % 4] = *tile.at(k, n, lane % 4 * 2 + i % 2 + i / 2 % 2 * 8, i / 4 * 8 + lane / 4);
    }
  }
}

// B[0] and B[1]: columns n .. n+8 of rows k .. k+16 and of k+16 .. k+32, from a tile whose rows are columns of B.
template <typename T, int kCols, bool kSwizzled>
__device__ void load_b_steps(FragmentB<T> (&b)[2], SharedTile<T, kCols, kSwizzled> tile, int n, int k) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(T) == 2) {
    unsigned d[4];
    ldmatrix_x4(d, tile.at(n, k, lane % 8, lane / 8 * 8));
    b[0] = {d[0], d[1]};
    b[1] = {d[2], d[3]};
  } else {
    for (int i = 0; i < 8; ++i) {
      b[i / 4].at[i % 4] = *tile.at(n, k, lane / 4, lane % 4 * 2 + i % 2 + i / 2 * 8);
    }
  }
}

// ---- Multiply ----

template <typename T>
__device__ void mma(float (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16(d, a.pairs, b.pairs, T{});
  } else {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int upper = k / 8, odd = k % 2, in_quad = k % 8 / 2;  // who holds element k of a row or column
      const float a_top = __shfl_sync(kFullMask, a.at[4 * upper + odd], lane / 4 * 4 + in_quad);
      const float a_bottom = __shfl_sync(kFullMask, a.at[4 * upper + 2 + odd], lane / 4 * 4 + in_quad);
      const float b_left = __shfl_sync(kFullMask, b.at[2 * upper + odd], lane % 4 * 8 + in_quad);
      const float b_right = __shfl_sync(kFullMask, b.at[2 * upper + odd], lane % 4 * 8 + 4 + in_quad);
      d[0] = fmaf(a_top, b_left, d[0]);
      d[1] = fmaf(a_top, b_right, d[1]);
      d[2] = fmaf(a_bottom, b_left, d[2]);
      d[3] = fmaf(a_bottom, b_right, d[3]);
    }
  }
}

// ---- float32 as an operand ----

// A float32 operand becomes the sum of two 16-bit terms, the second holding what rounding the first left
// out: 16 bits of it survive in bfloat16, 22 in float16. float32 is its own single term.
template <typename T>
constexpr int kTerms = sizeof(T) == 2 ? 2 : 1;

template <typename T>
__device__ unsigned pack(float low, float high) {
  const Vector<T, 2> pair = round_pair<T>(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// The two values in a register: those of bfloat16 are the upper halves of float32.
template <typename T>
__device__ Vector<float, 2> unpack(unsigned pair) {
  if constexpr (is_half<T>) {
    const auto values = *reinterpret_cast<const Vector<T, 2>*>(&pair);
    return {{to_float(values.at[0]), to_float(values.at[1])}};
  } else {
    return {{__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)}};
  }
}

// Two values as first terms and as second terms. What rounding leaves out of a value that is not finite is nothing,
// inf - inf being NaN.
template <typename T>
__device__ void split_pair(unsigned& first, unsigned& second, float low, float high) {
  first = pack<T>(low, high);
  const auto rounded = *reinterpret_cast<const Vector<T, 2>*>(&first);
  const float low_left = low - to_float(rounded.at[0]), high_left = high - to_float(rounded.at[1]);
  second = pack<T>(fabsf(low_left) <= fabsf(low) ? low_left : 0.0f,
                   fabsf(high_left) <= fabsf(high) ? high_left : 0.0f);
}

// Terms whose sum is A, given A's eight elements of this lane.
template <typename T>
__device__ void split(FragmentA<T> (&terms)[kTerms<T>], const float (&values)[8]) {
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 4; ++i)
      split_pair<T>(terms[0].pairs[i], terms[1].pairs[i], values[2 * i], values[2 * i + 1]);
  } else {
    for (int i = 0; i < 8; ++i) terms[0].at[i] = values[i];
  }
}

// The same of two of the elements, 2 * i and the next, that are not infinite.
template <typename T>
__device__ void split_finite(FragmentA<T> (&terms)[kTerms<T>], int i, float low, float high) {
  if constexpr (sizeof(T) == 2) {
    terms[0].pairs[i] = pack<T>(low, high);
    const Vector<float, 2> rounded = unpack<T>(terms[0].pairs[i]);
    terms[1].pairs[i] = pack<T>(low - rounded.at[0], high - rounded.at[1]);
  } else {
    terms[0].at[2 * i] = low;
    terms[0].at[2 * i + 1] = high;
  }
}

// Terms whose sum is B, given B's four elements of this lane.
template <typename T>
__device__ void split(FragmentB<T> (&terms)[kTerms<T>], const float (&values)[4]) {
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 2; ++i)
      split_pair<T>(terms[0].pairs[i], terms[1].pairs[i], values[2 * i], values[2 * i + 1]);
  } else {
    for (int i = 0; i < 4; ++i) terms[0].at[i] = values[i];
  }
}

// Terms whose sum is a D, as B: what a product gave is an operand of the next, after lanes have passed it on.
template <typename T>
__device__ void split_d(FragmentB<T> (&terms)[kTerms<T>], const float (&d)[4]) {
  if constexpr (sizeof(T) == 2) {
    for (int i = 0; i < 2; ++i) {
      unsigned first, second;
      split_pair<T>(first, second, d[2 * i], d[2 * i + 1]);
      terms[0].pairs[i] = movmatrix_trans(first);
      terms[1].pairs[i] = movmatrix_trans(second);
    }
  } else {
    const int lane = threadIdx.x % kWarpSize;
    for (int i = 0; i < 4; ++i) {
      const int from = (lane % 4 * 2 + i % 2) * 4 + lane / 8;
      const float even = __shfl_sync(kFullMask, d[i / 2 * 2], from);
      const float odd = __shfl_sync(kFullMask, d[i / 2 * 2 + 1], from);
      terms[0].at[i] = lane / 4 % 2 == 0 ? even : odd;
    }
  }
}

// The small term first, so that it is not lost beside a large sum.
template <typename T>
__device__ void mma_split(float (&d)[4], const FragmentA<T>& a, const FragmentB<T> (&terms)[kTerms<T>]) {
#pragma unroll
  for (int i = kTerms<T> - 1; i >= 0; --i) mma(d, a, terms[i]);
}
template <typename T>
__device__ void mma_split(float (&d)[4], const FragmentA<T> (&terms)[kTerms<T>], const FragmentB<T>& b) {
#pragma unroll
  for (int i = kTerms<T> - 1; i >= 0; --i) mma(d, terms[i], b);
}

}  // namespace lorakit
