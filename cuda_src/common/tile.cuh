// A tile of rows in shared memory, filled from global memory.
#pragma once

#include <common/ptx.cuh>

namespace lorakit {

// Rows of kCols elements, each followed by 16 unused bytes so that the eight rows one ldmatrix reads fall
// into different banks.
template <typename T, int kCols>
struct SharedTile {
  static_assert(kCols % 16 == 0, "a tile is read in steps of 16 columns");
  static constexpr int kStride = kCols + kPer16Bytes<T>;

  T* data;

  __device__ T* at(int row, int col) const { return data + row * kStride + col; }
};

// The same without unused bytes: in each 128 bytes of a row the 16-byte chunks are swizzled. So cp.async fills all
// of a 32-byte sector with one of global memory, which it would read twice for rows 16 bytes apart from that.
template <typename T, int kCols>
struct SwizzledRows {
  static_assert(kCols * sizeof(T) % 128 == 0, "a row is made of 128 bytes");
  static constexpr int kStride = kCols;

  T* data;

  __device__ T* at(int row, int col) const {
    constexpr int kChunk = kPer16Bytes<T>;
    return data + row * kStride + (col / kChunk ^ row % 8) * kChunk + col % kChunk;
  }
};

// Rows of 128 bytes. Their 16-byte chunks are swizzled, so that the same chunk of eight rows is in different banks.
struct SwizzledTile {
  static constexpr int kChunks = 8;

  Vector<unsigned, 4>* data;

  __device__ Vector<unsigned, 4>* at(int row, int chunk) const {
    return data + row * kChunks + (chunk ^ row % kChunks);
  }
  // Elements `col`, an even one, and the next.
  template <typename T>
  __device__ const Vector<T, 2>* pair(int row, int col) const {
    return reinterpret_cast<const Vector<T, 2>*>(at(row, col / kPer16Bytes<T>)) + col % kPer16Bytes<T> / 2;
  }
};

// Fill kRows rows of a tile. `row_pointer(row)` is where a row starts in global memory, or null for a row of
// zeros; columns from `cols` on become zeros. Nothing outside is read, so that whatever lies there, NaN
// too, never enters a product. `somewhere` is any valid global address.
//
// kAligned: every row starts at a multiple of 16 bytes, `cols` is a multiple of 16 bytes and col_stride is 1.
// Then the copy is asynchronous: commit and wait. Otherwise elements are copied one by one, at once.
template <int kRows, int kThreads, bool kAligned, typename T, int kCols, typename RowPointer>
__device__ void load_tile(SharedTile<T, kCols> tile, int cols, long long col_stride, const T* somewhere,
                          RowPointer row_pointer) {
  constexpr int kStep = kAligned ? kPer16Bytes<T> : 1;
  constexpr int kChunks = kCols / kStep;
  for (int chunk = threadIdx.x; chunk < kRows * kChunks; chunk += kThreads) {
    const int row = chunk / kChunks;
    const int col = chunk % kChunks * kStep;
    const T* source = row_pointer(row);
    const bool live = source != nullptr && col < cols;
    if constexpr (kAligned) {
      cp_async_16(tile.at(row, col), live ? source + col : somewhere, live ? 16 : 0);
    } else {
      *tile.at(row, col) = live ? source[col * col_stride] : from_float<T>(0.0f);
    }
  }
}

}  // namespace lorakit
