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
// A block owns kBlockM rows, (token, head in group) pairs of one sequence and one key head, 16 to a warp, so
// that keys read once serve the whole group. It walks over its keys kBlockN at a time: scores and
// probabilities stay in registers, float32; two 16-bit terms carry a probability into P V (mma.cuh), so that
// the one rounding is the store. It is bound by the products.
#include <common/attention.cuh>
#include <common/mma.cuh>
#include <common/paged_kv.cuh>
#include <common/ragged.cuh>
#include <common/reduce.cuh>
#include <common/shared.cuh>

namespace lorakit {

// Blocks of small heads for which the compiler must leave registers: without being asked it takes more.
template <int kHeadDim, int kWarps>
constexpr int kMinBlocks = kHeadDim <= 64 ? 12 / kWarps : 1;

// Grid (total_tokens * group / kBlockM + batch_size + 1, n_kv_heads).
template <typename T, int kHeadDim, int kWarps, int kBlockN>
__global__ void __launch_bounds__(kWarps* kWarpSize, kMinBlocks<kHeadDim, kWarps>) attention_ragged_kernel(
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
  constexpr int kBlockM = kWarps * 16, kThreads = kWarps * kWarpSize;
  using QTile = SharedTile<T, kHeadDim>;
  const PagedKV<const T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                               max_pages, page_size, k_page,       k_token,       k_head,
                               v_page,    v_token,   v_head,       n_kv_heads,    head_dim};
  const AttentionOptions<T> options{scale, soft_cap, window_left, window_right, sinks, narrow_sinks};

  // Which rows: of sequence tile.segment, (token, head in group) pairs first_row .. first_row + kBlockM.
  check_offsets(row_offsets, batch_size, total_tokens, errors);
  const int group = n_heads / n_kv_heads, kv_head = blockIdx.y;
  const Tile tile = tile_of<kBlockM>(blockIdx.x, row_offsets, batch_size, total_tokens, group);
  const int num_rows = (tile.end - tile.begin) * group;
  const int first_row = tile.row;
  if (first_row >= num_rows || has_few_rows<T>(tile.end - tile.begin, group, head_dim)) return;
  const auto token_of = [&](int m) { return (first_row + m) / group; };  // in its sequence
  const auto head_of = [&](int m) { return kv_head * group + (first_row + m) % group; };

  // Which keys: rows past the last offset are in no sequence and see none.
  int cached = 0, begin_key = 0, num_keys = 0;
  const auto position_of = [&](int m) { return static_cast<long long>(cached) + token_of(m); };
  if (tile.segment < batch_size) {
    const long long capacity = min(static_cast<long long>(max_pages) * page_size, kMaxKeys);
    const long long keys = static_cast<long long>(cache_lengths[tile.segment]) + tile.end - tile.begin;
    if (keys > capacity) report(errors, kBadPage);
    num_keys = static_cast<int>(min(keys, capacity));
    cached = static_cast<int>(min(static_cast<long long>(cache_lengths[tile.segment]), kMaxKeys));
    begin_key = options.first_key(position_of(0), num_keys);
    num_keys = options.end_key(position_of(min(kBlockM, num_rows - first_row) - 1), num_keys);
  }

  // Shared memory: queries, one tile of keys and one of values, and where the keys are, for two tiles.
  SharedMemory shared;
  const QTile q_tile{shared.take<T>(kBlockM * QTile::kStride)};
  const QTile k_tile{shared.take<T>(kBlockN * QTile::kStride)};
  const QTile v_tile{shared.take<T>(kBlockN * QTile::kStride)};
  CacheSlot* const slots = shared.take<CacheSlot>(2 * kBlockN);  // -1: not visible

  const auto locate = [&](int first_key, int buffer) {
    for (int n = threadIdx.x; n < kBlockN; n += kThreads) {
      const int key = first_key + n;
      CacheSlot at{0, -1};
      if (key >= begin_key && key < num_keys) at = cache.slot_of(tile.segment, key);
      if (at.slot >= 0 && !cache.is_page(at.page, errors)) at.slot = -1;
      slots[buffer * kBlockN + n] = at;
    }
  };
  const auto load_keys = [&](int buffer) {
    load_tile<kBlockN, kThreads, true>(k_tile, head_dim, 1, keys, [&](int n) {
      const CacheSlot at = slots[buffer * kBlockN + n];
      return at.slot < 0 ? nullptr : keys + cache.key_row(at.page, at.slot, kv_head);
    });
    cp_async_commit();
  };
  const auto load_values = [&](int buffer) {
    load_tile<kBlockN, kThreads, true>(v_tile, head_dim, 1, values, [&](int n) {
      const CacheSlot at = slots[buffer * kBlockN + n];
      return at.slot < 0 ? nullptr : values + cache.value_row(at.page, at.slot, kv_head);
    });
    cp_async_commit();
  };

  // Load the queries and the first keys.
  load_tile<kBlockM, kThreads, true>(q_tile, head_dim, 1, q, [&](int m) {
    return first_row + m < num_rows ? q + static_cast<long long>(tile.begin + token_of(m)) * q_stride +
                                          static_cast<long long>(head_of(m)) * head_dim
                                    : nullptr;
  });
  const int first_tile = begin_key / kBlockN, num_tiles = ceil_div(num_keys, kBlockN);
  locate(first_tile * kBlockN, first_tile % 2);
  __syncthreads();
  load_keys(first_tile % 2);

  // This lane's two rows: the keys they see, state and sums.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const int first_keys[2] = {options.first_key(position_of(rows[0]), num_keys),
                             options.first_key(position_of(rows[1]), num_keys)};
  const int end_keys[2] = {options.end_key(position_of(rows[0]), num_keys),
                           options.end_key(position_of(rows[1]), num_keys)};
  SoftmaxRow softmax[2];
  float acc[kHeadDim / 8][4] = {};

  for (int t = first_tile; t < num_tiles; ++t) {
    const int buffer = t % 2;
    const int first_key = t * kBlockN;

    // Scores: the values of this tile on their way, the next tile's keys being located.
    load_values(buffer);
    locate(first_key + kBlockN, 1 - buffer);
    cp_async_wait<1>();
    __syncthreads();
    float scores[kBlockN / 8][4] = {};
#pragma unroll(sizeof(T) == 4 ? 1 : kHeadDim / 16)
    for (int k = 0; k < kHeadDim; k += 16) {
      FragmentA<T> q_fragment;
      load_a(q_fragment, q_tile, warp * 16, k);
#pragma unroll
      for (int n = 0; n < kBlockN; n += 16) {
        FragmentB<T> k_fragments[2];
        load_b_rows(k_fragments, k_tile, n, k);
        mma(scores[n / 8], q_fragment, k_fragments[0]);
        mma(scores[n / 8 + 1], q_fragment, k_fragments[1]);
      }
    }
    __syncthreads();

    // The next tile's keys on their way; scale, mask, and raise the largest score of each row.
    load_keys(1 - buffer);
    if (options.is_capped()) {
#pragma unroll
      for (int i = 0; i < kBlockN / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] = options.squash(scores[i][j]);
      }
    }
    float largest[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kBlockN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = i * 8 + lane % 4 * 2 + j % 2, key = first_key + n;
        const bool visible =
            slots[buffer * kBlockN + n].slot >= 0 && key >= first_keys[j / 2] && key < end_keys[j / 2];
        scores[i][j] = visible ? scores[i][j] * options.logit_factor() : -infinity();
        largest[j / 2] = fmaxf(largest[j / 2], scores[i][j]);
      }
    }
    const float factors[2] = {softmax[0].raise(quad_max(largest[0])), softmax[1].raise(quad_max(largest[1]))};
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] *= factors[j / 2];
    }

    // Probabilities times values, 16 keys at a time: scores are laid out as that operand is.
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kBlockN; n += 16) {
      float probabilities[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        probabilities[i] = softmax[i / 2 % 2].probability(scores[n / 8 + i / 4][i % 4]);
      }
      FragmentA<T> p_fragments[kTerms<T>];
      split<T>(p_fragments, probabilities);
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) {
        FragmentB<T> v_fragments[2];
        load_b_cols(v_fragments, v_tile, n, d);
        mma_split<T>(acc[d / 8], p_fragments, v_fragments[0]);
        mma_split<T>(acc[d / 8 + 1], p_fragments, v_fragments[1]);
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();

  // Divide and store, two neighbouring elements at a time.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = quad_sum(softmax[half].sum);
    const int m = rows[half];
    if (first_row + m >= num_rows) continue;
    const float factor = add_sink(softmax[half], sum, options.sink(head_of(m)));
    const long long row = static_cast<long long>(tile.begin + token_of(m)) * n_heads + head_of(m);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const int d = i * 8 + lane % 4 * 2;
      if (d >= head_dim) continue;
      const Vector<T, 2> pair{{from_float<T>(acc[i][2 * half] * factor * inverse),
                               from_float<T>(acc[i][2 * half + 1] * factor * inverse)}};
      *reinterpret_cast<Vector<T, 2>*>(out + row * head_dim + d) = pair;
    }
    if (lse != nullptr && lane % 4 == 0) lse[row] = softmax[half].lse(sum);
  }
}

}  // namespace lorakit
