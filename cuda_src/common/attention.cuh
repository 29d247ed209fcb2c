// What the attention kernels share: which of them has a sequence; which keys a token sees, the logit of a
// score, and the sink of a head.
#pragma once

#include <common/softmax.cuh>

namespace lorakit {

constexpr long long kMaxKeys = 1ll << 30;  // of one sequence: positions, and sums of two, fit in 32 bits

// attention_decode.cu has the sequences with up to 32 (token, head in group) pairs of a key head in this
// step, or with one token; attention.cu the others, and all of heads too long for its registers. It goes by the
// sequence alone, so that its bits do.
template <typename T>
__device__ bool has_few_rows(int tokens, int group, int head_dim) {
  if (head_dim * sizeof(T) > 512) return false;
  return tokens <= 1 || static_cast<long long>(tokens) * group <= 32;
}

constexpr float kLog2E = 1.44269504088896340736f;

template <typename T>
struct AttentionOptions {
  float scale;            // times q . k is a score
  float soft_cap;         // which scores do not exceed, see below; 0: none
  int window_left;        // how many keys a token sees before its own, at most; negative: all
  int window_right;       // and after its own: 0 is causal
  const float* sinks;     // [n_heads] or null: a score for each head, without a key and a value
  const T* narrow_sinks;  // or these

  // The token at `position` of a sequence of num_keys sees the keys first_key .. end_key, without the last.
  __device__ int first_key(long long position, int num_keys) const {
    if (window_left < 0) return 0;
    return static_cast<int>(min(max(position - window_left, 0ll), static_cast<long long>(num_keys)));
  }
  __device__ int end_key(long long position, int num_keys) const {
    if (window_right < 0) return num_keys;
    return static_cast<int>(min(position + window_right + 1, static_cast<long long>(num_keys)));
  }

  // A logit is the score times log2(e), the score being scale * dot or, with a soft cap,
  // soft_cap * tanh(scale * dot / soft_cap): logit_factor() times dot or, with a soft cap, squash(dot).
  __device__ bool is_capped() const { return soft_cap > 0.0f; }
  __device__ float squash(float dot) const { return tanhf(dot * scale * (1.0f / soft_cap)); }
  __device__ float logit_factor() const { return (is_capped() ? soft_cap : scale) * kLog2E; }

  // The logit of a head's sink; -inf, which adds nothing, without sinks.
  __device__ float sink(int head) const {
    if (sinks != nullptr) return sinks[head] * kLog2E;
    return narrow_sinks != nullptr ? to_float(narrow_sinks[head]) * kLog2E : -infinity();
  }
};

// Add a sink to the sum of a row's probabilities, of all lanes and all keys. Returns what the row's sums of
// values must be multiplied with. A row that saw no key stays one.
__device__ inline float add_sink(SoftmaxRow& row, float& total, float sink) {
  if (total == 0.0f) return 1.0f;
  const float factor = row.raise(sink);
  // A sink so large that its logit is infinite takes all: inf - inf would be NaN.
  const float below = sink == row.largest ? 0.0f : sink - row.largest;
  total = total * factor + ex2(below + kProbabilityShift);
  return factor;
}

}  // namespace lorakit
