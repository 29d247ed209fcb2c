// Which rows share an adapter: from groups of rows to work items, once per step for all layers.
//
// Groups of one slot and one bound of the rank are a class. An item is up to item_rows rows of one class, base rows
// left out, and item i's are rows[i, 0 .. its rows]. Their order within a class is that of atomics and may change
// from run to run; what a row gets does not depend on it.
//
// Classes 0 .. max_num_loras - 1 are the slots, with the bound of their first group; a group of another bound is
// a class of its own, max_num_loras + group. With bad offsets no row has an adapter.
#include <common/ragged.cuh>
#include <common/sgmv.cuh>

namespace lorakit {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;

// The sum over the threads before this one, and over all. `sums` has kWarps elements.
__device__ inline int sum_before(int value, int* sums, int& total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int sum = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_sync(kFullMask, sum, max(lane - step, 0));
    if (lane >= step) sum += other;
  }
  if (lane == kWarpSize - 1) sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before;
}

// Row t's place among the items.
__device__ inline void place_row(int t, const int* offsets, const int* places, int groups, int* rows) {
  const int g = segment_of(t, offsets, groups);
  if (g < groups && places[g] >= 0) rows[places[g] + t - offsets[g]] = t;
}

// One block. With rows it places them too.
__global__ void __launch_bounds__(kThreads, 1)
    sgmv_route_items_kernel(const int* __restrict__ ids,      // [groups]
                            const int* __restrict__ ranks,    // [groups] or null
                            const int* __restrict__ offsets,  // [groups + 1]
                            int* items,                       // [1 + max_items, 4], their number and each
                            int* places,   // [groups], of a group's first row in `rows`, or -1
                            int* rows,     // [max_items, item_rows] or null
                            int* scratch,  // [max_num_loras + 2 * classes]
                            unsigned* errors, int total_tokens, int groups, int max_num_loras, int classes,
                            int item_rows) {
  __shared__ int sums[kWarps];
  __shared__ int bad;
  int* first_groups = scratch;                // [max_num_loras], the first group of each slot
  int* sizes = first_groups + max_num_loras;  // [classes], rows of each class
  int* ends = sizes + classes;                // [classes], where the class's next group goes

  // Offsets that cannot be followed.
  if (threadIdx.x == 0) bad = 0;
  for (int s = threadIdx.x; s < max_num_loras; s += kThreads) first_groups[s] = groups;
  for (int c = threadIdx.x; c < classes; c += kThreads) sizes[c] = 0;
  __syncthreads();
  for (int g = threadIdx.x; g <= groups; g += kThreads) {
    const bool good = g == 0 ? offsets[0] == 0 : offsets[g - 1] <= offsets[g];
    if (!good || offsets[g] > total_tokens) atomicOr(&bad, 1);
  }
  __syncthreads();
  if (bad && threadIdx.x == 0) report(errors, kBadOffsets);

  // Rows of each class.
  const auto slot_of = [&](int g) {  // -1: base rows
    const int slot = ids[g];
    return bad || slot < 0 || slot >= max_num_loras ? -1 : slot;
  };
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    if (slot_of(g) >= 0) {
      if (ranks != nullptr) atomicMin(&first_groups[ids[g]], g);
    } else if (!bad && ids[g] >= 0 && offsets[g] < offsets[g + 1]) {
      report(errors, kBadSlot);
    }
  }
  if (ranks != nullptr) __syncthreads();
  const auto class_of = [&](int g) {
    const int slot = slot_of(g);
    if (slot < 0 || ranks == nullptr || ranks[g] == ranks[first_groups[slot]]) return slot;
    return max_num_loras + g;
  };
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    const int c = class_of(g);
    if (c >= 0) atomicAdd(&sizes[c], offsets[g + 1] - offsets[g]);
  }
  __syncthreads();

  // Items of each class.
  const int chunk = ceil_div(classes, kThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * chunk, classes), end = min(begin + chunk, classes);
  int item = 0, all_items = 0;
  for (int c = begin; c < end; ++c) item += ceil_div(sizes[c], item_rows);
  item = sum_before(item, sums, all_items);
  for (int c = begin; c < end; ++c) {
    const int size = sizes[c];
    const int slot = c < max_num_loras ? c : size > 0 ? ids[c - max_num_loras] : -1;
    ends[c] = item * item_rows;
    for (int done = 0; done < size; done += item_rows, ++item) {
      const int bound =
          ranks == nullptr ? kNoBound : ranks[c < max_num_loras ? first_groups[c] : c - max_num_loras];
      store_item(items, item, Item{slot, min(item_rows, size - done), bound});
    }
  }
  if (threadIdx.x == 0) items[0] = all_items;
  __syncthreads();

  // Rows of each item.
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    const int c = class_of(g);
    places[g] = c < 0 ? -1 : atomicAdd(&ends[c], offsets[g + 1] - offsets[g]);
  }
  if (rows == nullptr) return;
  __syncthreads();
  for (int t = threadIdx.x; t < total_tokens; t += kThreads) place_row(t, offsets, places, groups, rows);
}

// Grid ceil(total_tokens / 1024).
__global__ void __launch_bounds__(kThreads, 1)
    sgmv_route_rows_kernel(const int* __restrict__ offsets,  // [groups + 1]
                           const int* __restrict__ places,   // [groups]
                           int* rows,                        // [max_items, item_rows]
                           int total_tokens, int groups) {
  const long long t = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (t < total_tokens) place_row(static_cast<int>(t), offsets, places, groups, rows);
}

}  // namespace lorakit
