// The end of attention_decode.cu, for rows whose keys several of its blocks have had. For each row, over the
// states of its chunks from first to last, the first of them that of all chunks before too:
//
//   out = sum_c 2^(largest[c] - m) acc[c] / sum_c 2^(largest[c] - m) sum[c]      m = max_c largest[c]
//
// in the order and with the roundings with which that kernel merges them. A thread has two elements of two rows.
#include <common/attention_state.cuh>

namespace lorakit {

constexpr int kMergeThreads = 256;

// Grid: that of attention_decode_kernel, whose block of the same index has the first chunks of its rows.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads, 1)
    attention_merge_kernel(T* out,                 // [total_tokens, n_heads, head_dim]
                           float* lse,             // [total_tokens, n_heads] or null
                           float* states,          // [regions, slots] of StateSlot
                           const int* splits,      // [blocks] SplitRows
                           const float* sinks,     // [n_heads] or null
                           const T* narrow_sinks,  // [n_heads] or null; one of both at most
                           int n_heads, int n_kv_heads, int slots, int state_pairs, int head_dim) {
  constexpr int kAtOnce = 16;  // chunks
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const SplitRows of = reinterpret_cast<const SplitRows*>(splits)[blockIdx.x];
  if (of.rows == 0) return;
  const int group = n_heads / n_kv_heads, pairs = ceil_div(of.rows, 2);
  const AttentionOptions<T> options{1.0f, 0.0f, -1, -1, sinks, narrow_sinks};
  const StateSlot<kHeadDim> region = StateSlot<kHeadDim>{
      reinterpret_cast<Vector<float, 4>*>(states), state_pairs}[static_cast<long long>(of.region) * slots];
  for (int x = threadIdx.x; x < kHeadDim / 2 * pairs; x += kMergeThreads) {
    const int pair = x % pairs, i = x / pairs / 8, g = x / pairs % 8;
    PairState<1> state;
    for (int first = of.first_chunk; first < of.chunks; first += kAtOnce) {
      Vector<float, 4> values[kAtOnce][1], sums[kAtOnce];
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (first + c >= of.chunks) break;
        values[c][0] = region[first + c].values(i, g, pair);
        sums[c] = region[first + c].sums(pair);
      }
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (first + c < of.chunks) state.merge(sums[c], values[c]);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (2 * pair + row >= of.rows) break;
      const int in_sequence = of.first_row + 2 * pair + row;
      const int head = of.kv_head * group + in_sequence % group;
      const long long place = (of.begin + in_sequence / group) * static_cast<long long>(n_heads) + head;
      state.store(
          row, options.sink(head), out + place * head_dim,
          i == 0 && g == 0 && lse != nullptr ? lse + place : nullptr, [&](int) { return 16 * i + g; },
          head_dim);
    }
  }
}

}  // namespace lorakit
