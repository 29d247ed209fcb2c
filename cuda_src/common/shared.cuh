// Dynamic shared memory, carved into arrays in the order they are taken.
#pragma once

#include <common/types.cuh>

namespace lorakit {

class SharedMemory {
 public:
  __device__ SharedMemory() {
    extern __shared__ __align__(16) unsigned char arena[];
    next_ = arena;
  }

  // The next `count` elements, 16-byte aligned. lorakit/tiles.py adds up the same sizes.
  template <typename T>
  __device__ T* take(int count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += ceil_div(count * int(sizeof(T)), 16) * 16;
    return array;
  }

 private:
  unsigned char* next_;
};

}  // namespace lorakit
