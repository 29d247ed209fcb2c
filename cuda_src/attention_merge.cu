// The end of attention_decode.cu, for rows whose keys several of its blocks have had. For each row, over the
// states of its chunks from first to last, the first of them that of all chunks before too:
//
//   out = sum_c 2^(largest[c] - m) acc[c] / sum_c 2^(largest[c] - m) sum[c]      m = max_c largest[c]
//
// in the order and with the roundings with which that kernel merges them. A thread has a column of some rows.
#include <common/attention_state.cuh>

namespace lorakit {

constexpr int kMergeThreads = 512;

// Grid: that of attention_decode_kernel, whose block of the same index has the first chunks of its rows.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads, 1)
    attention_merge_kernel(T* out,                 // [total_tokens, n_heads, head_dim]
                           float* lse,             // [total_tokens, n_heads] or null
                           const float* states,    // [regions, slots, state_rows * kStateFloats]
                           const int* splits,      // [blocks] SplitRows
                           const float* sinks,     // [n_heads] or null
                           const T* narrow_sinks,  // [n_heads] or null; one of both at most
                           int n_heads, int n_kv_heads, int slots, int state_rows, int head_dim) {
  constexpr int kAtOnce = 16;  // chunks
  const int lane = threadIdx.x % kWarpSize, column = threadIdx.x % kHeadDim;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const SplitRows of = reinterpret_cast<const SplitRows*>(splits)[blockIdx.x];
  if (of.rows == 0) return;
  const int group = n_heads / n_kv_heads, floats = state_rows * kStateFloats<kHeadDim>;
  const float* const region = states + static_cast<long long>(of.region) * slots * floats;
  for (int row = threadIdx.x / kHeadDim; row < of.rows; row += kMergeThreads / kHeadDim) {
    RowState<1> state;
    for (int first = of.first_chunk; first < of.chunks; first += kAtOnce) {
      const float* const from = region + first * floats;
      const int count = min(kAtOnce, of.chunks - first),
                mine = min(lane, count - 1);  // a lane, a chunk's sums
      const auto stats =
          *reinterpret_cast<const Vector<float, 2>*>(from + mine * floats + state_rows * kHeadDim + 2 * row);
      float values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        values[i] = i < count ? from[i * floats + row * kHeadDim + column] : 0.0f;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float largest = __shfl_sync(kFullMask, stats.at[0], i);
        const float sum = __shfl_sync(kFullMask, stats.at[1], i);
        if (i < count) state.merge(largest, sum, {values[i]});
      }
    }
    const int pair = of.first_row + row;
    const int head = of.kv_head * group + pair % group;
    const long long place = (of.begin + pair / group) * static_cast<long long>(n_heads) + head;
    const AttentionOptions<T> options{1.0f, 0.0f, -1, -1, sinks, narrow_sinks};
    state.take_sink(options.sink(head));
    const float inverse = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
    if (column < head_dim) out[place * head_dim + column] = from_float<T>(state.values[0] * inverse);
    if (lse != nullptr && column == 0) lse[place] = SoftmaxRow{state.largest, state.sum}.lse(state.sum);
  }
}

}  // namespace lorakit
