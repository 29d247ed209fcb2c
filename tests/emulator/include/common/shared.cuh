// Twin of cuda_src/common/shared.cuh. Arrays have gaps between them, which AddressSanitizer guards.
#pragma once

#include <common/types.cuh>
#include <emulator/cuda.h>

namespace lorakit {

class SharedMemory {
 public:
  SharedMemory() {}

  template <typename T>
  T* take(int count, emulator::Site site = emulator::Site::here()) {
    unsigned char* array = emulator::take_shared(taken_, arrays_, count * int(sizeof(T)), site);
    taken_ += ceil_div(count * int(sizeof(T)), 16) * 16;
    ++arrays_;
    return reinterpret_cast<T*>(array);
  }

 private:
  unsigned taken_ = 0;
  unsigned arrays_ = 0;
};

}  // namespace lorakit
