// The sticky error word. lorakit/errors.py gives the meaning of each bit to the user.
#pragma once

#include <common/types.cuh>

namespace lorakit {

enum Error : unsigned { kBadSlot = 1, kBadPage = 2, kBadPosition = 4, kBadOffsets = 8 };

__device__ inline void report(unsigned* errors, Error error) {
  atomicOr(errors, static_cast<unsigned>(error));
}

}  // namespace lorakit
