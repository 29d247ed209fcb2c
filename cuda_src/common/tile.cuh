// A tile of rows in shared memory.
#pragma once

#include <common/ptx.cuh>

namespace lorakit {

// Rows of kCols elements. The eight rows that one ldmatrix reads fall into different banks: each row is followed by
// 16 unused bytes or its 16-byte chunks are swizzled. Swizzled rows are for copies of global memory: cp.async reads a
// 32-byte sector twice whose halves go to different sectors of shared memory, as in rows 16 bytes apart from that.
template <typename T, int kCols, bool kSwizzled = false>
struct SharedTile {
  static_assert(kCols % 16 == 0, "a tile is read in steps of 16 columns");
  static_assert(!kSwizzled || kCols * sizeof(T) % 128 == 0, "eight chunks are swizzled among themselves");
  static constexpr int kStride = kCols + (kSwizzled ? 0 : kPer16Bytes<T>);

  T* data;

  __device__ T* at(int row, int col) const { return at(0, 0, row, col); }

  // Element (row + r, col + c), `row` a multiple of 8, `col` of 16 or 32, and `c` below that: what lanes share is apart.
  __device__ T* at(int row, int col, int r, int c) const {
    if constexpr (!kSwizzled) return data + (row + r) * kStride + col + c;
    constexpr int kEight = 8 * kPer16Bytes<T>;
    const int lane_part = r * kStride + (c ^ (r & 7) * kPer16Bytes<T>);
    return data + row * kStride + col / kEight * kEight + (lane_part ^ col % kEight);
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

}  // namespace lorakit
