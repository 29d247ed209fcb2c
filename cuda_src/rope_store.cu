// Rotary embedding of this step's queries and keys, and keys and values into their pages, in one launch. For
// token t of sequence b at position p = cache_lengths[b] + t - row_offsets[b], page = lookup_table[b, p /
// page_size], slot = p % page_size:
//
//   out[t, h, :]              = rotated by p   q[t, h, :]
//   keys[page, slot, h, :]    = rotated by p   k[t, h, :]
//   values[page, slot, h, :]  =                v[t, h, :]
//
// What store_kv and then rope_ragged give, bit for bit: common/rope.cuh is the rotation of both. Rows past the
// last offset have no position: queries are copied, keys and values are not stored. Rounds once, at the store.
//
// Bound by memory: with 32 and 8 heads of 128 16-bit elements a token's 12 KiB are read once and written once,
// and 512 bytes of angles are read. A block owns one token and some of its heads, query heads, then those of
// keys, then those of values. A thread owns the same elements of up to kHeads heads: the token is found, its
// page looked up and its angles read once for all of them, and 2 * kHeads runs are on their way meanwhile.
#include <common/paged_kv.cuh>
#include <common/ragged.cuh>
#include <common/rope.cuh>

namespace lorakit {

constexpr int kThreads = 128;
constexpr int kHeads = 4;  // of a thread, at most

// Blocks of a multiprocessor, at least: with less of a bound some instances spill a few registers.
template <typename T, int kPairs>
constexpr int kBlocks = kPairs * sizeof(T) > 16 ? 4 : 5;

// The sequence of a token, and its position there; count and 0 past the last offset and before the first.
struct Place {
  int sequence;
  long long position;
};

// Found by a whole warp, 32 sequences at a time. Their lengths come along with their offsets: a chain of three
// loads for up to a thousand sequences, where a search by halves and then the length are twelve.
__device__ inline Place place_of(long long token, const int* row_offsets, const unsigned* cache_lengths,
                                 int batch_size) {
  const int lane = threadIdx.x % kWarpSize;
  int first = 0, count = batch_size + 1;  // the last offset up to `token` is in [first, first + count)
  int start, winner;
  unsigned length;
  do {
    const int step = ceil_div(count, kWarpSize), mine = first + lane * step;
    const bool live = lane * step < count;
    start = live ? row_offsets[mine] : 0;
    length = live && mine < batch_size ? cache_lengths[mine] : 0;
    winner = __popc(__ballot_sync(kFullMask, lane == 0 || (live && start <= token))) - 1;
    first += winner * step;
    count = min(step, count - winner * step);
  } while (count > 1);
  start = __shfl_sync(kFullMask, start, winner);
  length = __shfl_sync(kFullMask, length, winner);
  if (first == batch_size || token < start) return {batch_size, 0};
  return {first, length + (token - start)};
}

// A head takes head_dim / (2 * kPairs) threads, a pass of a block as many whole heads as it has threads for,
// a block `passes` passes. `reciprocal` is 65536 / head_threads + 1: with up to 128 threads, x * reciprocal >>
// 16 is x / head_threads, sooner. Grid (total_tokens, y, z), so that y * z blocks have all heads.
template <typename T, int kPairs, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kPairs>) rope_store_kv_kernel(
    const T* __restrict__ q,              // [total_tokens, n_heads, head_dim], rows q_stride apart
    const T* __restrict__ k,              // [total_tokens, n_kv_heads, head_dim], k_stride apart
    const T* __restrict__ v,              // [total_tokens, n_kv_heads, head_dim], v_stride apart
    T* __restrict__ out,                  // [total_tokens, n_heads, head_dim]
    const float* __restrict__ freqs_cis,  // [num_positions, rotary_dim], (cos, sin) pairs
    const int* __restrict__ row_offsets,  // [batch_size + 1]
    T* __restrict__ keys,    // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
    T* __restrict__ values,  // the same, strides v_page, v_token, v_head
    const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
    const unsigned* __restrict__ cache_lengths,  // [batch_size]
    unsigned* errors, int total_tokens, int batch_size, int n_heads, long long q_stride, long long k_stride,
    long long v_stride, int num_positions, int rotary_dim, bool rotate_last, int passes, int reciprocal,
    int num_pages, int max_pages, int page_size, long long k_page, long long k_token, long long k_head,
    long long v_page, long long v_token, long long v_head, int n_kv_heads, int head_dim) {
  constexpr int kElements = 2 * kPairs;
  const PagedKV<T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                         max_pages, page_size, k_page,       k_token,       k_head,
                         v_page,    v_token,   v_head,       n_kv_heads,    head_dim};

  // Which token, which heads, which part of them.
  const long long token = blockIdx.x;
  const int head_threads = head_dim / kElements, pass_heads = kThreads * reciprocal >> 16;
  const int in_pass = static_cast<int>(threadIdx.x) * reciprocal >> 16;  // in [0, pass_heads]
  const RopePart<kPairs, kInterleaved> part(static_cast<int>(threadIdx.x) - in_pass * head_threads, head_dim,
                                            rotary_dim, rotate_last);
  const int block_heads = passes * pass_heads, all_heads = n_heads + 2 * n_kv_heads;
  const long long first_head = (static_cast<long long>(blockIdx.z) * gridDim.y + blockIdx.y) * block_heads;
  const long long end_head = min(first_head + block_heads, static_cast<long long>(all_heads));

  // Load all heads before anything else is known. Heads of keys and of values are counted on from `q`'s.
  const int end_queries = n_heads, end_keys = n_heads + n_kv_heads;
  const T* q_row = q + token * q_stride;
  const T* k_row = k + token * k_stride - static_cast<long long>(end_queries) * head_dim;
  const T* v_row = v + token * v_stride - static_cast<long long>(end_keys) * head_dim;
  Run<T, kPairs> first[kHeads], second[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const long long head = first_head + i * pass_heads + in_pass;
    const T* from = head < end_queries ? q_row : head < end_keys ? k_row : v_row;
    from += head * head_dim;
    if (in_pass < pass_heads && head < end_head) {
      first[i].load(from + part.first);
      second[i].load(from + part.second);
    }
  }

  // Where the token is: its angles and its page.
  const Place place = place_of(token, row_offsets, cache_lengths, batch_size);
  const bool placed = place.sequence < batch_size, rotates = placed && part.rotates;
  Run<float, kPairs> angles[2];
  if (rotates) {
    if (place.position >= num_positions) report(errors, kBadPosition);
    const float* row = freqs_cis + min(place.position, num_positions - 1ll) * rotary_dim;
    angles[0].load(row + part.first_angles);
    angles[1].load(row + part.second_angles);
  }
  bool is_stored = false;
  CacheSlot at{};
  if (placed && end_head > end_queries) {
    at = cache.slot_of(place.sequence, place.position);
    is_stored = cache.is_page(at.page, errors);
  }

  // Rotate and store.
  T* out_row = out + token * n_heads * head_dim;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const long long head = first_head + i * pass_heads + in_pass;
    if ((head >= end_queries && !is_stored) || in_pass >= pass_heads || head >= end_head) continue;
    if (rotates && head < end_keys) rotate<kPairs, kInterleaved>(first[i], second[i], angles);
    const int kv_head = static_cast<int>(head) - (head < end_keys ? end_queries : end_keys);
    T* to = head < end_queries ? out_row + head * head_dim
            : head < end_keys  ? keys + cache.key_row(at.page, at.slot, kv_head)
                               : values + cache.value_row(at.page, at.slot, kv_head);
    first[i].store(to + part.first);
    second[i].store(to + part.second);
  }

  // Last, so that the first block is not late.
  check_offsets(row_offsets, batch_size, total_tokens, errors);
}

}  // namespace lorakit
