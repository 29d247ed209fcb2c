// Online softmax of one row, in base 2: scores arrive in tiles, largest score and sum are kept.
#pragma once

#include <common/ptx.cuh>

namespace lorakit {

// Probabilities are kept times 2^14: then also small ones are normal numbers in float16, whose smallest is
// 2^-14. The factor cancels when the sum divides the result.
constexpr float kProbabilityShift = 14.0f;

struct SoftmaxRow {
  float largest = -infinity();  // of all scores so far
  float sum = 0.0f;             // of the probabilities this lane made

  // Take in the largest score of a tile; returns what all earlier probabilities must be multiplied with.
  __device__ float raise(float tile_largest) {
    const float before = largest;
    largest = fmaxf(before, tile_largest);
    const float factor = ex2(before - base());
    sum *= factor;
    return factor;
  }

  __device__ float probability(float score) {
    const float p = ex2(score - base() + kProbabilityShift);
    sum += p;
    return p;
  }

  // While no key was visible the largest score is -inf, and -inf - (-inf) would be NaN.
  __device__ float base() const { return largest == -infinity() ? 0.0f : largest; }

  // The natural logarithm of the sum of exp(score); -inf for a row that saw no key.
  __device__ float lse(float total) const {
    constexpr float kLn2 = 0.693147180559945309f;
    const float unshifted = ldexpf(total, -static_cast<int>(kProbabilityShift));
    return total == 0.0f ? -infinity() : largest * kLn2 + logf(unshifted);
  }
};

}  // namespace lorakit
