// Segmented LoRA products. For row t of group g, slot s = ids[g], rank = min(R, slot_ranks[s], ranks[g]):
//
//   shrink   h[t, r]  = sum over k < in_dim of x[t, k] * lora_a[s, r, k]        for r < rank, float32
//   expand   y[t, n] += sum over r < rank of h[t, r] * lora_b[s, n, r] + bias[s, n]
//
// Rows of a group with a negative id, and rows past the last offset, are base rows: untouched. Nothing past
// the rank is read. Both are bound by memory: shrink reads x and A, expand reads B, reads and writes y.
//
// A block owns 16 rows of one group (ragged.cuh says which) and some ranks, or columns. Each sum has one
// order, fixed by its length and T, so that a row's bits do not depend on the rest of the batch.
#include <common/mma.cuh>
#include <common/ragged.cuh>
#include <common/reduce.cuh>
#include <common/shared.cuh>

namespace lorakit {

constexpr int kBlockM = 16;  // rows of a block: one MMA
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// The slot of a block's rows and the rank to compute; a base row has slot -1.
struct Adapter {
  int slot = -1;
  int rank = 0;
};

__device__ inline Adapter adapter_of(int group, int groups, const int* ids, const int* ranks,
                                     const int* slot_ranks, int max_num_loras, int max_lora_rank,
                                     unsigned* errors) {
  Adapter adapter;
  if (group == groups || ids[group] < 0) return adapter;
  if (ids[group] >= max_num_loras) {
    report(errors, kBadSlot);
    return adapter;
  }
  adapter.slot = ids[group];
  unsigned rank = max_lora_rank;
  if (slot_ranks != nullptr) rank = min(rank, static_cast<unsigned>(slot_ranks[adapter.slot]));
  if (ranks != nullptr) rank = min(rank, static_cast<unsigned>(ranks[group]));
  adapter.rank = static_cast<int>(rank);
  return adapter;
}

// Grid (total_tokens / 16 + groups + 1, ceil(max_lora_rank / kBlockR)). The warps share the sum
// over k: warp w takes 16-column steps w, w + 4, ..., and their four partial sums are added in order.
template <typename T, int kBlockR, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    sgmv_shrink_kernel(const T* __restrict__ x,          // [total_tokens, in_dim]
                       const T* __restrict__ lora_a,     // [max_num_loras, max_lora_rank, in_dim] by strides
                       const int* __restrict__ ids,      // [groups]
                       const int* __restrict__ ranks,    // [groups] or null
                       const int* __restrict__ offsets,  // [groups + 1]
                       const int* __restrict__ slot_ranks,  // [max_num_loras] or null
                       float* __restrict__ h,               // [total_tokens, max_lora_rank]
                       unsigned* errors, int total_tokens, int groups, int in_dim, int max_num_loras,
                       int max_lora_rank, long long a_slot_stride, long long a_rank_stride,
                       long long a_stride) {
  constexpr int kBlockK = 256 / sizeof(T);
  constexpr int kStages = 2;
  using XTile = SharedTile<T, kBlockK>;
  using ATile = SharedTile<T, kBlockK>;

  // Which rows, which adapter.
  check_offsets(offsets, groups, total_tokens, errors);
  const Tile tile = tile_of<kBlockM>(blockIdx.x, offsets, groups, total_tokens, 1);
  const int row = tile.begin + tile.row;
  const int first_rank = blockIdx.y * kBlockR;
  if (row >= tile.end) return;
  const Adapter adapter =
      adapter_of(tile.segment, groups, ids, ranks, slot_ranks, max_num_loras, max_lora_rank, errors);
  if (adapter.slot < 0 || first_rank >= adapter.rank) return;
  const T* a = lora_a + adapter.slot * a_slot_stride + first_rank * a_rank_stride;

  // Shared memory: two stages of x and A; later the partial sums.
  SharedMemory shared;
  T* stages = shared.take<T>(kStages * (kBlockM + kBlockR) * XTile::kStride);
  const auto x_tile = [&](int stage) {
    return XTile{stages + stage % kStages * (kBlockM + kBlockR) * XTile::kStride};
  };
  const auto a_tile = [&](int stage) { return ATile{x_tile(stage).at(kBlockM, 0)}; };

  // Load 16 rows of x and kBlockR rows of A, columns k .. k + kBlockK.
  const auto load = [&](int stage) {
    const long long k = static_cast<long long>(stage) * kBlockK;
    load_tile<kBlockM, kThreads, kAligned>(x_tile(stage), static_cast<int>(in_dim - k), 1, x, [&](int i) {
      return row + i < tile.end ? x + static_cast<long long>(row + i) * in_dim + k : nullptr;
    });
    load_tile<kBlockR, kThreads, kAligned>(
        a_tile(stage), static_cast<int>(in_dim - k), a_stride, lora_a, [&](int i) {
          return first_rank + i < adapter.rank ? a + i * a_rank_stride + k * a_stride : nullptr;
        });
    cp_async_commit();
  };

  // Multiply, the next stage in flight.
  const int warp = threadIdx.x / kWarpSize;
  const int num_stages = ceil_div(in_dim, kBlockK);
  float acc[kBlockR / 8][4] = {};
  load(0);
  for (int stage = 0; stage < num_stages; ++stage) {
    if (stage + 1 < num_stages) {
      load(stage + 1);
    } else {
      cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = warp * 16; k < kBlockK; k += kWarps * 16) {
      FragmentA<T> x_fragment;
      load_a(x_fragment, x_tile(stage), 0, k);
#pragma unroll
      for (int r = 0; r < kBlockR; r += 16) {
        FragmentB<T> a_fragments[2];
        load_b_rows(a_fragments, a_tile(stage), r, k);
        mma(acc[r / 8], x_fragment, a_fragments[0]);
        mma(acc[r / 8 + 1], x_fragment, a_fragments[1]);
      }
    }
    __syncthreads();
  }

  // Add the four warps' sums and store.
  float* sums = reinterpret_cast<float*>(stages);  // [kWarps, kBlockM, kBlockR]
  static_assert(kWarps * kBlockM * kBlockR * sizeof(float) <=
                    kStages * (kBlockM + kBlockR) * XTile::kStride * sizeof(T),
                "the partial sums fit where the stages were");
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kBlockR / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int m = lane / 4 + j / 2 * 8, r = i * 8 + lane % 4 * 2 + j % 2;
      sums[(warp * kBlockM + m) * kBlockR + r] = acc[i][j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBlockM * kBlockR; i += kThreads) {
    const int m = i / kBlockR, r = first_rank + i % kBlockR;
    if (row + m >= tile.end || r >= adapter.rank) continue;
    float sum = sums[i];
    for (int w = 1; w < kWarps; ++w) sum += sums[w * kBlockM * kBlockR + i];
    h[static_cast<long long>(row + m) * max_lora_rank + r] = sum;
  }
}

// The power of two that brings the largest of a row's h just under 2^15, for float16, whose range a float32
// rank vector may leave; 1 for the other types and for rows that are zero or not finite.
template <typename T>
__device__ float row_scale(const float* h_row, int rank) {
  if constexpr (!is_half<T>) return 1.0f;
  float largest = 0.0f;
  if (h_row != nullptr) {
    for (int r = threadIdx.x % 4; r < rank; r += 4) largest = fmaxf(largest, fabsf(h_row[r]));
  }
  largest = quad_max(largest);
  if (largest == 0.0f || largest == infinity()) return 1.0f;
  int exponent;
  frexpf(largest, &exponent);
  return ldexpf(1.0f, 15 - max(exponent, -100));
}

// Grid (as shrink, ceil(out_dim / 128)). Warp w owns 32 of the block's columns; ranks go by 16. Rounds once,
// when y is stored.
template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    sgmv_expand_kernel(const float* __restrict__ h,      // [total_tokens, max_lora_rank]
                       const T* __restrict__ lora_b,     // [max_num_loras, out_dim, max_lora_rank] by strides
                       const T* __restrict__ bias,       // [max_num_loras, out_dim] or null
                       const int* __restrict__ ids,      // [groups]
                       const int* __restrict__ ranks,    // [groups] or null
                       const int* __restrict__ offsets,  // [groups + 1]
                       const int* __restrict__ slot_ranks,  // [max_num_loras] or null
                       Out* __restrict__ y,                 // [total_tokens, out_dim], rows y_stride apart
                       unsigned* errors, int total_tokens, int groups, int out_dim, int max_num_loras,
                       int max_lora_rank, long long b_slot_stride, long long b_rank_stride,
                       long long b_stride, long long y_stride) {
  constexpr int kBlockN = 128;
  constexpr int kWarpN = kBlockN / kWarps;
  constexpr int kBlockR = 16;
  constexpr int kStages = 2;
  using BTile = SharedTile<T, kBlockN>;

  // Which rows, which adapter.
  check_offsets(offsets, groups, total_tokens, errors);
  const Tile tile = tile_of<kBlockM>(blockIdx.x, offsets, groups, total_tokens, 1);
  const int row = tile.begin + tile.row;
  const int first_col = blockIdx.y * kBlockN;
  if (row >= tile.end) return;
  const Adapter adapter =
      adapter_of(tile.segment, groups, ids, ranks, slot_ranks, max_num_loras, max_lora_rank, errors);
  if (adapter.slot < 0) return;
  const T* b = lora_b + adapter.slot * b_slot_stride + first_col * b_stride;

  // Shared memory: two stages of 16 ranks of B.
  SharedMemory shared;
  T* stages = shared.take<T>(kStages * kBlockR * BTile::kStride);
  const auto b_tile = [&](int stage) { return BTile{stages + stage % kStages * kBlockR * BTile::kStride}; };
  const auto load = [&](int stage) {
    load_tile<kBlockR, kThreads, kAligned>(b_tile(stage), out_dim - first_col, b_stride, lora_b, [&](int i) {
      const int r = stage * kBlockR + i;
      return r < adapter.rank ? b + r * b_rank_stride : nullptr;
    });
    cp_async_commit();
  };

  // This lane's two rows of h, from device memory to fragments.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const float* h_rows[2];
  float scales[2], unscales[2];
  for (int i = 0; i < 2; ++i) {
    const int m = row + lane / 4 + i * 8;
    h_rows[i] = m < tile.end ? h + static_cast<long long>(m) * max_lora_rank : nullptr;
    scales[i] = row_scale<T>(h_rows[i], adapter.rank);
    unscales[i] = 1.0f / scales[i];
  }

  // Multiply, the next stage in flight.
  const int num_stages = ceil_div(adapter.rank, kBlockR);
  float acc[kWarpN / 8][4] = {};
  if (num_stages > 0) load(0);
  for (int stage = 0; stage < num_stages; ++stage) {
    if (stage + 1 < num_stages) {
      load(stage + 1);
    } else {
      cp_async_commit();
    }
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = stage * kBlockR + lane % 4 * 2 + i % 2 + i / 4 * 8;
      const float* h_row = h_rows[i / 2 % 2];
      values[i] = h_row != nullptr && r < adapter.rank ? h_row[r] * scales[i / 2 % 2] : 0.0f;
    }
    FragmentA<T> h_fragments[kTerms<T>];
    split<T>(h_fragments, values);
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kWarpN; n += 16) {
      FragmentB<T> b_fragments[2];
      load_b_cols(b_fragments, b_tile(stage), 0, warp * kWarpN + n);
      mma_split<T>(acc[n / 8], h_fragments, b_fragments[0]);
      mma_split<T>(acc[n / 8 + 1], h_fragments, b_fragments[1]);
    }
    __syncthreads();
  }

  // Add to y, two neighbouring columns at a time where they are one vector.
  constexpr int kPair = kAligned ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kWarpN / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; j += kPair) {
      const int m = row + lane / 4 + j / 2 * 8;
      const int n = first_col + warp * kWarpN + i * 8 + lane % 4 * 2 + j % 2;
      if (m >= tile.end || n >= out_dim) continue;
      auto* pair = reinterpret_cast<Vector<Out, kPair>*>(y + m * y_stride + n);
      Vector<Out, kPair> sums = *pair;
#pragma unroll
      for (int p = 0; p < kPair; ++p) {
        float sum = to_float(sums.at[p]) + acc[i][j + p] * unscales[j / 2];
        if (bias != nullptr) sum += to_float(bias[static_cast<long long>(adapter.slot) * out_dim + n + p]);
        sums.at[p] = from_float<Out>(sum);
      }
      *pair = sums;
    }
  }
}

}  // namespace lorakit
