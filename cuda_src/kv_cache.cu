// Keys and values of this step into their pages, for token t of sequence b at position
// p = cache_lengths[b] + t - row_offsets[b], page = lookup_table[b, p / page_size], slot = p % page_size:
//
//   store_kv   keys[page, slot, h, :]    = k[t, h, :]
//              values[page, slot, h, :]  = v[t, h, :]
//   add_kv     the same with +=
//
// A thread moves 16 bytes of the cache for a key and its value. Bound by memory: each element is read once
// and written once (add_kv: read twice). A token without a valid page is skipped and reported; so are rows
// past the last offset, unreported.
#include <common/paged_kv.cuh>
#include <common/ragged.cuh>

namespace lorakit {

constexpr int kThreads = 256;
constexpr unsigned kNegativeZero = 0x80000000u;

// Where a thread's 16 bytes are: in a row of k and of v, and in the cache.
struct Target {
  bool stored = false;  // the cache has a place for them
  int in_row = 0;       // element within [n_kv_heads, head_dim]
  long long row = 0;
  long long key = 0;  // elements from the cache's first key
  long long value = 0;
};

template <typename T>
__device__ Target target_of(const PagedKV<T>& cache, const int* row_offsets, int batch_size, int rows,
                            unsigned* errors) {
  constexpr int kVector = kPer16Bytes<T>;
  const int row_size = cache.n_kv_heads * cache.head_dim;
  const long long unit = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  Target target;
  target.row = unit / (row_size / kVector);
  target.in_row = static_cast<int>(unit % (row_size / kVector)) * kVector;
  // The offsets may be those of the last sequences of a batch only: then they do not start at 0.
  const long long token = target.row + row_offsets[0];
  const int sequence = segment_of(token, row_offsets, batch_size);
  if (target.row >= rows || sequence == batch_size || token < row_offsets[sequence]) return target;
  const long long position = cache.cache_lengths[sequence] + (token - row_offsets[sequence]);
  const CacheSlot at = cache.slot_of(sequence, position);
  if (!cache.is_page(at.page, errors)) return target;
  const int head = target.in_row / cache.head_dim, in_head = target.in_row % cache.head_dim;
  target.stored = true;
  target.key = cache.key_row(at.page, at.slot, head) + in_head;
  target.value = cache.value_row(at.page, at.slot, head) + in_head;
  return target;
}

// Grid ceil(rows * n_kv_heads * head_dim / elements in 16 bytes / 256), both kernels.
template <typename T>
__global__ void __launch_bounds__(kThreads) store_kv_kernel(
    const T* __restrict__ k,              // [rows, n_kv_heads, head_dim], rows k_stride apart
    const T* __restrict__ v,              // [rows, n_kv_heads, head_dim], rows v_stride apart
    const int* __restrict__ row_offsets,  // [batch_size + 1]
    T* __restrict__ keys,    // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
    T* __restrict__ values,  // the same, strides v_page, v_token, v_head
    const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
    const unsigned* __restrict__ cache_lengths,  // [batch_size]
    unsigned* errors, int rows, int batch_size, long long k_stride, long long v_stride, int num_pages,
    int max_pages, int page_size, long long k_page, long long k_token, long long k_head, long long v_page,
    long long v_token, long long v_head, int n_kv_heads, int head_dim) {
  using Piece = Vector<T, kPer16Bytes<T>>;
  const PagedKV<T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                         max_pages, page_size, k_page,       k_token,       k_head,
                         v_page,    v_token,   v_head,       n_kv_heads,    head_dim};
  check_offsets(row_offsets, batch_size, rows, errors);
  const Target target = target_of(cache, row_offsets, batch_size, rows, errors);
  if (!target.stored) return;
  *reinterpret_cast<Piece*>(keys + target.key) =
      *reinterpret_cast<const Piece*>(k + target.row * k_stride + target.in_row);
  *reinterpret_cast<Piece*>(values + target.value) =
      *reinterpret_cast<const Piece*>(v + target.row * v_stride + target.in_row);
}

// Adds in float32 and rounds once. In may be float32 while the cache is 16-bit. Adding -0, as for a row without
// adapter, keeps every bit: a sum would flush subnormal numbers.
template <typename T, typename In>
__device__ void add(T* cache, const In* delta) {
  constexpr int kVector = kPer16Bytes<T>;
  constexpr int kLoad = kVector < kPer16Bytes<In> ? kVector : kPer16Bytes<In>;
  auto* target = reinterpret_cast<Vector<T, kVector>*>(cache);
  Vector<T, kVector> sums = *target;
#pragma unroll
  for (int i = 0; i < kVector; i += kLoad) {
    const auto piece = *reinterpret_cast<const Vector<In, kLoad>*>(delta + i);
#pragma unroll
    for (int j = 0; j < kLoad; ++j) {
      const float change = to_float(piece.at[j]);
      if (__float_as_uint(change) == kNegativeZero) continue;
      sums.at[i + j] = from_float<T>(to_float(sums.at[i + j]) + change);
    }
  }
  *target = sums;
}

template <typename T, typename In>
__global__ void __launch_bounds__(kThreads) add_kv_kernel(
    const In* __restrict__ k,             // [rows, n_kv_heads, head_dim], rows k_stride apart
    const In* __restrict__ v,             // [rows, n_kv_heads, head_dim], rows v_stride apart
    const int* __restrict__ row_offsets,  // [batch_size + 1], may start above 0
    T* __restrict__ keys,    // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
    T* __restrict__ values,  // the same, strides v_page, v_token, v_head
    const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
    const unsigned* __restrict__ cache_lengths,  // [batch_size]
    unsigned* errors, int rows, int batch_size, long long k_stride, long long v_stride, int num_pages,
    int max_pages, int page_size, long long k_page, long long k_token, long long k_head, long long v_page,
    long long v_token, long long v_head, int n_kv_heads, int head_dim) {
  const PagedKV<T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                         max_pages, page_size, k_page,       k_token,       k_head,
                         v_page,    v_token,   v_head,       n_kv_heads,    head_dim};
  check_offsets(row_offsets, batch_size, rows, errors, max(row_offsets[0], 0));
  const Target target = target_of(cache, row_offsets, batch_size, rows, errors);
  if (!target.stored) return;
  add(keys + target.key, k + target.row * k_stride + target.in_row);
  add(values + target.value, v + target.row * v_stride + target.in_row);
}

}  // namespace lorakit
