// Runs the blocks of a launch, and the threads of a block as fibers.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "block.h"
#include "sanitizers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Block g_block;
Thread* g_current = nullptr;
const Launch* g_launch = nullptr;

namespace {

Fiber g_host;  // the thread that called run()
void (*g_entry)(void*) = nullptr;
void* g_closure = nullptr;
std::string g_failure;
char g_block_begins, g_block_ends;  // for ThreadSanitizer: blocks run one after another

}  // namespace

// ---- The order of threads and blocks

void Ready::reset(Schedule schedule, unsigned long long seed) {
  schedule_ = schedule;
  random_.seed(seed);
  threads_.clear();
}

Thread* Ready::pop() {
  if (threads_.empty()) return nullptr;
  if (schedule_ == kRandom) std::swap(threads_[random_() % threads_.size()], threads_.back());
  Thread* thread = schedule_ == kInOrder ? threads_.front() : threads_.back();
  if (schedule_ == kInOrder) {
    threads_.pop_front();
  } else {
    threads_.pop_back();
  }
  return thread;
}

std::vector<unsigned> Ready::block_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule_ == kLifo) std::reverse(order.begin(), order.end());
  if (schedule_ == kRandom) std::shuffle(order.begin(), order.end(), random_);
  return order;
}

// ---- Switching

namespace {

// Goes on with the next thread that is ready, or with the host when there is none.
void leave(Fiber& from) {
  Thread* next = g_block.ready.pop();
  if (next != nullptr) threadIdx = next->index;
  if (next == g_current && next != nullptr) return;
  g_current = next;
  Fiber::switch_to(from, next != nullptr ? next->fiber : g_host);
}

void thread_main() {
  Fiber::begin();
  Thread& self = *g_current;
  acquire(&g_block_begins);
  g_entry(g_closure);
  if (self.delivered != self.copies.size()) {
    fail_block(format("thread %d returned with %zu cp.async copies that nobody waited for", self.number,
                      self.copies.size() - self.delivered));
  }
  if (enough_reports()) fail_block("stopped, having reported enough");
  release(&g_block_ends);
  self.live = false;
  --g_block.live;
  self.warp->live &= ~(1u << (self.number % kWarpSize));
  complete_block_barrier();
  complete_warp_collectives(*self.warp);
  self.fiber.end();
  leave(self.fiber);
}

void run_block() {
  Block& block = g_block;
  block.live = block.count;
  block.at_barrier = 0;
  for (Warp& warp : block.warps) warp.live = warp.waiting = 0;
  for (int i = 0; i < block.count; ++i) {
    Thread& thread = *block.threads[i];
    thread.live = true;
    thread.wait = Wait();
    thread.copies.clear();
    thread.delivered = 0;
    thread.groups = 0;
    thread.warp->live |= 1u << (i % kWarpSize);
    thread.fiber.prepare(thread_main, i);
    block.ready.push(&thread);
  }
  fill_shared_memory();
  release(&g_block_begins);
  g_current = nullptr;
  leave(g_host);
  acquire(&g_block_ends);
  if (g_failure.empty() && block.live > 0) g_failure = "deadlock: no thread can go on\n" + describe_waits();
  if (g_failure.empty()) g_failure = check_shared_memory();
}

void set_up(const Launch& launch) {
  blockDim = dim3(launch.block[0], launch.block[1], launch.block[2]);
  gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
  Block& block = g_block;
  block.count = int(blockDim.x * blockDim.y * blockDim.z);
  block.warps.resize((block.count + kWarpSize - 1) / kWarpSize);
  while (int(block.threads.size()) < block.count) block.threads.push_back(std::make_unique<Thread>());
  for (int i = 0; i < block.count; ++i) {
    Thread& thread = *block.threads[i];
    thread.number = i;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.warp = &block.warps[i / kWarpSize];
    thread.warp->lanes[i % kWarpSize] = &thread;
  }
  block.ready.reset(Schedule(launch.schedule), launch.seed);
}

}  // namespace

void suspend() { leave(g_current->fiber); }

void make_ready(Thread& thread) {
  thread.wait.kind = Wait::kNothing;
  g_block.ready.push(&thread);
}

int run(const Launch& launch, void (*thread)(void*), void* closure, void* static_begin, void* static_end) {
  g_launch = &launch;
  g_entry = thread;
  g_closure = closure;
  g_failure.clear();
  set_up(launch);
  begin_shared_memory(static_begin, static_end);
  begin_faults(reinterpret_cast<const void*>(thread));
  for (unsigned number : g_block.ready.block_order(gridDim.x * gridDim.y * gridDim.z)) {
    if (number < launch.first_block) continue;
    blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / (gridDim.x * gridDim.y)};
    run_block();
    if (!g_failure.empty()) break;
  }
  for (auto& each : g_block.threads) each->fiber.abandon();
  forget_reported_races();
  end_faults();
  end_shared_memory();
  if (g_failure.empty()) return 0;
  std::snprintf(launch.error, launch.error_bytes, "%s, block (%u, %u, %u): %s", launch.kernel, blockIdx.x,
                blockIdx.y, blockIdx.z, g_failure.c_str());
  return 1;
}

// ---- Failing. The other threads are abandoned where they are: device code owns nothing that needs a destructor.

void fail_block(const std::string& message) {
  g_failure = message;
  g_block.ready.clear();
  Fiber& from = g_current->fiber;
  g_current = nullptr;
  Fiber::switch_to(from, g_host);
  __builtin_unreachable();
}

void fail(Site site, const char* message, ...) {
  va_list arguments;
  va_start(arguments, message);
  const std::string text = format_list(message, arguments);
  va_end(arguments);
  fail_block(format("thread %d at %s:%d: ", g_current->number, site.file, site.line) + text);
}

std::string format_list(const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

std::string format(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_list(format, arguments);
  va_end(arguments);
  return text;
}

std::string describe_waits() {
  auto describe = [](const Thread& thread) -> std::string {
    const Wait& wait = thread.wait;
    if (!thread.live) return "returned";
    if (wait.kind == Wait::kNothing) return "running";
    std::string what = wait.name;
    if (wait.kind == Wait::kNamed) what += format("(%u, %d)", wait.mask, wait.threads);
    if (wait.kind == Wait::kWarp) what += format("(mask 0x%08x)", wait.mask);
    return what + format(" at %s:%d", wait.site.file, wait.site.line);
  };
  std::string text;
  for (int first = 0; first < g_block.count;) {
    const std::string what = describe(*g_block.threads[first]);
    int last = first;
    while (last + 1 < g_block.count && describe(*g_block.threads[last + 1]) == what) ++last;
    text += first == last ? format("  thread %d: ", first) : format("  threads %d-%d: ", first, last);
    text += what + "\n";
    first = last + 1;
  }
  return text;
}

}  // namespace emulator
