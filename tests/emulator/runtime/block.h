// The state of the one block that runs at a time. Blocks of a grid run one after another.
#pragma once

#include <cstdarg>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <emulator/runtime.h>

#include "fiber.h"

namespace emulator {

// What a thread waits for. The name is shown in reports; threads wait together when all of it agrees.
struct Wait {
  enum Kind { kNothing, kBlock, kNamed, kWarp };
  Kind kind = kNothing;
  const char* name = "";
  Site site = {"", 0};
  unsigned mask = 0;         // of lanes, or which named barrier
  bool aligned = false;      // all lanes must be at the same line
  void* operand = nullptr;   // this lane's part in a warp collective
  // Computes the collective when all lanes have arrived; operands of absent lanes are null.
  void (*complete)(void* const (&operands)[kWarpSize]) = nullptr;
  int threads = 0;  // that a named barrier waits for
};

struct Warp;

struct Thread {
  Fiber fiber;
  uint3 index;
  int number;
  Warp* warp;
  bool live;
  Wait wait;

  std::vector<Copy> copies;  // issued and not yet delivered, oldest first
  size_t delivered;          // this many of them have been
  int groups;                // committed so far
};

// A place where threads meet, as ThreadSanitizer sees it. A thread that has passed may release again before
// another has acquired, so that two tags alternate: it cannot pass twice without the other.
struct Meeting {
  char tags[2];
  unsigned generation = 0;
  void* tag() { return &tags[generation % 2]; }
};

struct Warp {
  Thread* lanes[kWarpSize];
  unsigned live;     // lanes that exist and have not returned
  unsigned waiting;  // of them, those in a warp collective
  std::map<unsigned, Meeting> meetings;  // by mask
};

enum Schedule { kInOrder, kLifo, kRandom };

// Threads that could run, in the order in which they became ready.
class Ready {
 public:
  void reset(Schedule schedule, unsigned long long seed);
  void push(Thread* thread) { threads_.push_back(thread); }
  Thread* pop();  // null when there is none
  void clear() { threads_.clear(); }
  // The order in which the blocks of a grid run.
  std::vector<unsigned> block_order(unsigned count);

 private:
  Schedule schedule_ = kInOrder;
  std::mt19937_64 random_;
  std::deque<Thread*> threads_;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch, with their stacks
  std::vector<Warp> warps;
  int count = 0;  // threads in this launch
  int live = 0;
  int at_barrier = 0;
  Meeting barrier;
  Meeting named_barriers[16];
  Ready ready;
};

extern Block g_block;
extern Thread* g_current;
extern const Launch* g_launch;

// The current thread waits; returns once somebody has made it ready.
void suspend();
void make_ready(Thread& thread);

// Lets barriers and collectives go on that waited for a thread that has now returned.
void complete_block_barrier();
void complete_warp_collectives(Warp& warp);

// Ends the launch with a message about the whole block. Does not return.
[[noreturn]] void fail_block(const std::string& message);
// One line for each run of threads that wait for the same thing.
std::string describe_waits();
std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string format_list(const char* format, va_list arguments);

// Memory of a block: checks and lays out, fills with NaN before each block, checks the gaps after it.
void begin_shared_memory(void* static_begin, void* static_end);
void fill_shared_memory();
// What is wrong with the gaps between arrays, if anything.
std::string check_shared_memory();
void end_shared_memory();

// Between these, faults of kernel code and launches that take too long fail like everything else.
void begin_faults(const void* kernel_code);
void end_faults();

}  // namespace emulator
