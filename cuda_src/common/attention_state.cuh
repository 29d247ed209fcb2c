// States of rows of attention after some of their keys, merged, kept and stored.
#pragma once

#include <common/attention.cuh>

namespace lorakit {

// Of two rows, as lanes have them: with g = lane / 4, a lane of the pair has values of elements 16 i + g and
// 16 i + g + 8 for kSteps i, each of both rows.
template <int kSteps>
struct PairState {
  float largest[2] = {-infinity(), -infinity()}, sum[2] = {};
  Vector<float, 4> values[kSteps] = {};  // (16 i + g, rows), (16 i + g + 8, rows)

  __device__ void merge(const Vector<float, 4>& sums, const Vector<float, 4> (&other)[kSteps]) {
    float mine[2], others[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float other_largest = sums.at[2 * row], all = fmaxf(largest[row], other_largest);
      const float base = all == -infinity() ? 0.0f : all;
      mine[row] = ex2(largest[row] - base);
      others[row] = ex2(other_largest - base);
      largest[row] = all;
      sum[row] = fmaf(sums.at[2 * row + 1], others[row], sum[row] * mine[row]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[i].at[j] = fmaf(other[i].at[j], others[j % 2], values[i].at[j] * mine[j % 2]);
      }
    }
  }

  // As merge takes it.
  __device__ Vector<float, 4> sums() const { return {largest[0], sum[0], largest[1], sum[1]}; }

  // Of all keys: what one of the rows gives. element(i) is where values[i] begin, and this lane stores the sum.
  template <typename T, typename Element>
  __device__ void store(int row, float sink, T* out, float* lse, Element element, int head_dim) const {
    SoftmaxRow softmax{largest[row], sum[row]};
    float total = sum[row];
    const float factor = add_sink(softmax, total, sink);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = element(i) + 8 * half;
        if (d < head_dim) out[d] = from_float<T>(values[i].at[2 * half + row] * factor * inverse);
      }
    }
    if (lse != nullptr) *lse = softmax.lse(total);
  }
};

// States of pairs in the workspace, `pairs` side by side: four values at a time, of each i and g, then their sums.
template <int kHeadDim>
struct StateSlot {
  Vector<float, 4>* data;
  int pairs;

  static constexpr int kValues = kHeadDim / 2;  // vectors of a pair
  __device__ Vector<float, 4>& values(int i, int g, int pair) const {
    return data[(i * 8 + g) * pairs + pair];
  }
  __device__ Vector<float, 4>& sums(int pair) const { return data[kValues * pairs + pair]; }
  __device__ StateSlot operator[](long long slot) const {
    return {data + slot * (kValues + 1) * pairs, pairs};
  }
};

// Rows of a key head of a sequence that several blocks have keys of.
struct SplitRows {
  int begin, first_row, rows;        // the sequence's first token, the first row and how many; 0: none
  int kv_head, first_chunk, chunks;  // the chunks whose states there are, the first of them of all before too
  int region, unused;
};

}  // namespace lorakit
