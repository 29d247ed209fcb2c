// Keys and values of this step into their pages, for token t of sequence b at position
// p = cache_lengths[b] + t - row_offsets[b], page = lookup_table[b, p / page_size], slot = p % page_size:
//
//   store_kv   blocks[page, 0, layer, slot, h, :]  = k[t, h, :]
//              blocks[page, 1, layer, slot, h, :]  = v[t, h, :]
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

// Where a thread's 16 bytes are: rows of k and v, and the element of the cache they belong to.
struct Target {
  long long row = 0;
  int in_row = 0;        // element within [n_kv_heads, head_dim]
  long long cache = -1;  // element of the key in the cache, or -1
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
  const long long start = cache.key_offset(sequence, position, target.in_row / cache.head_dim, errors);
  if (start >= 0) target.cache = start + target.in_row % cache.head_dim;
  return target;
}

// Grid ceil(rows * n_kv_heads * head_dim / elements in 16 bytes / 256), both kernels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    store_kv_kernel(const T* __restrict__ k,              // [rows, n_kv_heads, head_dim], rows k_stride apart
                    const T* __restrict__ v,              // [rows, n_kv_heads, head_dim], rows v_stride apart
                    const int* __restrict__ row_offsets,  // [batch_size + 1]
                    T* __restrict__ blocks,  // [num_pages, 2, num_layers, page_size, n_kv_heads, head_dim]
                    const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
                    const unsigned* __restrict__ cache_lengths,  // [batch_size]
                    unsigned* errors, int rows, int batch_size, long long k_stride, long long v_stride,
                    int num_pages, int max_pages, int num_layers, int layer_idx, int page_size,
                    int n_kv_heads, int head_dim) {
  using Piece = Vector<T, kPer16Bytes<T>>;
  const PagedKV<T> cache{blocks,     lookup_table, cache_lengths, num_pages,  max_pages,
                         num_layers, layer_idx,    page_size,     n_kv_heads, head_dim};
  check_offsets(row_offsets, batch_size, rows, errors);
  const Target target = target_of(cache, row_offsets, batch_size, rows, errors);
  if (target.cache < 0) return;
  T* key = blocks + target.cache;
  *reinterpret_cast<Piece*>(key) = *reinterpret_cast<const Piece*>(k + target.row * k_stride + target.in_row);
  *reinterpret_cast<Piece*>(key + cache.value_offset()) =
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
__global__ void __launch_bounds__(kThreads)
    add_kv_kernel(const In* __restrict__ k,             // [rows, n_kv_heads, head_dim], rows k_stride apart
                  const In* __restrict__ v,             // [rows, n_kv_heads, head_dim], rows v_stride apart
                  const int* __restrict__ row_offsets,  // [batch_size + 1], may start above 0
                  T* __restrict__ blocks,  // [num_pages, 2, num_layers, page_size, n_kv_heads, head_dim]
                  const unsigned* __restrict__ lookup_table,   // [batch_size, max_pages]
                  const unsigned* __restrict__ cache_lengths,  // [batch_size]
                  unsigned* errors, int rows, int batch_size, long long k_stride, long long v_stride,
                  int num_pages, int max_pages, int num_layers, int layer_idx, int page_size, int n_kv_heads,
                  int head_dim) {
  const PagedKV<T> cache{blocks,     lookup_table, cache_lengths, num_pages,  max_pages,
                         num_layers, layer_idx,    page_size,     n_kv_heads, head_dim};
  check_offsets(row_offsets, batch_size, rows, errors, max(row_offsets[0], 0));
  const Target target = target_of(cache, row_offsets, batch_size, rows, errors);
  if (target.cache < 0) return;
  add(blocks + target.cache, k + target.row * k_stride + target.in_row);
  add(blocks + target.cache + cache.value_offset(), v + target.row * v_stride + target.in_row);
}

}  // namespace lorakit
