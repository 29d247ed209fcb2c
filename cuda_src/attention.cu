// Attention of this step's queries over the paged cache. For token t of sequence b, at position
// p = cache_lengths[b] + t - row_offsets[b], and query head h, which reads key head h / group with
// group = n_heads / n_kv_heads:
//
//   s[j] = scale * q[t, h] . key[j]    for the keys j = p - window_left .. p + window_right of the sequence;
//                                      causal: .. p; with a soft cap soft_cap * tanh(that / soft_cap)
//   sum[t, h] = sum_j exp(s[j])        with sinks plus exp(sinks[h])
//   out[t, h] = sum_j exp(s[j]) value[j] / sum[t, h]            lse[t, h] = log sum[t, h]
//
// This kernel has the sequences with many rows of queries, attention_decode.cu the others.
//
// A row that sees no key gives 0 and -inf. Never read are slots past a sequence's end, keys that no row of a
// block sees, and keys without a valid page, which are reported and masked.
//
// A block owns kBlockM rows, (token, head in group) pairs of one sequence and one key head, kRowTiles times 16 to
// a warp, so that keys read once serve the whole group. It walks over its keys kBlockN at a time, the next ones on
// their way meanwhile: scores and probabilities stay in registers, float32; two 16-bit terms carry a probability
// into P V (mma.cuh), so that the one rounding is the store. It is bound by the products and by instructions
// between them: two or three blocks a multiprocessor, so that one's products run beside the other's softmax.
#include <common/attention.cuh>
#include <common/mma.cuh>
#include <common/paged_kv.cuh>
#include <common/ragged.cuh>
#include <common/reduce.cuh>
#include <common/shared.cuh>

namespace lorakit {

// A warp loads so many keys of a tile. It finds those of kFound tiles at a time, a lane one; which there are is kept of
// twice as many tiles.
constexpr unsigned kWarpKeys = 8, kFound = kWarpSize / kWarpKeys, kRing = 2 * kFound;

// A row's sums are rescaled only when a logit exceeds their base by more than this: seldom, and 2^15 fits in float16.
constexpr float kSlack = 1.0f;

// What a block does; in shared memory, since registers are scarce.
struct Share {
  int begin, first_row, num_rows, segment;  // first token, first row and number of rows of the sequence; it
  int cached, begin_key, num_keys;          // tokens before this step; keys that any of the block's rows sees
  int all_begin, all_end;                   // keys that all of them see
  float factor;                             // times a score is a logit

  // Of the block's row m, or of the sequence's last row.
  __device__ long long position(int m, int group) const {
    return static_cast<long long>(cached) + min(first_row + m, num_rows - 1) / group;
  }
};

// A bit for each of a tile's first `end` keys.
__device__ inline unsigned bits_below(int end) { return end <= 0 ? 0u : end >= 32 ? ~0u : (1u << end) - 1; }

// Calls f(row, column, element) for this lane's elements of a warp's accumulators: row as the lane counts its rows,
// two in each row tile, column without the lane's own part of it.
template <int kRowTiles, int kColTiles, typename F>
__device__ void for_each(float (&elements)[kRowTiles][kColTiles][4], F f) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColTiles * 4; ++i) {
    const int r = i / 4 / kColTiles, col_tile = i / 4 % kColTiles;
    f(2 * r + i / 2 % 2, col_tile * 8 + i % 2, elements[r][col_tile][i % 4]);
  }
}

// Blocks for which the compiler must leave registers.
template <typename T, int kHeadDim>
constexpr int kMinBlocks = kHeadDim * sizeof(T) <= 128 ? 3 : 2;

// Grid (total_tokens * group / kBlockM + batch_size + 1, n_kv_heads).
template <typename T, int kHeadDim, int kWarps, int kRowTiles>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks<T, kHeadDim>) attention_ragged_kernel(
    const T* __restrict__ q,              // [total_tokens, n_heads, head_dim], rows q_stride apart
    T* __restrict__ out,                  // [total_tokens, n_heads, head_dim]
    float* __restrict__ lse,              // [total_tokens, n_heads] or null
    const int* __restrict__ row_offsets,  // [batch_size + 1]
    const T* __restrict__ keys,  // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
    const T* __restrict__ values,                // the same, strides v_page, v_token, v_head
    const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
    const unsigned* __restrict__ cache_lengths,  // [batch_size]
    const float* __restrict__ sinks,             // [n_heads] or null
    const T* __restrict__ narrow_sinks,          // [n_heads] or null; one of both at most
    unsigned* errors, int total_tokens, int batch_size, int n_heads, long long q_stride, float scale,
    float soft_cap, int window_left, int window_right, int num_pages, int max_pages, int page_size,
    long long k_page, long long k_token, long long k_head, long long v_page, long long v_token,
    long long v_head, int n_kv_heads, int head_dim) {
  constexpr int kWarpRows = 16 * kRowTiles, kBlockM = kWarps * kWarpRows, kBlockN = kWarps * kWarpKeys;
  constexpr int kRows = 2 * kRowTiles;  // of a lane
  // No power of two: so the compiler adds it, and constants behind it go into instructions, rather than merges bits.
  constexpr int kTileStride = kBlockN * kHeadDim + 8 * kPer16Bytes<T>;
  using Rows = SharedTile<T, kHeadDim, true>;
  const PagedKV<const T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                               max_pages, page_size, k_page,       k_token,       k_head,
                               v_page,    v_token,   v_head,       n_kv_heads,    head_dim};
  const AttentionOptions<T> options{scale, soft_cap, window_left, window_right, sinks, narrow_sinks};
  const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_row = __shfl_sync(kFullMask, warp * kWarpRows, 0);  // so that it is known to be uniform

  // Shared memory: queries, two tiles of keys and two of values; of each key where it is, and whether.
  SharedMemory shared;
  const Rows q_rows{shared.take<T>(kBlockM * kHeadDim) + warp_row * kHeadDim};  // of this warp
  T* const k_tiles = shared.take<T>(2 * kTileStride);
  T* const v_tiles = shared.take<T>(2 * kTileStride);
  const T** const key_rows = shared.take<const T*>(kFound * kBlockN);  // any valid address for no key
  const T** const value_rows = shared.take<const T*>(kFound * kBlockN);
  unsigned char* const valid_keys = shared.take<unsigned char>(kRing * 4);  // a bit for each key of a warp
  Share& share = *shared.take<Share>(1);
  const auto k_tile_of = [&](unsigned t) { return Rows{k_tiles + t % 2 * kTileStride}; };
  const auto v_tile_of = [&](unsigned t) { return Rows{v_tiles + t % 2 * kTileStride}; };

  // Which rows and keys. Late rows, which see many keys, first, so that no block is long when few are left. Rows
  // past the last offset are in no sequence and see none.
  check_offsets(row_offsets, batch_size, total_tokens, errors);
  const int group = n_heads / n_kv_heads, kv_head = blockIdx.y;
  // A logit is factor * score, and scores are products as they are where that is positive.
  const bool is_product = !options.is_capped() && scale > 0.0f;
  if (threadIdx.x == 0) {
    const Tile tile =
        tile_of<kBlockM>(gridDim.x - 1 - blockIdx.x, row_offsets, batch_size, total_tokens, group);
    const int tokens = tile.end - tile.begin;
    share = {tile.begin, tile.row, has_few_rows<T>(tokens, group, head_dim) ? 0 : tokens * group,
             tile.segment};
    share.factor = is_product || options.is_capped() ? options.logit_factor() : kLog2E;
    if (tile.segment < batch_size && tile.row < share.num_rows) {
      const long long capacity = min(static_cast<long long>(max_pages) * page_size, kMaxKeys);
      const long long before = cache_lengths[tile.segment];
      if (before + tokens > capacity) report(errors, kBadPage);
      const int keys = static_cast<int>(min(before + tokens, capacity));
      share.cached = static_cast<int>(min(before, kMaxKeys));
      share.begin_key = options.first_key(share.position(0, group), keys);
      share.num_keys = options.end_key(share.position(kBlockM - 1, group), keys);
      share.all_begin = options.first_key(share.position(kBlockM - 1, group), keys);
      share.all_end = options.end_key(share.position(0, group), keys);
    }
  }
  __syncthreads();
  if (share.first_row >= share.num_rows) return;

  // Four lanes copy a row; zeros without a valid one. Only elements of the row are read.
  const auto copy_row = [&](Rows to, unsigned n, const T* row, bool valid) {
#pragma unroll
    for (unsigned i = 0; i < kHeadDim / kPer16Bytes<T>; i += 4) {
      const unsigned first = i * kPer16Bytes<T>, own = lane % 4 * kPer16Bytes<T>;
      const bool live = valid && first + own < head_dim;
      cp_async_16(to.at(0, first, n, own), row + first + own, live ? 16 : 0);
    }
  };

  // Find the warp's keys of kFound tiles, the i-th so many; their pages are looked up when the ones before are found.
  unsigned page = 0;
  const auto key_of = [&](int i) {
    return static_cast<unsigned>((i * kFound + lane / kWarpKeys) * kBlockN + warp * kWarpKeys +
                                 lane % kWarpKeys);
  };
  const auto is_seen = [&](unsigned key) { return key >= share.begin_key && key < share.num_keys; };
  const auto look_up = [&](int i) {
    const unsigned key = key_of(i);
    if (is_seen(key)) page = cache.page_at(share.segment, key / static_cast<unsigned>(page_size));
  };
  const auto find = [&](int i) {
    const unsigned key = key_of(i), t = i * kFound + lane / kWarpKeys;
    const int page_slot = key % static_cast<unsigned>(page_size);
    const bool is_there = is_seen(key) && cache.is_page(page, errors);
    const unsigned valid = __ballot_sync(kFullMask, is_there);
    const unsigned n = t % kFound * kBlockN + warp * kWarpKeys + lane % kWarpKeys;
    __syncwarp();  // the rows found before have been read
    key_rows[n] = is_there ? keys + cache.key_row(page, page_slot, kv_head) : keys;
    value_rows[n] = is_there ? values + cache.value_row(page, page_slot, kv_head) : values;
    if (lane % kWarpKeys == 0) valid_keys[t % kRing * 4 + warp] = static_cast<unsigned char>(valid >> lane);
    __syncwarp();
    look_up(i + 1);
  };
  const auto load = [&](unsigned t) {
    const unsigned n = warp * kWarpKeys + lane / 4;
    const bool valid = (valid_keys[t % kRing * 4 + warp] >> lane / 4 & 1) != 0;
    copy_row(k_tile_of(t), n, key_rows[t % kFound * kBlockN + n], valid);
    copy_row(v_tile_of(t), n, value_rows[t % kFound * kBlockN + n], valid);
    cp_async_commit();
    if ((t + 1) % kFound == 0) find((t + 1) / kFound);
  };

  // Load the queries and the first keys and values.
  const int own_row = share.first_row + warp_row;
  for (int m = lane / 4; m < kWarpRows; m += kWarpSize / 4) {
    const int row = min(own_row + m, share.num_rows - 1);
    const long long token = share.begin + row / group, head = kv_head * group + row % group;
    copy_row(q_rows, m, q + token * q_stride + head * head_dim, own_row + m < share.num_rows);
  }
  const int first_tile = share.begin_key / kBlockN;
  look_up(first_tile / kFound);
  find(first_tile / kFound);
  load(first_tile);

  const auto row_of = [&](int i) { return warp_row + i / 2 * 16 + lane / 4 + i % 2 * 8; };  // the lane's i-th
  SoftmaxRow softmax[kRows];
  float acc[kRowTiles][kHeadDim / 8][4] = {};

  for (int t = first_tile; t * kBlockN < share.num_keys; ++t) {
    // Wait until this tile is there, for all, and all are done with the one before. The next one on its way.
    cp_async_wait<0>();
    __syncthreads();
    if ((t + 1) * kBlockN < share.num_keys) load(t + 1);
    const Rows k_tile = k_tile_of(t), v_tile = v_tile_of(t);
    const int first_key = t * kBlockN;
    const unsigned valid =
        *reinterpret_cast<const unsigned*>(valid_keys + t % kRing * 4) & bits_below(kBlockN);

    // Scores.
    float scores[kRowTiles][kBlockN / 8][4] = {};
#pragma unroll(sizeof(T) == 4 ? 1 : kHeadDim / 16)
    for (int k = 0; k < kHeadDim; k += 16) {
      FragmentA<T> q_fragments[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) load_a(q_fragments[r], q_rows, r * 16, k);
#pragma unroll
      for (int n = 0; n < kBlockN; n += 16) {
        FragmentB<T> k_fragments[2];
        load_b_rows(k_fragments, k_tile, n, k);
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i)
          mma(scores[i / 2][n / 8 + i % 2], q_fragments[i / 2], k_fragments[i % 2]);
      }
    }
    if (!is_product) {
      for_each(scores, [&](int, int, float& score) {
        score = options.is_capped() ? options.squash(score) : score * scale;
      });
    }

    // Mask, where not every row sees every key.
    if (valid != bits_below(kBlockN) || first_key < share.all_begin || first_key + kBlockN > share.all_end) {
      unsigned seen[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const long long position = share.position(row_of(i), group);
        const unsigned before = bits_below(options.first_key(position, share.num_keys) - first_key);
        seen[i] = valid & bits_below(options.end_key(position, share.num_keys) - first_key) & ~before;
        seen[i] >>= lane % 4 * 2;
      }
      for_each(scores, [&](int row, int n, float& score) {
        if ((seen[row] >> n & 1) == 0) score = -infinity();
      });
    }

    // Raise the base of rows whose largest logit exceeds it.
    const float factor = share.factor;
    float largest[kRows], factors[kRows], shift[kRows];
    bool is_raised = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) largest[i] = -infinity();
    for_each(scores, [&](int row, int, float& score) { largest[row] = fmaxf(largest[row], score); });
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float logit = quad_max(largest[i]) * factor;
      factors[i] = softmax[i].raise(logit > softmax[i].largest + kSlack ? logit : softmax[i].largest);
      shift[i] = kProbabilityShift - softmax[i].base();
      is_raised |= factors[i] != 1.0f;
    }
    if (__any_sync(kFullMask, is_raised))
      for_each(acc, [&](int row, int, float& sum) { sum *= factors[row]; });

    // Probabilities times values, 16 keys at a time: scores are laid out as that operand is.
#pragma unroll
    for (int n = 0; n < kBlockN; n += 16) {
      FragmentA<T> p_fragments[kRowTiles][kTerms<T>];
#pragma unroll
      for (int i = 0; i < 4 * kRowTiles; ++i) {
        const int r = i / 4, row = 2 * r + i % 2;
        const float* const pair = scores[r][n / 8 + i / 2 % 2] + i % 2 * 2;
        const float low = ex2(fmaf(pair[0], factor, shift[row]));
        const float high = ex2(fmaf(pair[1], factor, shift[row]));
        softmax[row].sum += low + high;
        split_finite<T>(p_fragments[r], i % 4, low, high);
      }
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) {
        FragmentB<T> v_fragments[2];
        load_b_cols(v_fragments, v_tile, n, d);
#pragma unroll
        for (int term = kTerms<T> - 1; term >= 0; --term) {  // the small one first
#pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i)
            mma(acc[i / 2][d / 8 + i % 2], p_fragments[i / 2][term], v_fragments[i % 2]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // Divide and store, two neighbouring elements at a time.
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float sum = quad_sum(softmax[i].sum);
    const int m = share.first_row + row_of(i);
    if (m >= share.num_rows) continue;
    const int head = kv_head * group + m % group;
    const float from_sink = add_sink(softmax[i], sum, options.sink(head));
    const long long row = static_cast<long long>(share.begin + m / group) * n_heads + head;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      const int d = j * 8 + lane % 4 * 2;
      if (d >= head_dim) continue;
      const float* const pair = acc[i / 2][j] + i % 2 * 2;
      const Vector<T, 2> rounded =
          round_pair<T>(pair[0] * from_sink * inverse, pair[1] * from_sink * inverse);
      *reinterpret_cast<Vector<T, 2>*>(out + row * head_dim + d) = rounded;
    }
    if (lse != nullptr && lane % 4 == 0) lse[row] = softmax[i].lse(sum);
  }
}

}  // namespace lorakit
