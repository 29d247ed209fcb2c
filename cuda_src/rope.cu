// Rotary embedding of this step's queries and keys. Pair j of a head, at position p, turns by its angle:
//
//   re' = re * cos[p, j] - im * sin[p, j]        im' = re * sin[p, j] + im * cos[p, j]
//
// kInterleaved: pair j is elements (2j, 2j + 1) of the rotated part; otherwise (j, j + rotary_dim / 2).
// The rotated part is the first rotary_dim elements of a head, or the last with `rotate_last`; the rest of a
// query is copied. Queries are written to `out`; keys are rotated in place in the cache, at the positions of
// this step only. Rows past the last offset have no position: queries are copied as they are.
//
// A thread owns kPairs pairs of one head, or copies 2 * kPairs elements of it. Bound by memory. Angles are
// float32 numbers of a table made in float64; rounds once, at the store.
#include <common/paged_kv.cuh>
#include <common/ragged.cuh>
#include <common/rope.cuh>

namespace lorakit {

constexpr int kThreads = 256;

// Grid ceil(total_tokens * (n_heads + n_kv_heads) * head_dim / (2 * kPairs) / 256).
template <typename T, int kPairs, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_ragged_kernel(
    const T* __restrict__ q,              // [total_tokens, n_heads, head_dim], rows q_stride apart
    T* __restrict__ out,                  // [total_tokens, n_heads, head_dim]
    const float* __restrict__ freqs_cis,  // [num_positions, rotary_dim], (cos, sin) pairs
    const int* __restrict__ row_offsets,  // [batch_size + 1]
    T* __restrict__ keys,    // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
    T* __restrict__ values,  // the same, strides v_page, v_token, v_head
    const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
    const unsigned* __restrict__ cache_lengths,  // [batch_size]
    unsigned* errors, int total_tokens, int batch_size, int n_heads, long long q_stride, int num_positions,
    int rotary_dim, bool rotate_last, int num_pages, int max_pages, int page_size, long long k_page,
    long long k_token, long long k_head, long long v_page, long long v_token, long long v_head,
    int n_kv_heads, int head_dim) {
  constexpr int kElements = 2 * kPairs;
  const PagedKV<T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                         max_pages, page_size, k_page,       k_token,       k_head,
                         v_page,    v_token,   v_head,       n_kv_heads,    head_dim};

  // Which token, which head, which part of it.
  check_offsets(row_offsets, batch_size, total_tokens, errors);
  const int heads = n_heads + n_kv_heads, units = head_dim / kElements;
  const long long unit = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  const long long token = unit / (static_cast<long long>(heads) * units);
  const int head = static_cast<int>(unit / units % heads);
  if (token >= total_tokens) return;
  const RopePart<kPairs, kInterleaved> part(static_cast<int>(unit % units), head_dim, rotary_dim,
                                            rotate_last);
  const int sequence = segment_of(token, row_offsets, batch_size);
  const bool placed = sequence < batch_size && token >= row_offsets[sequence];
  const bool is_query = head < n_heads, rotates = placed && part.rotates;
  if (!is_query && !rotates) return;

  // Where the head starts, before and after.
  const T* from;
  T* to;
  long long position = placed ? cache_lengths[sequence] + (token - row_offsets[sequence]) : 0;
  if (is_query) {
    from = q + token * q_stride + static_cast<long long>(head) * head_dim;
    to = out + (token * n_heads + head) * head_dim;
  } else {
    const CacheSlot at = cache.slot_of(sequence, position);
    if (!cache.is_page(at.page, errors)) return;
    from = to = keys + cache.key_row(at.page, at.slot, head - n_heads);
  }

  // Rotate it, or copy it.
  Run<T, kPairs> first, second;
  first.load(from + part.first);
  second.load(from + part.second);
  if (rotates) {
    if (position >= num_positions) {
      report(errors, kBadPosition);
      position = num_positions - 1;
    }
    const float* row = freqs_cis + position * rotary_dim;
    Run<float, kPairs> angles[2];
    angles[0].load(row + part.first_angles);
    angles[1].load(row + part.second_angles);
    rotate<kPairs, kInterleaved>(first, second, angles);
  }
  first.store(to + part.first);
  second.store(to + part.second);
}

}  // namespace lorakit
