// Shared memory and asynchronous copies.
#include "block.h"
#include "sanitizers.h"

namespace emulator {

namespace {

constexpr unsigned kGap = 256;              // between two arrays of dynamic shared memory, and after the last
constexpr unsigned kMostArrays = 64;        // more than any kernel takes
constexpr unsigned kMostBytes = 227 * 1024;  // of a block on any device; backend.py knows it too
constexpr unsigned char kNaN = 0xff;        // bytes that make a NaN of every float type

alignas(1024) unsigned char g_arena[kMostBytes + kMostArrays * kGap];

// Where each array of this launch begins and ends; all threads must take the same ones.
struct Array {
  unsigned begin, end;
};
std::vector<Array> g_arrays;

unsigned char* g_static_begin = nullptr;
unsigned char* g_static_end = nullptr;

// Not memset, which AddressSanitizer and ThreadSanitizer would intercept and check.
void fill(unsigned char* begin, unsigned char* end) {
  for (volatile unsigned char* byte = begin; byte != end; ++byte) *byte = kNaN;
}

unsigned used_bytes() { return g_arrays.empty() ? 0 : g_arrays.back().end; }

}  // namespace

void begin_shared_memory(void* static_begin, void* static_end) {
  g_static_begin = static_cast<unsigned char*>(static_begin);
  g_static_end = static_cast<unsigned char*>(static_end);
  g_arrays.clear();
  fill(g_arena, g_arena + g_launch->shared_bytes + kMostArrays * kGap);
  poison(g_arena, sizeof(g_arena));
}

void fill_shared_memory() {
  fill(g_arena, g_arena + used_bytes());
  fill(g_static_begin, g_static_end);
}

std::string check_shared_memory() {
  for (const Array& array : g_arrays) {
    for (unsigned i = array.end; i < array.end + kGap; ++i) {
      if (g_arena[i] != kNaN) {
        return format("a write %u bytes past the end of a shared array of %u bytes", i - array.end,
                      array.end - array.begin);
      }
    }
  }
  return "";
}

void end_shared_memory() { unpoison(g_arena, sizeof(g_arena)); }

unsigned char* take_shared(unsigned taken, unsigned arrays, unsigned bytes, Site site) {
  if (taken + bytes > g_launch->shared_bytes) {
    fail(site, "the kernel takes %u bytes of dynamic shared memory, the launch gives %u", taken + bytes,
         g_launch->shared_bytes);
  }
  if (arrays >= kMostArrays) fail(site, "the emulator has room for %u shared arrays", kMostArrays);
  const unsigned begin = taken + arrays * kGap;
  if (arrays == g_arrays.size()) {
    g_arrays.push_back({begin, begin + bytes});
    unpoison(g_arena + begin, bytes);
  } else if (g_arrays[arrays].begin != begin || g_arrays[arrays].end != begin + bytes) {
    fail(site, "shared array %u has %u bytes here, but %u elsewhere in the block", arrays, bytes,
         g_arrays[arrays].end - g_arrays[arrays].begin);
  }
  return g_arena + begin;
}

bool is_shared(const void* pointer, size_t bytes) {
  auto* address = static_cast<const unsigned char*>(pointer);
  auto inside = [&](const unsigned char* begin, const unsigned char* end) {
    return address >= begin && address + bytes <= end;
  };
  return inside(g_arena, g_arena + used_bytes() + kGap) || inside(g_static_begin, g_static_end);
}

// ---- Asynchronous copies

void issue_copy(void* to, const uint4& data) { g_current->copies.push_back({to, data, g_current->groups}); }

void commit_copies() { ++g_current->groups; }

bool next_copy(int pending, Copy& copy) {
  Thread& self = *g_current;
  if (self.delivered == self.copies.size()) {
    self.copies.clear();
    self.delivered = 0;
    return false;
  }
  const Copy& oldest = self.copies[self.delivered];
  if (oldest.group >= self.groups - pending) return false;
  copy = oldest;
  ++self.delivered;
  return true;
}

}  // namespace emulator
