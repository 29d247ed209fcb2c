// What compiled kernels call: the part of the emulator that is built once and never instrumented, so that a
// sanitizer sees the kernel's own loads and stores and nothing of the machinery.
#pragma once

#include <cstddef>

#include <vector_types.h>

#define EMULATOR_API __attribute__((visibility("default")))

namespace emulator {

constexpr int kWarpSize = 32;

// Where in a kernel something was called. As a default argument, `here()` gives the caller's own line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// One launch; backend.py fills in the same fields.
struct Launch {
  const char* kernel;
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  int schedule;
  unsigned long long seed;
  unsigned long long first_block;  // the blocks before it do not run
  double seconds;  // of the CPU's time before a launch counts as hung
  char* error;  // receives the message when the launch fails
  unsigned long long error_bytes;
};

// Runs every thread of every block; returns 0, or 1 with a message in launch.error.
EMULATOR_API int run(const Launch& launch, void (*thread)(void* closure), void* closure, void* static_begin,
                     void* static_end);

// Ends the launch with a message about the calling thread. Does not return.
[[noreturn]] EMULATOR_API void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- Barriers and warp collectives. Each waits for the other threads; none is a function of this thread alone.

EMULATOR_API void block_barrier(Site site);
EMULATOR_API void named_barrier(int id, int threads, Site site);
EMULATOR_API void warp_barrier(unsigned mask, Site site);

enum class Shuffle { kIndex, kDown, kXor };
EMULATOR_API unsigned long long shuffle(Shuffle kind, unsigned mask, unsigned long long bits, int operand,
                                        int width, Site site);

// The lanes of the mask whose predicate holds. `name` is the built-in that the kernel called.
EMULATOR_API unsigned vote(const char* name, unsigned mask, bool predicate, Site site);

// ldmatrix.x4: `row` is what lies at this lane's address.
EMULATOR_API void distribute_matrices(unsigned (&d)[4], const unsigned short (&row)[8], bool transposed, Site site);

// mma.m16n8k16 with float32 accumulators; the sums run in the order of k.
enum class Format { kFloat16, kBfloat16 };
EMULATOR_API void multiply_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Format format,
                                    Site site);

// ---- Memory

// Dynamic shared memory: the next `bytes` after `arrays` arrays, which took the first `taken` bytes.
EMULATOR_API unsigned char* take_shared(unsigned taken, unsigned arrays, unsigned bytes, Site site);
EMULATOR_API bool is_shared(const void* pointer, size_t bytes);

// cp.async: copies wait in their thread's queue, in groups, and are delivered by whoever waits for them.
struct Copy {
  void* to;
  uint4 data;
  int group;
};
EMULATOR_API void issue_copy(void* to, const uint4& data);
EMULATOR_API void commit_copies();
// The next copy to deliver when at most `pending` groups may stay in flight; false when there is none.
EMULATOR_API bool next_copy(int pending, Copy& copy);

}  // namespace emulator

// The built-in variables, set whenever a thread is resumed.
extern EMULATOR_API uint3 threadIdx, blockIdx;
extern EMULATOR_API dim3 blockDim, gridDim;
