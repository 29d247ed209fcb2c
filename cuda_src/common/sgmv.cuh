// What the kernels of the segmented LoRA products share: work items, up to item_rows rows of one adapter, and the
// 16 bytes that a lane moves at a time.
#pragma once

#include <common/ptx.cuh>
#include <common/types.cuh>

namespace lorakit {

constexpr int kMaxSlices = 3;  // outputs of one launch

// ---- Items ----

constexpr int kNoBound = 0x7fffffff;

struct Item {
  int slot;
  int rows;   // item i's are rows[i * item_rows] and those after it
  int bound;  // of the rank, as the batch says it; not below 0 as unsigned
};

// `items` starts with their number.
__device__ inline int num_items(const int* items) { return items[0]; }
__device__ inline Item load_item(const int* items, int i) {
  const auto values = reinterpret_cast<const Vector<int, 4>*>(items)[1 + i];
  return Item{values.at[0], values.at[1], values.at[2]};
}
__device__ inline void store_item(int* items, int i, const Item& item) {
  reinterpret_cast<Vector<int, 4>*>(items)[1 + i] = {{item.slot, item.rows, item.bound, 0}};
}

__device__ inline int rank_of(const Item& item, const int* slot_ranks, int max_lora_rank) {
  unsigned rank = min(static_cast<unsigned>(max_lora_rank), static_cast<unsigned>(item.bound));
  if (slot_ranks != nullptr) rank = min(rank, static_cast<unsigned>(slot_ranks[item.slot]));
  return static_cast<int>(rank);
}

// ---- Moving ----

// Neighbours that one load moves.
template <typename T>
using Piece = Vector<T, kPer16Bytes<T>>;

// `base` and a number of bytes. Numbers of rows are unsigned, strides of rows are in bytes: then it takes two
// instructions, not five.
template <typename T>
__device__ const T* advance(const T* base, unsigned long long bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + bytes);
}
template <typename T>
__device__ T* advance(T* base, unsigned long long bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(base) + bytes);
}

// 16 bytes of a row to shared memory, at some time; those past `count` elements become 0.
template <bool kAligned, typename T>
__device__ void copy_piece(Vector<unsigned, 4>* to, const T* from, long long stride, int count) {
  if constexpr (kAligned) {
    cp_async_16(to, from, count > 0 ? 16 : 0);
  } else {
    Piece<T> piece{};
#pragma unroll
    for (int i = 0; i < kPer16Bytes<T>; ++i) {
      if (i < count) piece.at[i] = from[i * stride];
    }
    *to = *reinterpret_cast<const Vector<unsigned, 4>*>(&piece);
  }
}

}  // namespace lorakit
