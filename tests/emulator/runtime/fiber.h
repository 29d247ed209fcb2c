// A stack and a place to continue. Knows nothing of CUDA.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASSEMBLY
#else
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // The calling thread itself: has no stack of its own, can only be switched away from and back to.
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Readies the fiber to begin at `entry`, which must not return. The number names it in
  // ThreadSanitizer's reports.
  void prepare(void (*entry)(), int number);

  // Leaves `from`, the running fiber, for `to`. Returns when somebody switches back.
  static void switch_to(Fiber& from, Fiber& to);

  // An entry calls the first before anything else, and the second before it leaves for good.
  static void begin();
  void end() { begun_ = false; }

  // Gives up a fiber that has begun and not ended.
  void abandon();

 private:
  void allocate_stack();
  void arrive();

  unsigned char* stack_ = nullptr;
#if defined(EMULATOR_ASSEMBLY)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  bool begun_ = false;  // and not ended
  void* fake_stack_ = nullptr;           // AddressSanitizer's, while the fiber does not run
  const void* stack_bottom_ = nullptr;   // as AddressSanitizer wants to know it
  size_t stack_bytes_ = 0;
  void* tsan_ = nullptr;                 // ThreadSanitizer's view of this fiber
};

}  // namespace emulator
