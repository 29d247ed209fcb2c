// Turns what would end the process, or keep it busy for ever, into the failure of the launch.
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/time.h>
#include <ucontext.h>

#include "block.h"
#include "sanitizers.h"

namespace emulator {

namespace {

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr size_t kStackBytes = 64 * 1024;  // a stack overflow is reported too, so not on the fiber's stack

struct sigaction g_before[NSIG];
stack_t g_stack_before;
const void* g_kernel_base = nullptr;  // where the kernel's library is loaded

void* program_counter(void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
  return nullptr;
#endif
}

// In the form in which sanitizers name code they know no line of; build.py looks it up.
std::string describe_code(void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return "at an unknown place";
  const size_t offset = static_cast<char*>(address) - static_cast<char*>(info.dli_fbase);
  return format("in (%s+0x%zx)", info.dli_fname, offset);
}

void set_timer(double seconds) {
  const itimerval value = {{0, 0}, {time_t(seconds), suseconds_t((seconds - time_t(seconds)) * 1e6)}};
  setitimer(ITIMER_VIRTUAL, &value, nullptr);
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (g_current == nullptr) {  // not in a kernel: somebody else's crash
    std::signal(signal, SIG_DFL);
    return;
  }
  fail_block(format("thread %d: %s of the CPU (address %p) ", g_current->number, strsignal(signal), info->si_addr) +
             describe_code(program_counter(context)));
}

void on_timer(int, siginfo_t*, void* context) {
  void* address = program_counter(context);
  Dl_info info;
  const bool in_kernel = g_current != nullptr && dladdr(address, &info) != 0 && info.dli_fbase == g_kernel_base;
  if (!in_kernel) return set_timer(0.01);  // the machinery cannot be left anywhere
  fail_block(format("still running after %g seconds; thread %d is ", g_launch->seconds, g_current->number) +
             describe_code(address) + "\n" + describe_waits());
}

}  // namespace

void begin_faults(const void* kernel_code) {
  if (__tsan_switch_to_fiber) return;  // ThreadSanitizer lets no handler leave
  Dl_info info;
  g_kernel_base = dladdr(kernel_code, &info) != 0 ? info.dli_fbase : nullptr;
  static void* stack = std::malloc(kStackBytes);
  const stack_t mine = {stack, 0, kStackBytes};
  sigaltstack(&mine, &g_stack_before);
  // A handler that fails the launch does not return: nothing may stay blocked.
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  action.sa_sigaction = on_fault;
  for (int signal : kFaults) sigaction(signal, &action, &g_before[signal]);
  action.sa_sigaction = on_timer;
  sigaction(SIGVTALRM, &action, &g_before[SIGVTALRM]);
  set_timer(g_launch->seconds);
}

void end_faults() {
  if (__tsan_switch_to_fiber) return;
  set_timer(0);
  sigaction(SIGVTALRM, &g_before[SIGVTALRM], nullptr);
  for (int signal : kFaults) sigaction(signal, &g_before[signal], nullptr);
  sigaltstack(&g_stack_before, nullptr);
}

}  // namespace emulator
