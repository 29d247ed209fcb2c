// The part of CUDA's device language that the kernels use, for g++. NVRTC knows all of it without an include.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include <crt/host_defines.h>
#include <emulator/runtime.h>
#include <vector_functions.h>

constexpr int warpSize = emulator::kWarpSize;

// ---- Barriers, shuffles, votes

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::warp_barrier(mask, site);
}

namespace emulator {

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kIndex, mask, value, lane, width, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kDown, mask, value, int(delta), width, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulator::Site site = emulator::Site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kXor, mask, value, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::vote("__ballot_sync", mask, predicate != 0, site);
}

// The place of the lowest bit that is set, counted from 1; 0 if there is none.
inline int __ffs(int value) { return __builtin_ffs(value); }

inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::vote("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::vote("__all_sync", mask, predicate == 0, site) == 0;
}

// ---- Memory. A thread runs until it waits, so an atomic needs no lock; the built-ins tell TSan what it is.

inline int atomicMin(int* address, int value) {
  int old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
  float before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  after = before + value;
  __atomic_store(address, &after, __ATOMIC_RELAXED);
  return before;
}
inline int atomicOr(int* address, int value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// Byte i of the result is byte (which >> 4i) & 7 of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
  const unsigned long long bytes = (static_cast<unsigned long long>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> ((which >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

[[noreturn]] inline void __trap(emulator::Site site = emulator::Site::here()) { emulator::fail(site, "__trap()"); }

// ---- Arithmetic beyond <cmath>

#define EMULATOR_MIN_MAX(T)                              \
  inline T min(T a, T b) { return b < a ? b : a; }       \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
// As on the device: the other operand when one is NaN. CUDA promotes a mixed pair of integers to unsigned.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
