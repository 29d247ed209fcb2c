// The attention of attention.cu for sequences with few queries in this step: a token or two, as in decode
// (has_few_rows). It is bound by reading keys and values, each once.
//
// All that such sequences read is one line of tiles of kTileKeys keys, by sequence, kRows rows, key head and
// position, and the blocks, as many as run at once, share it evenly, whatever the lengths: block i has the
// chunks that start in the i-th share. A chunk is some tiles of one sequence, as its own length says
// (chunk_tiles). Its state is, for each row,
//
//   largest = max_j s[j]      sum = sum_j 2^(s[j] - largest)      acc = sum_j 2^(s[j] - largest) value[j]
//
// and the states of a row's chunks are merged from first to last, by the block that has them; from the chunk
// on that another block has, by attention_merge_kernel. So the bits of a row depend on its own sequence only.
//
// A warp has 16 keys of each tile: it copies them, a tile ahead, and no other warp waits for them. Keys are the
// rows of its products, S^T = K Q^T and acc^T = V^T P^T, as they are more than the queries. At the end of a chunk
// the warps' states are added up, each warp some elements, where its last keys and values were.
#include <common/attention_line.cuh>
#include <common/attention_state.cuh>
#include <common/mma.cuh>
#include <common/paged_kv.cuh>
#include <common/ragged.cuh>
#include <common/reduce.cuh>
#include <common/shared.cuh>

namespace lorakit {

template <typename T, int kHeadDim>
constexpr int kDecodeWarps = kHeadDim * int(sizeof(T)) <= 256 ? 4 : 2;

// Blocks for which the compiler must leave registers.
template <typename T, int kHeadDim, int kRows>
constexpr int kMinDecodeBlocks = sizeof(T) == 2 && kHeadDim <= 128 && kRows == 8 ? 3 : 1;

// Rows past the last offset see no key.
template <typename T>
__device__ void zero_tail(T* out, float* lse, const int* row_offsets, int batch_size, int total_tokens,
                          int n_heads, int head_dim) {
  const long long first = min(max(row_offsets[batch_size], 0), total_tokens);
  const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
  const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long rows = static_cast<long long>(total_tokens) * n_heads;
  constexpr int kStep = kPer16Bytes<T>;
  for (long long i = first * n_heads * head_dim / kStep + thread; i < rows * head_dim / kStep; i += threads) {
    *reinterpret_cast<Vector<unsigned, 4>*>(out + i * kStep) = {};
  }
  if (lse == nullptr) return;
  for (long long i = first * n_heads + thread; i < rows; i += threads) lse[i] = -infinity();
}

// Lanes that copy a row side by side, 16 bytes each: a power of two that divides it.
template <int kVectors>
constexpr int kRowLanes = kVectors % 32 == 0   ? 32
                          : kVectors % 16 == 0 ? 16
                                               : 8;

// Grid: as many blocks as run at once. Nothing is __restrict__: what the kernels before write would be read
// ahead of the wait for them.
template <typename T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kDecodeWarps<T, kHeadDim>* kWarpSize, kMinDecodeBlocks<T, kHeadDim, kRows>)
    attention_decode_kernel(
        const T* q,              // [total_tokens, n_heads, head_dim], rows q_stride apart
        T* out,                  // [total_tokens, n_heads, head_dim]
        float* lse,              // [total_tokens, n_heads] or null
        const int* row_offsets,  // [batch_size + 1]
        const T* keys,    // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
        const T* values,  // the same, strides v_page, v_token, v_head
        const unsigned* lookup_table,   // [batch_size, max_pages]
        const unsigned* cache_lengths,  // [batch_size]
        const float* sinks,             // [n_heads] or null
        const T* narrow_sinks,          // [n_heads] or null; one of both at most
        unsigned* errors,
        float* states,  // [regions, slots] of StateSlot, a slot for each chunk of some rows
        int* splits,    // [blocks] SplitRows
        int total_tokens, int batch_size, int n_heads, long long q_stride, float scale, float soft_cap,
        int window_left, int window_right, int most_tokens, int slots, int state_pairs, int row_regions,
        int head_lanes, int num_pages, int max_pages, int page_size, long long k_page, long long k_token,
        long long k_head, long long v_page, long long v_token, long long v_head, int n_kv_heads,
        int head_dim) {
  constexpr int kWarps = kDecodeWarps<T, kHeadDim>, kThreads = kWarps * kWarpSize;
  constexpr int kTileKeys = 16 * kWarps;
  constexpr int kRowTiles = kRows / 8, kSteps = kHeadDim / 16;  // 8 rows, 16 elements
  // Of a chunk's state a warp adds up these.
  constexpr int kMySteps = kSteps * kRowTiles / kWarps;
  static_assert(kSteps % kMySteps == 0, "all of the same rows");
  using Rows = SharedTile<T, kHeadDim, true>;
  constexpr int kTileElements = 16 * Rows::kStride;
  static_assert(2 * kTileElements * sizeof(T) >= kRows * kHeadDim * sizeof(float),
                "a state is where a tile was");

  SharedMemory shared;
  T* const ring = shared.take<T>(2 * kWarps * 2 * kTileElements);  // [stage, warp, keys and values]
  const Rows q_tile{shared.take<T>(kRows * Rows::kStride)};
  Vector<float, 4>* const warp_sums = shared.take<Vector<float, 4>>(kWarps * kRows / 2);  // of pairs of rows
  long long* const found = shared.take<long long>(kWarps + 2);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, pair = lane % 4;  // of a fragment, see mma.cuh
  const auto stage_of = [&](int stage, int of_warp) {
    return ring + (stage * kWarps + of_warp) * 2 * kTileElements;
  };

  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  check_offsets(row_offsets, batch_size, total_tokens, errors);
  zero_tail(out, lse, row_offsets, batch_size, total_tokens, n_heads, head_dim);
  const PagedKV<const T> cache{keys,      values,    lookup_table, cache_lengths, num_pages,
                               max_pages, page_size, k_page,       k_token,       k_head,
                               v_page,    v_token,   v_head,       n_kv_heads,    head_dim};
  const int group = n_heads / n_kv_heads;
  const AttentionOptions<T> options{scale, soft_cap, window_left, window_right, sinks, narrow_sinks};
  const Line<T, kTileKeys, kRows> line{
      options,    row_offsets,  cache_lengths, errors,
      batch_size, total_tokens, group,         n_kv_heads,
      head_lanes, head_dim,     most_tokens,   min(static_cast<long long>(max_pages) * page_size, kMaxKeys)};

  // How long the line is, and in which sequence this block's share begins: a thread has some sequences in a
  // row.
  const int each = ceil_div(batch_size, kThreads), first_sequence = static_cast<int>(threadIdx.x) * each;
  const int end_sequence = min(first_sequence + each, batch_size);
  long long length = 0;
  for (int s = first_sequence; s < end_sequence; ++s) length += line.length(line.at(s));
  long long before = length;  // and of the threads before this one
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const long long others = __shfl_sync(kFullMask, before, max(lane - step, 0));
    if (lane >= step) before += others;
  }
  if (lane == kWarpSize - 1) found[warp] = before;
  __syncthreads();
  long long line_tiles = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += found[w];
    line_tiles += found[w];
  }
  before -= length;
  const Shares shares(line_tiles, gridDim.x / head_lanes);
  const int share = blockIdx.x / head_lanes;
  const long long begin = shares.begin(share), end = shares.begin(share + 1);
  if (before <= begin && begin < before + length) {
    int s = first_sequence;
    for (long long of_s = line.length(line.at(s)); before + of_s <= begin; of_s = line.length(line.at(++s))) {
      before += of_s;
    }
    found[kWarps] = s;
    found[kWarps + 1] = before;
  }
  SplitRows& split_rows = reinterpret_cast<SplitRows*>(splits)[blockIdx.x];
  if (threadIdx.x == 0) split_rows.rows = 0;
  __syncthreads();
  if (begin >= end) return;

  // The first chunk that begins in the share.
  Cursor<T, kTileKeys, kRows> at{line};
  at.seek(static_cast<int>(found[kWarps]));
  const long long in_sequence = begin - found[kWarps + 1];
  const int rows_before = static_cast<int>(Shares::divide(in_sequence, at.tiles));
  const int tile_before = static_cast<int>(in_sequence - static_cast<long long>(rows_before) * at.tiles);
  const int first_tile = min(ceil_div(tile_before, at.chunk) * at.chunk, at.tiles);
  at.row_tile = rows_before / (n_kv_heads / head_lanes);
  at.kv_head += rows_before % (n_kv_heads / head_lanes) * head_lanes;
  at.position = begin + first_tile - tile_before;
  if (at.position >= end) return;
  if (first_tile < at.tiles) {
    at.start(first_tile);
  } else {
    at.next_rows();
  }

  // Copies of the tile `ahead` into a stage. Of each of the first 16 lanes' keys the page was looked up a tile
  // before.
  Cursor<T, kTileKeys, kRows> ahead = at;
  constexpr int kStep = kPer16Bytes<T>, kLanes = kRowLanes<kHeadDim / kStep>,
                kRowsAtOnce = kWarpSize / kLanes;
  const int row = lane / kLanes, col = lane % kLanes * kStep;
  const bool pages_of_tiles = page_size % 16 == 0;
  const int tile_pages = kTileKeys / page_size, tile_slots = kTileKeys % page_size;
  int logical_page = 0, page_slot = 0;  // of this warp's first key
  unsigned page = 0;
  const auto first_key_ahead = [&] { return ahead.first_key() + warp * 16; };
  const auto is_seen = [&](int key) { return key >= ahead.of.first_key && key < ahead.of.end_key; };
  const auto find_page = [&] {
    logical_page = first_key_ahead() / page_size;
    page_slot = first_key_ahead() % page_size;
  };
  const auto look_up = [&] {
    if (ahead.left > 0 && is_seen(first_key_ahead() + lane % 16)) {
      const int of_lane = pages_of_tiles ? 0 : (page_slot + lane % 16) / page_size;
      page = cache.page_at(ahead.sequence, logical_page + of_lane);
    }
  };
  // Returns which of the 16 keys there are.
  const auto copy_ahead = [&](int stage) {
    unsigned there = 0xffffu;
    if (ahead.left > 0) {
      const Rows k_tile{stage_of(stage, warp)}, v_tile{k_tile.data + kTileElements};
      const bool all_seen = is_seen(first_key_ahead()) && is_seen(first_key_ahead() + 15);
      if (pages_of_tiles && head_dim == kHeadDim && all_seen && page < static_cast<unsigned>(num_pages)) {
        const T* key = keys + cache.key_row(page, page_slot + row, ahead.kv_head) + col;
        const T* value = values + cache.value_row(page, page_slot + row, ahead.kv_head) + col;
#pragma unroll
        for (int i = 0; i < 16; i += kRowsAtOnce) {
#pragma unroll
          for (int c = 0; c < kHeadDim; c += kLanes * kStep) {
            cp_async_16(k_tile.at(row + i, col + c), key + c, 16);
            cp_async_16(v_tile.at(row + i, col + c), value + c, 16);
          }
          key += kRowsAtOnce * k_token;
          value += kRowsAtOnce * v_token;
        }
      } else {
        const int slot = (page_slot + lane % 16) % page_size;
        const bool is_there = is_seen(first_key_ahead() + lane % 16) && cache.is_page(page, errors);
        const T* const key_of_lane = is_there ? keys + cache.key_row(page, slot, ahead.kv_head) : keys;
        const T* const value_of_lane =
            is_there ? values + cache.value_row(page, slot, ahead.kv_head) : values;
        there = __ballot_sync(kFullMask, is_there) & 0xffffu;
#pragma unroll 2
        for (int i = 0; i < 16; i += kRowsAtOnce) {
          const auto of_row = [&](const T* of_lane) {
            return reinterpret_cast<const T*>(
                __shfl_sync(kFullMask, reinterpret_cast<long long>(of_lane), row + i));
          };
          const T* const key = of_row(key_of_lane);
          const T* const value = of_row(value_of_lane);
#pragma unroll
          for (int c = 0; c < kHeadDim; c += kLanes * kStep) {
            const bool live = (there >> (row + i) & 1) != 0 && col + c < head_dim;
            cp_async_16(k_tile.at(row + i, col + c), live ? key + col + c : keys, live ? 16 : 0);
            cp_async_16(v_tile.at(row + i, col + c), live ? value + col + c : values, live ? 16 : 0);
          }
        }
      }
      ahead.next(end);
      logical_page += tile_pages;
      page_slot += tile_slots;
      if (page_slot >= page_size) {
        page_slot -= page_size;
        ++logical_page;
      }
      if (ahead.tile == 0) find_page();
    }
    cp_async_commit();
    look_up();
    return there;
  };

  // The rows of a key head: their queries, the keys that this lane's see, and those that all see.
  int first_keys[kRowTiles][2], end_keys[kRowTiles][2], all_first = 0, all_end = 0;
  const auto begin_rows = [&] {
    const int first_row = at.first_row(), num_rows = at.num_rows();
    constexpr int kVectors = kHeadDim / kStep;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
      const int m = i / kVectors, col = i % kVectors * kStep;
      Vector<T, kStep> values;
#pragma unroll
      for (int j = 0; j < kStep; ++j) values.at[j] = from_float<T>(0.0f);
      if (m < num_rows && col < head_dim) {
        const int token = at.of.begin + (first_row + m) / group;
        const int head = at.kv_head * group + (first_row + m) % group;
        values = *reinterpret_cast<const Vector<T, kStep>*>(q + token * q_stride + head * head_dim + col);
      }
      *reinterpret_cast<Vector<T, kStep>*>(q_tile.at(m, col)) = values;
    }
    const auto sees = [&](int m, int& first, int& end) {
      const long long position = static_cast<long long>(at.of.cached) + (first_row + m) / group;
      first = options.first_key(position, at.of.end_key);
      end = options.end_key(position, at.of.end_key);
    };
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) sees(8 * t + 2 * pair + j, first_keys[t][j], end_keys[t][j]);
    }
    int unused;
    sees(kRows - 1, all_first, unused);
    sees(0, unused, all_end);
    __syncthreads();
  };

  find_page();
  look_up();
  unsigned next_there = copy_ahead(0);

  // Per tile; and per chunk, of which this warp has some elements.
  bool has_first_chunk = at.tile == 0;
  int region = 0;
  PairState<kMySteps> state;
  const int my_tile = warp * kMySteps / kSteps, my_step = warp * kMySteps % kSteps;
  bool is_new = true;  // the rows
  SoftmaxRow softmax[kRowTiles][2];
  float acc[kRowTiles][kSteps][4] = {};
#pragma unroll 1
  for (int stage = 0; at.left > 0; stage = 1 - stage) {
    const unsigned there = next_there;
    next_there = copy_ahead(1 - stage);
    if (is_new) {
      begin_rows();
      // Where states of these rows go: by the block that has their first chunk, or, if they are few, by
      // themselves.
      const int owner = at.tile == 0 ? share : shares.of(at.position - at.tile);
      region = row_regions == 0 ? owner * head_lanes + static_cast<int>(blockIdx.x) % head_lanes
                                : (at.sequence * row_regions + at.row_tile) * n_kv_heads + at.kv_head;
      is_new = false;
    }
    cp_async_wait<1>();
    __syncwarp();
    const Rows k_tile{stage_of(stage, warp)}, v_tile{k_tile.data + kTileElements};

    // Scores of 16 keys.
    float scores[kRowTiles][4] = {};
#pragma unroll(sizeof(T) == 4 ? 1 : kHeadDim / 32)
    for (int k = 0; k < kHeadDim; k += 32) {
      FragmentA<T> k_fragments[2];
      load_a(k_fragments[0], k_tile, 0, k);
      load_a(k_fragments[1], k_tile, 0, k + 16);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        FragmentB<T> q_fragments[2];
        load_b_steps(q_fragments, q_tile, 8 * t, k);
        mma(scores[t], k_fragments[0], q_fragments[0]);
        mma(scores[t], k_fragments[1], q_fragments[1]);
      }
    }
    const int first_key = at.first_key() + warp * 16;
    const bool all_visible = there == 0xffffu && all_first <= first_key && first_key + 16 <= all_end;
    FragmentB<T> p_fragments[kRowTiles][kTerms<T>];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      if (options.is_capped()) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][i] = options.squash(scores[t][i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][i] *= options.logit_factor();
      if (!all_visible) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = g + i / 2 * 8, key = first_key + n;
          const bool visible =
              (there >> n & 1) != 0 && key >= first_keys[t][i % 2] && key < end_keys[t][i % 2];
          scores[t][i] = visible ? scores[t][i] : -infinity();
        }
      }
      float factors[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        factors[j] = softmax[t][j].raise(column_max(fmaxf(scores[t][j], scores[t][2 + j])));
      }
      // Not of a chunk's first tile, where there is nothing yet.
      if (!at.begins_chunk && __any_sync(kFullMask, factors[0] != 1.0f || factors[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[t][i][j] *= factors[j % 2];
        }
      }
      float probabilities[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[i] = softmax[t][i % 2].probability(scores[t][i]);
      split_d<T>(p_fragments[t], probabilities);
    }

    // Values times probabilities.
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      FragmentA<T> v_fragment;
      load_a_cols(v_fragment, v_tile, 0, 16 * i);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) mma_split<T>(acc[t][i], v_fragment, p_fragments[t]);
    }

    __syncwarp();

    if (at.ends_chunk()) {
      // This warp's state to where the tile was.
      auto* const mine = reinterpret_cast<Vector<float, 4>*>(stage_of(stage, warp));
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        if (8 * t >= at.num_rows()) break;
        const float sums[2] = {column_sum(softmax[t][0].sum), column_sum(softmax[t][1].sum)};
        if (g == 0) {
          warp_sums[warp * kRows / 2 + 4 * t + pair] = {softmax[t][0].largest, sums[0], softmax[t][1].largest,
                                                        sums[1]};
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          mine[(t * kSteps + i) * kWarpSize + lane] = {acc[t][i][0], acc[t][i][1], acc[t][i][2],
                                                       acc[t][i][3]};
        }
      }
      __syncthreads();

      // The chunk's state is that of all warps. It joins those before it, or waits for them in the workspace.
      const bool ends_rows = at.ends_rows(), ends_share = at.position + 1 >= end;
      const bool is_split = !has_first_chunk || (!ends_rows && ends_share);
      const int row = 8 * my_tile + 2 * pair;
      if (8 * my_tile < at.num_rows()) {
        PairState<kMySteps> chunk;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          Vector<float, 4> values[kMySteps];
#pragma unroll
          for (int i = 0; i < kMySteps; ++i) {
            values[i] = reinterpret_cast<const Vector<float, 4>*>(
                stage_of(stage, w))[(warp * kMySteps + i) * kWarpSize + lane];
          }
          chunk.merge(warp_sums[(w * kRows + row) / 2], values);
        }
        if (has_first_chunk) {
          state.merge(chunk.sums(), chunk.values);
        } else {
          state = chunk;
        }
      }
      const bool has_sums = my_step == 0 && g == 0;
      if (has_first_chunk && ends_rows) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (row + j >= at.num_rows()) break;
          const int in_rows = at.first_row() + row + j, head = at.kv_head * group + in_rows % group;
          const long long place = static_cast<long long>(at.of.begin + in_rows / group) * n_heads + head;
          state.store(
              j, options.sink(head), out + place * head_dim,
              has_sums && lse != nullptr ? lse + place : nullptr,
              [&](int i) { return 16 * (my_step + i) + g; }, head_dim);
        }
      } else if (is_split && row < at.num_rows()) {
        const StateSlot<kHeadDim> slot =
            StateSlot<kHeadDim>{reinterpret_cast<Vector<float, 4>*>(states),
                                state_pairs}[static_cast<long long>(region) * slots + at.tile / at.chunk];
#pragma unroll
        for (int i = 0; i < kMySteps; ++i) slot.values(my_step + i, g, row / 2) = state.values[i];
        if (has_sums) slot.sums(row / 2) = state.sums();
      }
      if (is_split && has_first_chunk && threadIdx.x == 0) {
        split_rows = {at.of.begin,
                      at.first_row(),
                      at.num_rows(),
                      at.kv_head,
                      at.tile / at.chunk,
                      ceil_div(at.tiles, at.chunk),
                      region,
                      0};
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        softmax[t][0] = softmax[t][1] = SoftmaxRow{};
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[t][i][j] = 0.0f;
        }
      }
      if (ends_rows) {
        is_new = has_first_chunk = true;
        state = PairState<kMySteps>{};
      }
    }
    at.next(end);
  }
  cp_async_wait<0>();
}

}  // namespace lorakit
