// Rows of a ragged batch: segment s owns rows offsets[s] .. offsets[s + 1].
#pragma once

#include <common/errors.cuh>

namespace lorakit {

// The last s in [0, count) with start(s) <= value; 0 if there is none. start must not decrease.
template <typename Start>
__device__ int last_start_before(int count, long long value, Start start) {
  int low = 0, high = count;  // the answer is in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (start(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Tile {
  int segment;     // in [0, count]; `count` is the rows past the last offset
  int begin, end;  // the segment's rows, cut to [0, total)
  int row;         // first unit of this tile, counted from the segment's first
};

// Which tile of which segment work item `item` is, when a row has `units` units and a tile kTile of them.
// Segment s gets the items from offsets[s] * units / kTile + s on, which are enough of them for it, and
// sometimes one too many: then `row` lies past the segment's end. So neither a table nor the host is
// needed, and total * units / kTile + count + 1 items serve any offsets. total * units is below 2^31.
template <int kTile>
__device__ Tile tile_of(long long item, const int* offsets, int count, int total, int units) {
  const auto start = [&](int s) { return static_cast<long long>(offsets[s]) * units / kTile + s; };
  Tile tile;
  tile.segment = last_start_before(count + 1, item, start);
  tile.begin = min(max(offsets[tile.segment], 0), total);
  tile.end = tile.segment == count ? total : min(max(offsets[tile.segment + 1], tile.begin), total);
  const long long row = (item - start(tile.segment)) * kTile;
  const bool possible = row >= 0 && row < static_cast<long long>(total) * units;
  tile.row = possible ? static_cast<int>(row) : 0;
  if (!possible) tile.end = tile.begin;  // bad offsets
  return tile;
}

// The segment of a row, or `count` past the last offset.
__device__ inline int segment_of(long long row, const int* offsets, int count) {
  return last_start_before(count + 1, row, [&](int s) { return static_cast<long long>(offsets[s]); });
}

// The first block reports offsets that decrease, do not start at `first`, or end past `first + total`.
__device__ inline void check_offsets(const int* offsets, int count, int total, unsigned* errors,
                                     int first = 0) {
  if (blockIdx.x != 0 || blockIdx.y != 0) return;
  for (int s = threadIdx.x; s <= count; s += blockDim.x) {
    const bool good = s == 0 ? offsets[0] == first : offsets[s - 1] <= offsets[s];
    if (!good || offsets[s] > static_cast<long long>(first) + total) report(errors, kBadOffsets);
  }
}

}  // namespace lorakit
