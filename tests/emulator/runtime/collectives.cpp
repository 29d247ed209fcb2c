// Barriers, and everything that the lanes of a warp do together.
#include <cstdint>
#include <cstring>

#include "block.h"
#include "sanitizers.h"

namespace emulator {

namespace {

bool same_line(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

}  // namespace

// ---- Block barrier

void complete_block_barrier() {
  Block& block = g_block;
  if (block.live == 0 || block.at_barrier < block.live) return;
  const Thread* first = nullptr;
  for (int i = 0; i < block.count; ++i) {
    Thread& thread = *block.threads[i];
    if (!thread.live) continue;
    if (first == nullptr) first = &thread;
    // Hardware would let them pass, but CUDA demands that a barrier be reached by all threads or by none.
    if (!same_line(thread.wait.site, first->wait.site)) {
      fail_block("divergent barrier: threads meet in different places\n" + describe_waits());
    }
  }
  block.at_barrier = 0;
  ++block.barrier.generation;
  for (int i = 0; i < block.count; ++i) {
    if (block.threads[i]->live) make_ready(*block.threads[i]);
  }
}

void block_barrier(Site site) {
  Wait& wait = g_current->wait;
  wait.kind = Wait::kBlock;
  wait.name = "__syncthreads";
  wait.site = site;
  void* tag = g_block.barrier.tag();
  release(tag);
  if (enough_reports()) fail_block("stopped, having reported enough");
  ++g_block.at_barrier;
  complete_block_barrier();
  suspend();
  acquire(tag);
}

// ---- Named barriers

// They complete when as many threads as the callers say are there, from whichever places; who has returned is not.
void named_barrier(int id, int threads, Site site) {
  if (id < 1 || id > 15) fail(site, "named_barrier: id is %d, must be 1 to 15", id);
  if (threads < kWarpSize || threads > g_block.count || threads % kWarpSize != 0) {
    fail(site, "named_barrier: %d threads of a block of %d, must be whole warps", threads, g_block.count);
  }
  Meeting& meeting = g_block.named_barriers[id];
  void* tag = meeting.tag();
  release(tag);
  g_current->wait = {Wait::kNamed, "named_barrier", site, unsigned(id), false, nullptr, nullptr};
  g_current->wait.threads = threads;
  std::vector<Thread*> waiting;
  for (int i = 0; i < g_block.count; ++i) {
    Thread& thread = *g_block.threads[i];
    if (thread.live && thread.wait.kind == Wait::kNamed && thread.wait.mask == unsigned(id)) {
      if (thread.wait.threads != threads) {
        fail_block("divergent barrier: threads expect different numbers\n" + describe_waits());
      }
      waiting.push_back(&thread);
    }
  }
  if (int(waiting.size()) == threads) {
    ++meeting.generation;
    for (Thread* thread : waiting) make_ready(*thread);
  }
  suspend();
  acquire(tag);
}

// ---- Warp collectives

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// The live lanes of the mask, if all of them have arrived; else 0.
unsigned all_arrived(const Warp& warp, unsigned mask) {
  const unsigned wanted = mask & warp.live;
  return (warp.waiting & wanted) == wanted ? wanted : 0;
}

// Computes a collective for lanes that are all there, and lets them go on.
void complete(Warp& warp, unsigned lanes) {
  const Wait& first = warp.lanes[__builtin_ctz(lanes)]->wait;
  if (first.aligned && lanes != kAllLanes) {
    fail_block(format("%s needs all 32 lanes of a warp, but some have returned\n", first.name) + describe_waits());
  }
  void* operands[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) {
    operands[i] = nullptr;
    if (!(lanes >> i & 1)) continue;
    const Wait& wait = warp.lanes[i]->wait;
    if (std::strcmp(wait.name, first.name) != 0 || wait.mask != first.mask ||
        (first.aligned && !same_line(wait.site, first.site))) {
      fail_block("divergent collective: lanes of a warp wait for each other in different ones\n" +
                 describe_waits());
    }
    operands[i] = wait.operand;
  }
  if (first.complete != nullptr) first.complete(operands);
  warp.waiting &= ~lanes;
  for (int i = 0; i < kWarpSize; ++i) {
    if (lanes >> i & 1) make_ready(*warp.lanes[i]);
  }
}

// Waits until all live lanes of the mask are here, with the same name and mask.
void meet(const char* name, unsigned mask, bool aligned, void* operand,
          void (*completion)(void* const (&)[kWarpSize]), Site site) {
  Thread& self = *g_current;
  Warp& warp = *self.warp;
  const unsigned lane_bit = 1u << (self.number % kWarpSize);
  if (!(mask & lane_bit)) fail(site, "%s: the mask 0x%08x leaves out the caller", name, mask);
  self.wait = {Wait::kWarp, name, site, mask, aligned, operand, completion};
  warp.waiting |= lane_bit;
  if (const unsigned lanes = all_arrived(warp, mask)) complete(warp, lanes);
  suspend();
}

void meet_aligned(const char* name, void* operand, void (*completion)(void* const (&)[kWarpSize]), Site site) {
  meet(name, kAllLanes, /*aligned=*/true, operand, completion, site);
}

}  // namespace

void complete_warp_collectives(Warp& warp) {
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(warp.waiting >> i & 1)) continue;
    if (const unsigned lanes = all_arrived(warp, warp.lanes[i]->wait.mask)) complete(warp, lanes);
  }
}

void warp_barrier(unsigned mask, Site site) {
  void* tag = nullptr;
  if (__tsan_release) {
    tag = g_current->warp->meetings[mask].tag();
    release(tag);
  }
  meet("__syncwarp", mask, /*aligned=*/false, nullptr, nullptr, site);
  if (__tsan_acquire) {
    // The first to go on turns the page for the next meeting of this mask.
    Meeting& meeting = g_current->warp->meetings[mask];
    if (meeting.tag() == tag) ++meeting.generation;
    acquire(tag);
  }
}

// ---- Shuffles and votes

namespace {

struct ShuffleOperand {
  Shuffle kind;
  int operand, width;
  unsigned long long value, result;
  int bad_source;  // a lane that the caller must not read, or -1
};

// PTX ISA, shfl.sync. A lane may read from an earlier segment of `width` lanes, but not from a later one.
int source_lane(const ShuffleOperand& s, int lane) {
  const int first = lane & ~(s.width - 1);
  const int last = first + s.width - 1;
  const int operand = s.operand & (kWarpSize - 1);
  int source = first + (operand & (s.width - 1));
  if (s.kind == Shuffle::kDown) source = lane + operand;
  if (s.kind == Shuffle::kXor) source = lane ^ operand;
  return source > last ? lane : source;  // out of range: one's own value
}

void complete_shuffle(void* const (&operands)[kWarpSize]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (operands[lane] == nullptr) continue;
    auto& mine = *static_cast<ShuffleOperand*>(operands[lane]);
    const int source = source_lane(mine, lane);
    mine.bad_source = operands[source] == nullptr ? source : -1;
    if (mine.bad_source < 0) mine.result = static_cast<ShuffleOperand*>(operands[source])->value;
  }
}

struct VoteOperand {
  bool predicate;
  unsigned result;
};

void complete_vote(void* const (&operands)[kWarpSize]) {
  unsigned result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (operands[lane] != nullptr && static_cast<VoteOperand*>(operands[lane])->predicate) result |= 1u << lane;
  }
  for (void* operand : operands) {
    if (operand != nullptr) static_cast<VoteOperand*>(operand)->result = result;
  }
}

const char* const kShuffleNames[] = {"__shfl_sync", "__shfl_down_sync", "__shfl_xor_sync"};

}  // namespace

unsigned long long shuffle(Shuffle kind, unsigned mask, unsigned long long bits, int operand, int width, Site site) {
  const char* name = kShuffleNames[int(kind)];
  if (width <= 0 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(site, "%s: the width is %d, must be a power of two up to 32", name, width);
  }
  ShuffleOperand mine = {kind, operand, width, bits, 0, -1};
  meet(name, mask, /*aligned=*/false, &mine, complete_shuffle, site);
  if (mine.bad_source >= 0) {
    fail(site, "%s reads lane %d, which has returned or is not in the mask 0x%08x", name, mine.bad_source, mask);
  }
  return mine.result;
}

unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  VoteOperand mine = {predicate, 0};
  meet(name, mask, /*aligned=*/false, &mine, complete_vote, site);
  return mine.result;
}

// ---- Matrices. The maps between lanes and elements are those of the PTX ISA, told in cuda_src/common/ptx.cuh.

namespace {

struct MatrixOperand {
  unsigned (*d)[4];
  const unsigned short (*row)[8];
  bool transposed;
};

void complete_distribution(void* const (&operands)[kWarpSize]) {
  auto element = [&](int matrix, int row, int column) -> unsigned {
    return (*static_cast<MatrixOperand*>(operands[8 * matrix + row])->row)[column];
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<MatrixOperand*>(operands[lane]);
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const unsigned low = mine.transposed ? element(i, column, row) : element(i, row, column);
      const unsigned high = mine.transposed ? element(i, column + 1, row) : element(i, row, column + 1);
      (*mine.d)[i] = low | high << 16;
    }
  }
}

struct MultiplyOperand {
  float (*d)[4];
  const unsigned (*a)[4];
  const unsigned (*b)[2];
};

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float bfloat16_to_float(unsigned bits) { return from_bits(bits << 16); }

float float16_to_float(unsigned bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  if ((bits & 0x7c00u) == 0x7c00u) return from_bits(sign | 0x7f800000u | (bits & 0x3ffu) << 13);
  // Shifted into place, the exponent is 112 too small; multiplying also makes subnormals normal.
  return from_bits(sign | 0x3f800000u) * (from_bits((bits & 0x7fffu) << 13) * 0x1p112f);
}

template <float (*kToFloat)(unsigned)>
void complete_multiplication(void* const (&operands)[kWarpSize]) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<MultiplyOperand*>(operands[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {  // the low and the high 16 bits: neighbours
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][c + 8 * (i / 2) + half] = kToFloat((*mine.a)[i] >> shift & 0xffffu);
        d[g + 8 * (i / 2)][c + i % 2] = (*mine.d)[i];
      }
      for (int i = 0; i < 2; ++i) b[c + 8 * i + half][g] = kToFloat((*mine.b)[i] >> shift & 0xffffu);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<MultiplyOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) (*mine.d)[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

void distribute_matrices(unsigned (&d)[4], const unsigned short (&row)[8], bool transposed, Site site) {
  MatrixOperand mine = {&d, &row, transposed};
  meet_aligned(transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", &mine, complete_distribution, site);
}

void multiply_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Format format, Site site) {
  MultiplyOperand mine = {&d, &a, &b};
  meet_aligned("mma_m16n8k16", &mine,
               format == Format::kFloat16 ? complete_multiplication<float16_to_float>
                                          : complete_multiplication<bfloat16_to_float>,
               site);
}

}  // namespace emulator
