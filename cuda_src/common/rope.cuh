// Rotary embedding of a head: which of its elements a thread owns, and how it turns them.
#pragma once

#include <common/types.cuh>

namespace lorakit {

template <typename T, bool kSingle>
struct RunWord {
  using Type = unsigned;
};
template <typename T>
struct RunWord<T, true> {
  using Type = T;
};

// kCount elements as they are in memory, and moved in as few loads and stores as they need. Words and not
// elements, which the compiler would take apart as soon as they are loaded, and so wait for each load.
template <typename T, int kCount>
class Run {
 public:
  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) moves_[i] = reinterpret_cast<const Move*>(from)[i];
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) reinterpret_cast<Move*>(to)[i] = moves_[i];
  }
  __device__ T& operator[](int i) { return reinterpret_cast<T*>(moves_)[i]; }

 private:
  static constexpr int kBytes = kCount * int(sizeof(T)), kMoveBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kMoves = kBytes / kMoveBytes;
  using Move = Vector<typename RunWord<T, kCount == 1>::Type, kMoveBytes / (kCount == 1 ? kBytes : 4)>;
  Move moves_[kMoves];
};

// The elements of thread `part` of the head_dim / (2 * kPairs) that share a head: two runs of kPairs, each
// beside those of the next thread, so that a warp's loads have no gaps. Rotated parts come first, then those
// that are copied. Both head_dim and rotary_dim are multiples of 2 * kPairs.
template <int kPairs, bool kInterleaved>
struct RopePart {
  bool rotates;
  int first, second;                // where in a head the runs start
  int first_angles, second_angles;  // where in a row of the table the kPairs numbers of each are

  __device__ RopePart(int part, int head_dim, int rotary_dim, bool rotate_last) {
    const int rotary_parts = rotary_dim / (2 * kPairs);
    const int rotary_start = rotate_last ? head_dim - rotary_dim : 0;
    rotates = part < rotary_parts;
    if (!rotates) {
      first = (rotate_last ? 0 : rotary_dim) + (part - rotary_parts) * kPairs;
      second = first + (head_dim - rotary_dim) / 2;
      first_angles = second_angles = 0;
      return;
    }
    // Interleaved, a run holds whole pairs, unless it is half of one.
    const bool is_half = kInterleaved && kPairs == 1;
    const int start = is_half ? 2 * part : part * kPairs;
    const int distance = is_half ? 1 : rotary_dim / 2;
    first = rotary_start + start;
    second = first + distance;
    first_angles = kInterleaved ? start : 2 * start;
    second_angles = first_angles + (kInterleaved ? distance : kPairs);
  }
};

// Turns the pairs of two runs by their angles, (cos, sin) after (cos, sin). The sums are written as fmaf, so
// that every kernel rounds alike: which product of a sum is fused would otherwise be the compiler's choice.
template <int kPairs, bool kInterleaved, typename T>
__device__ void rotate(Run<T, kPairs>& first, Run<T, kPairs>& second, Run<float, kPairs> (&angles)[2]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    // Element n of both runs, one after the other. Interleaved, pairs are neighbours; else a real part is in
    // the first run and its imaginary part in the second.
    const auto element = [&](int n) -> T& { return n < kPairs ? first[n] : second[n - kPairs]; };
    const auto angle = [&](int n) { return angles[n / kPairs][n % kPairs]; };
    T& re = element(kInterleaved ? 2 * i : i);
    T& im = element(kInterleaved ? 2 * i + 1 : i + kPairs);
    const float cos = angle(2 * i), sin = angle(2 * i + 1), real = to_float(re), imaginary = to_float(im);
    re = from_float<T>(fmaf(real, cos, -(imaginary * sin)));
    im = from_float<T>(fmaf(real, sin, imaginary * cos));
  }
}

}  // namespace lorakit
