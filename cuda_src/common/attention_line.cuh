// What attention_decode.cu reads, as a line of tiles of keys: by sequence, kRows rows, key head and position.
#pragma once

#include <common/attention.cuh>
#include <common/errors.cuh>

namespace lorakit {

// Tiles of a chunk of so many keys: few, for short sequences are to keep all blocks busy; more, for a chunk costs a
// state.
template <int kTileKeys>
__device__ int chunk_tiles(int keys) {
  const int of_chunk = keys <= 512     ? 64
                       : keys <= 2048  ? 128
                       : keys <= 16384 ? 256
                                       : max(512, ceil_div(keys, 128));
  return ceil_div(of_chunk, kTileKeys);
}

struct Sequence {
  int begin, tokens;  // its rows of q
  int cached;
  int first_key, end_key;  // that one of its tokens sees
};

// The shares of a line, as even as can be: the first `more` of them have a tile more than the others.
struct Shares {
  long long each;
  int more;

  __device__ Shares(long long tiles, int count)
      : each(divide(tiles, count)), more(static_cast<int>(tiles - each * count)) {}
  __device__ long long begin(int share) const { return each * share + min(share, more); }
  __device__ int of(long long tile) const {
    const long long longer = (each + 1) * more;
    return static_cast<int>(tile < longer ? divide(tile, each + 1) : more + divide(tile - longer, each));
  }

  // In 32 bits if that is enough, without the call that a division in 64 bits is.
  static __device__ long long divide(long long a, long long b) {
    if ((a | b) >> 32 == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return a / b;
  }
};

// The few-row sequences of a batch, as a line of tiles of kTileKeys keys.
template <typename T, int kTileKeys, int kRows>
struct Line {
  AttentionOptions<T> options;
  const int* row_offsets;
  const unsigned* cache_lengths;
  unsigned* errors;
  int batch_size, total_tokens, group, n_kv_heads, head_lanes, head_dim, most_tokens;
  long long capacity;  // keys of a row of the lookup table

  // Without tokens if it has too many.
  __device__ Sequence at(int s) const {
    Sequence of{};
    if (s >= batch_size) return of;
    of.begin = min(max(row_offsets[s], 0), total_tokens);
    of.tokens = min(max(row_offsets[s + 1], of.begin), total_tokens) - of.begin;
    if (of.tokens > most_tokens) report(errors, kBadOffsets);
    if (!has_few_rows<T>(of.tokens, group, head_dim) || of.tokens > most_tokens) of.tokens = 0;
    const long long keys = static_cast<long long>(cache_lengths[s]) + of.tokens;
    if (of.tokens > 0 && keys > capacity) report(errors, kBadPage);
    of.end_key = static_cast<int>(min(keys, capacity));
    of.cached = static_cast<int>(min(static_cast<long long>(cache_lengths[s]), kMaxKeys));
    of.first_key = options.first_key(of.cached, of.end_key);
    of.end_key = options.end_key(static_cast<long long>(of.cached) + of.tokens - 1, of.end_key);
    return of;
  }
  // Of all keys at multiples of kTileKeys. A sequence with rows has one, if only to find that there is no key.
  __device__ int tiles(const Sequence& of) const {
    return max(1, ceil_div(of.end_key, kTileKeys) - of.first_key / kTileKeys);
  }
  __device__ int row_tiles(const Sequence& of) const { return ceil_div(of.tokens * group, kRows); }
  __device__ long long length(const Sequence& of) const {
    return static_cast<long long>(tiles(of)) * row_tiles(of) * (n_kv_heads / head_lanes);
  }
};

// A tile of the line, and the way to the next.
template <typename T, int kTileKeys, int kRows>
struct Cursor {
  Line<T, kTileKeys, kRows> line;
  Sequence of;
  int sequence, row_tile, kv_head, tile, tiles, chunk;
  int left;  // tiles of this chunk from this one on; 0: the share is at its end
  bool begins_chunk;
  long long position;  // on the line

  // The first tile of the first sequence from s on that has rows. All lanes look, each at one.
  __device__ void seek(int s) {
    const int lane = threadIdx.x % kWarpSize;
    for (int next = s; next < line.batch_size; next += kWarpSize) {
      const Sequence mine = line.at(next + lane);
      const unsigned found = __ballot_sync(kFullMask, mine.tokens > 0);
      if (found == 0) continue;
      const int first = __ffs(static_cast<int>(found)) - 1;
      of.begin = __shfl_sync(kFullMask, mine.begin, first);
      of.tokens = __shfl_sync(kFullMask, mine.tokens, first);
      of.cached = __shfl_sync(kFullMask, mine.cached, first);
      of.first_key = __shfl_sync(kFullMask, mine.first_key, first);
      of.end_key = __shfl_sync(kFullMask, mine.end_key, first);
      sequence = next + first;
      break;
    }
    tiles = line.tiles(of);
    chunk = chunk_tiles<kTileKeys>(tiles * kTileKeys);
    row_tile = 0;
    kv_head = blockIdx.x % line.head_lanes;
    start(0);
  }

  // At a tile where a chunk begins.
  __device__ void start(int first_tile) {
    tile = first_tile;
    begins_chunk = true;
    left = min(chunk, tiles - tile);
  }

  // To the next tile. Chunks that begin at `end` or after are of another share.
  __device__ void next(long long end) {
    if (left == 0) return;
    begins_chunk = false;
    ++tile;
    ++position;
    if (--left > 0 || position >= end) return;
    if (tile < tiles) {
      start(tile);
    } else {
      next_rows();
    }
  }

  // To the next rows of the key head, to those of the next, to the next sequence.
  __device__ void next_rows() {
    kv_head += line.head_lanes;
    if (kv_head >= line.n_kv_heads) {
      kv_head = blockIdx.x % line.head_lanes;
      if (++row_tile == line.row_tiles(of)) return seek(sequence + 1);
    }
    start(0);
  }

  __device__ int first_key() const { return (of.first_key / kTileKeys + tile) * kTileKeys; }
  __device__ int first_row() const { return row_tile * kRows; }
  __device__ int num_rows() const { return min(kRows, of.tokens * line.group - first_row()); }
  __device__ bool ends_chunk() const { return left == 1; }
  __device__ bool ends_rows() const { return tile + 1 == tiles; }
};

}  // namespace lorakit
