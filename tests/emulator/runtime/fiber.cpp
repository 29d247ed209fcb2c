#include "fiber.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#include "sanitizers.h"

namespace emulator {

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // sanitizers make frames large; untouched pages cost nothing
constexpr size_t kGuardBytes = 4096;        // an overflow stops here

constexpr unsigned kTsanNoSync = 1;  // a switch orders nothing: only barriers do

// Between leaving one fiber and arriving on the next.
Fiber* g_from = nullptr;
Fiber* g_to = nullptr;

}  // namespace

#if defined(EMULATOR_ASSEMBLY)

// Saves the registers that a call preserves, changes stacks, and returns to where the other fiber left.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, . - emulator_switch_stack
)");

#endif

void Fiber::allocate_stack() {
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a stack");
    std::abort();
  }
  stack_ = static_cast<unsigned char*>(memory) + kGuardBytes;
  stack_bottom_ = stack_;
  stack_bytes_ = kStackBytes;
}

void Fiber::prepare(void (*entry)(), int number) {
  if (stack_ == nullptr) allocate_stack();
  unpoison(stack_, kStackBytes);  // frames of an abandoned run
  fake_stack_ = nullptr;
  if (__tsan_create_fiber && tsan_ == nullptr) {
    tsan_ = __tsan_create_fiber(0);
    char name[32];
    std::snprintf(name, sizeof(name), "thread %d", number);
    __tsan_set_fiber_name(tsan_, name);
  }
#if defined(EMULATOR_ASSEMBLY)
  // As if `entry` had been called by nobody: its return address is 0, where a debugger's backtrace ends.
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // the six registers
  stack_pointer_ = top - 8;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::abandon() {
  if (!begun_) return;
  begun_ = false;
  if (tsan_ == nullptr) return;
  // All it did happens before whatever comes now: the switch back synchronises. Its calls that never
  // return stay in ThreadSanitizer's books, so another one takes its place.
  void* host = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, kTsanNoSync);
  __tsan_switch_to_fiber(host, /*flags=*/0);
  __tsan_destroy_fiber(tsan_);
  tsan_ = nullptr;
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  g_from = &from;
  g_to = &to;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_bottom_, to.stack_bytes_);
  }
  if (__tsan_switch_to_fiber) {
    if (from.tsan_ == nullptr) from.tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_, kTsanNoSync);
  }
#if defined(EMULATOR_ASSEMBLY)
  emulator_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
  from.arrive();
}

void Fiber::arrive() {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
  if (g_from->stack_ == nullptr) {  // the thread's own stack, which only the sanitizer knows
    g_from->stack_bottom_ = bottom;
    g_from->stack_bytes_ = bytes;
  }
}

void Fiber::begin() {
  g_to->begun_ = true;
  g_to->arrive();
}

}  // namespace emulator
