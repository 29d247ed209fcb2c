// States of rows of attention after some of their keys, merged, kept and stored.
#pragma once

#include <common/attention.cuh>

namespace lorakit {

// A row's state after some chunks: `values` are this lane's elements of acc.
template <int kValues>
struct RowState {
  alignas(16) float values[kValues] = {};
  float largest = -infinity(), sum = 0.0f;

  __device__ void merge(float other_largest, float other_sum, const float (&other_values)[kValues]) {
    const float all = fmaxf(largest, other_largest), base = all == -infinity() ? 0.0f : all;
    const float mine = ex2(largest - base), others = ex2(other_largest - base);
    largest = all;
    sum = fmaf(other_sum, others, sum * mine);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = fmaf(other_values[i], others, values[i] * mine);
  }

  // Of all chunks.
  __device__ void take_sink(float sink) {
    SoftmaxRow row{largest, sum};
    const float factor = add_sink(row, sum, sink);
    largest = row.largest;
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] *= factor;
  }
};

// Of a row's state in the workspace: values first, of all rows, then largest and sum of each. There are
// two floats more, so that each 16 bytes of values are aligned.
template <int kHeadDim>
constexpr int kStateFloats = kHeadDim + 4;

// Rows of a key head of a sequence that several blocks have keys of.
struct SplitRows {
  int begin, first_row, rows;        // the sequence's first token, the first pair of 16 and how many; 0: none
  int kv_head, first_chunk, chunks;  // the chunks whose states there are, the first of them of all before too
  int region, unused;
};

template <typename T, int kValues>
__device__ void store_row(T* out, float* lse, const RowState<kValues>& state, long long row, int head_dim) {
  const int lane = threadIdx.x % kWarpSize;
  const float inverse = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
  if (lane * kValues < head_dim) {
    alignas(16) T values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = from_float<T>(state.values[i] * inverse);
    constexpr int kStep = kValues < kPer16Bytes<T> ? kValues : kPer16Bytes<T>;
#pragma unroll
    for (int i = 0; i < kValues; i += kStep) {
      *reinterpret_cast<Vector<T, kStep>*>(out + row * head_dim + lane * kValues + i) =
          *reinterpret_cast<const Vector<T, kStep>*>(values + i);
    }
  }
  if (lse != nullptr && lane == 0) {
    const SoftmaxRow softmax{state.largest, state.sum};
    lse[row] = softmax.lse(state.sum);
  }
}

template <int kValues>
__device__ void store_values(float* to, const float (&values)[kValues]) {
  constexpr int kStep = kValues < 4 ? kValues : 4;
#pragma unroll
  for (int i = 0; i < kValues; i += kStep) {
    *reinterpret_cast<Vector<float, kStep>*>(to + i) =
        *reinterpret_cast<const Vector<float, kStep>*>(values + i);
  }
}
template <int kValues>
__device__ void load_values(float (&values)[kValues], const float* from) {
  constexpr int kStep = kValues < 4 ? kValues : 4;
#pragma unroll
  for (int i = 0; i < kValues; i += kStep) {
    *reinterpret_cast<Vector<float, kStep>*>(values + i) =
        *reinterpret_cast<const Vector<float, kStep>*>(from + i);
  }
}

}  // namespace lorakit
