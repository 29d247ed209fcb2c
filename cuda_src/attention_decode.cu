// The attention of attention.cu for sequences with few queries in this step: a token or two, as in decode
// (has_few_rows). It is bound by reading keys and values, each once.
//
// All that such sequences read is one line of tiles of kTileKeys keys, by sequence, 16 rows, key head and
// position, and the blocks, as many as run at once, share it evenly, whatever the lengths: block i has the
// chunks that start in tiles total * i / blocks .. total * (i + 1) / blocks. A chunk is some tiles of one
// sequence, as its own length says (chunk_tiles). Its state is, for each row,
//
//   largest = max_j s[j]      sum = sum_j 2^(s[j] - largest)      acc = sum_j 2^(s[j] - largest) value[j]
//
// and the states of a row's chunks are merged from first to last, by the block that has them; from the chunk
// on that another block has, by attention_merge_kernel. So the bits of a row depend on its own sequence only.
//
// A warp has 16 keys of each tile: it copies them, kStages tiles at a time, and no other warp waits for them.
// At the end of a chunk the warps' states are added up, where its last keys and values were.
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

// Grid: as many blocks as run at once. Nothing is __restrict__: what the kernels before write would be read
// ahead of the wait for them.
template <typename T, int kHeadDim, int kStages>
__global__ void __launch_bounds__(kDecodeWarps<T, kHeadDim>* kWarpSize, 1) attention_decode_kernel(
    const T* q,              // [total_tokens, n_heads, head_dim], rows q_stride apart
    T* out,                  // [total_tokens, n_heads, head_dim]
    float* lse,              // [total_tokens, n_heads] or null
    const int* row_offsets,  // [batch_size + 1]
    const T* keys,           // [num_pages, page_size, n_kv_heads, head_dim], strides k_page, k_token, k_head
    const T* values,         // the same, strides v_page, v_token, v_head
    const unsigned* lookup_table,   // [batch_size, max_pages]
    const unsigned* cache_lengths,  // [batch_size]
    const float* sinks,             // [n_heads] or null
    const T* narrow_sinks,          // [n_heads] or null; one of both at most
    unsigned* errors,
    float* states,  // [regions, slots, state_rows * kStateFloats], a slot for each chunk of some rows
    int* splits,    // [blocks] SplitRows
    int total_tokens, int batch_size, int n_heads, long long q_stride, float scale, float soft_cap,
    int window_left, int window_right, int most_tokens, int slots, int state_rows, int row_regions,
    int head_lanes, int num_pages, int max_pages, int page_size, long long k_page, long long k_token,
    long long k_head, long long v_page, long long v_token, long long v_head, int n_kv_heads, int head_dim) {
  constexpr int kWarps = kDecodeWarps<T, kHeadDim>, kThreads = kWarps * kWarpSize, kTileKeys = 16 * kWarps;
  constexpr int kValues = kHeadDim / kWarpSize, kWarpRows = kRows / kWarps;
  constexpr int kTileElements = 16 * SharedTile<T, kHeadDim>::kStride;
  using Rows = SharedTile<T, kHeadDim>;
  static_assert(2 * kTileElements * sizeof(T) >= kRows * kHeadDim * sizeof(float),
                "a state is where a tile was");

  SharedMemory shared;
  T* const ring = shared.take<T>(kStages * kWarps * 2 * kTileElements);  // [stage, warp, keys and values]
  const Rows q_tile{shared.take<T>(kTileElements)};
  Vector<float, 2>* const stats = shared.take<Vector<float, 2>>(kWarps * kRows);  // largest and sum
  long long* const found = shared.take<long long>(kWarps + 2);
  // The states of rows so far: of long rows they are too many for registers.
  constexpr bool kInShared = kHeadDim * sizeof(T) >= 512;
  float* const shared_values = shared.take<float>(kInShared ? kRows * kHeadDim : 0);
  Vector<float, 2>* const shared_stats = shared.take<Vector<float, 2>>(kInShared ? kRows : 0);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
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
  const Line<T, kTileKeys> line{
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
  const auto line_length = [&] {  // read again where it is needed, which leaves a register
    long long tiles = 0;
    for (int w = 0; w < kWarps; ++w) tiles += found[w];
    return tiles;
  };
  const long long line_tiles = line_length();
  for (int w = 0; w < warp; ++w) before += found[w];
  before -= length;
  const int shares = gridDim.x / head_lanes, share = blockIdx.x / head_lanes;
  const long long begin = line_tiles * share / shares, end = line_tiles * (share + 1) / shares;
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
  Cursor<T, kTileKeys> at{line};
  at.seek(static_cast<int>(found[kWarps]));
  const long long in_sequence = begin - found[kWarps + 1];
  const int rows_before = static_cast<int>(in_sequence / at.tiles);
  const int tile_before = static_cast<int>(in_sequence % at.tiles);
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

  // Copies of the tile `ahead` into a stage: each of the first 16 lanes knows the page of a key, looked up a
  // tile before; eight lanes copy 128 bytes of a row.
  Cursor<T, kTileKeys> ahead = at;
  unsigned page = 0;
  unsigned long long present =
      0;  // the keys of the next tiles that there are, 16 bits a tile from the lowest
  const int key_of_lane = warp * 16 + lane % 16;
  int logical_page = 0, page_slot = 0;
  const auto look_up = [&] {
    if (ahead.left == 0) return;
    if (ahead.first_key() + key_of_lane < ahead.of.end_key)
      page = cache.page_at(ahead.sequence, logical_page);
  };
  const auto find_page = [&] {
    logical_page = (ahead.first_key() + key_of_lane) / page_size;
    page_slot = (ahead.first_key() + key_of_lane) % page_size;
  };
  const int pages_of_tile = kTileKeys / page_size, slots_left = kTileKeys % page_size;
  const auto copy_ahead = [&](int stage) {
    if (ahead.left > 0) {
      const bool is_there = ahead.first_key() + key_of_lane < ahead.of.end_key && cache.is_page(page, errors);
      const unsigned there = __ballot_sync(kFullMask, is_there) & 0xffffu;
      present |= static_cast<unsigned long long>(there) << (16 * (kStages - 1));
      const T* const key_row = keys + (is_there ? cache.key_row(page, page_slot, ahead.kv_head) : 0);
      const T* const value_row = values + (is_there ? cache.value_row(page, page_slot, ahead.kv_head) : 0);
      constexpr int kStep = kPer16Bytes<T>, kLanes = 8;
      const int row = lane / kLanes, col = lane % kLanes * kStep;
      const Rows tile{stage_of(stage, warp) + row * Rows::kStride + col};
      const bool whole = there == 0xffffu && head_dim == kHeadDim;
#pragma unroll
      for (int i = 0; i < 16; i += kWarpSize / kLanes) {
        const auto of_lane = [&](const T* of) {
          return reinterpret_cast<const T*>(__shfl_sync(kFullMask, reinterpret_cast<long long>(of), row + i));
        };
        const T* const k_row = of_lane(key_row) + col;
        const T* const v_row = of_lane(value_row) + col;
        if (whole) {
#pragma unroll
          for (int c = 0; c < kHeadDim; c += kLanes * kStep) {
            cp_async_16(tile.at(i, c), k_row + c, 16);
            cp_async_16(tile.at(i, c) + kTileElements, v_row + c, 16);
          }
        } else {
          const bool live = (there >> (row + i) & 1) != 0;
          for (int c = 0; c < kHeadDim; c += kLanes * kStep) {
            const int bytes = live && col + c < head_dim ? 16 : 0;
            cp_async_16(tile.at(i, c), bytes == 0 ? keys : k_row + c, bytes);
            cp_async_16(tile.at(i, c) + kTileElements, bytes == 0 ? values : v_row + c, bytes);
          }
        }
      }
      ahead.next(end);
      page_slot += slots_left;
      logical_page += pages_of_tile;
      if (page_slot >= page_size) {
        page_slot -= page_size;
        ++logical_page;
      }
      if (ahead.tile == 0) find_page();
    }
    cp_async_commit();
    look_up();
  };

  // The rows of a key head: their queries, and the keys that this lane's two see.
  int first_keys[2], end_keys[2];
  const auto begin_rows = [&] {
    const int first_row = at.first_row(), num_rows = at.num_rows();
    constexpr int kStep = kPer16Bytes<T>, kVectors = kHeadDim / kStep;
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
      const int m = i / kVectors, col = i % kVectors * kStep;
      Vector<T, kStep> values;
#pragma unroll
      for (int j = 0; j < kStep; ++j) values.at[j] = from_float<T>(0.0f);
      if (m < num_rows && col < head_dim) {
        const int token = at.of.begin + (first_row + m) / group,
                  head = at.kv_head * group + (first_row + m) % group;
        values = *reinterpret_cast<const Vector<T, kStep>*>(q + token * q_stride + head * head_dim + col);
      }
      *reinterpret_cast<Vector<T, kStep>*>(q_tile.at(m, col)) = values;
    }
    const auto sees = [&](int m, int& first, int& end) {
      const long long position = static_cast<long long>(at.of.cached) + (first_row + m) / group;
      first = options.first_key(position, at.of.end_key);
      end = options.end_key(position, at.of.end_key);
    };
    sees(lane / 4, first_keys[0], end_keys[0]);
    sees(lane / 4 + 8, first_keys[1], end_keys[1]);
    __syncthreads();
  };

  find_page();
  look_up();

  // Per tile; and per chunk, in which this warp adds up every kWarps-th row.
  bool has_first_chunk = at.tile == 0;
  int region = 0;
  RowState<kValues> states_of_rows[kInShared ? 1 : kWarpRows];
  bool is_new = true;  // the rows
  SoftmaxRow softmax[2];
  float acc[kHeadDim / 8][4] = {};
#pragma unroll 1
  for (int step = 1 - kStages, next_stage = 0; at.left > 0; ++step) {
    copy_ahead(next_stage);
    const int stage = next_stage + 1 == kStages ? 0 : next_stage + 1;  // of kStages - 1 tiles ago
    next_stage = stage;
    if (step < 0) {
      present >>= 16;
      continue;
    }
    if (is_new) {
      begin_rows();
      // Where states of these rows go: by the block that has their first chunk, or, if they are few, by
      // themselves.
      const long long after_first = at.position - at.tile + 1;
      const int owner = at.tile == 0 ? share : static_cast<int>((after_first * shares - 1) / line_length());
      region = row_regions == 0 ? owner * head_lanes + static_cast<int>(blockIdx.x) % head_lanes
                                : (at.sequence * row_regions + at.row_tile) * n_kv_heads + at.kv_head;
      is_new = false;
    }
    cp_async_wait<kStages - 1>();
    __syncwarp();
    const Rows k_tile{stage_of(stage, warp)}, v_tile{k_tile.data + kTileElements};

    // Scores of 16 keys.
    float scores[2][4] = {};
#pragma unroll(sizeof(T) == 4 ? 1 : kHeadDim / 16)
    for (int k = 0; k < kHeadDim; k += 16) {
      FragmentA<T> q_fragment;
      load_a(q_fragment, q_tile, 0, k);
      FragmentB<T> k_fragments[2];
      load_b_rows(k_fragments, k_tile, 0, k);
      mma(scores[0], q_fragment, k_fragments[0]);
      mma(scores[1], q_fragment, k_fragments[1]);
    }
    if (options.is_capped()) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] = options.squash(scores[i][j]);
      }
    }
    const int first_key = at.first_key() + warp * 16;
    float largest[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool all_visible =
          (present & 0xffffu) == 0xffffu && first_keys[half] <= first_key && first_key + 16 <= end_keys[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * half + i % 2];
        const int n = i / 2 * 8 + lane % 4 * 2 + i % 2, key = first_key + n;
        const bool visible =
            all_visible || ((present >> n & 1) != 0 && key >= first_keys[half] && key < end_keys[half]);
        score = visible ? score * options.logit_factor() : -infinity();
        largest[half] = fmaxf(largest[half], score);
      }
    }
    const float factors[2] = {softmax[0].raise(quad_max(largest[0])), softmax[1].raise(quad_max(largest[1]))};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Not of a chunk's first tile, where there is nothing yet.
      if (at.begins_chunk || !__any_sync(kFullMask, factors[half] != 1.0f)) continue;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        acc[i][2 * half] *= factors[half];
        acc[i][2 * half + 1] *= factors[half];
      }
    }

    // Probabilities times values: scores are laid out as that operand is.
    float probabilities[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) probabilities[i] = softmax[i / 2 % 2].probability(scores[i / 4][i % 4]);
    FragmentA<T> p_fragments[kTerms<T>];
    split<T>(p_fragments, probabilities);
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      FragmentB<T> v_fragments[2];
      load_b_cols(v_fragments, v_tile, 0, d);
      mma_split<T>(acc[d / 8], p_fragments, v_fragments[0]);
      mma_split<T>(acc[d / 8 + 1], p_fragments, v_fragments[1]);
    }
    __syncwarp();

    if (at.ends_chunk()) {
      // This warp's state to where the tile was, eight columns of neighbouring rows in different banks.
      float* const mine = reinterpret_cast<float*>(stage_of(stage, warp));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (8 * half >= at.num_rows()) break;
        const int row = lane / 4 + 8 * half;
        const float sum = quad_sum(softmax[half].sum);
        if (lane % 4 == 0) stats[warp * kRows + row] = {softmax[half].largest, sum};
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          *reinterpret_cast<Vector<float, 2>*>(mine + row * kHeadDim + (i ^ row % 8) * 8 + lane % 4 * 2) = {
              acc[i][2 * half], acc[i][2 * half + 1]};
        }
      }
      __syncthreads();

      // The chunk's state is that of all warps. It joins those before it, or waits for them in the workspace.
      const bool ends_rows = at.ends_rows(), ends_share = at.position + 1 >= end;
      const bool is_split = !has_first_chunk || (!ends_rows && ends_share);
      float* const slot =
          states + ((static_cast<long long>(region) * slots + at.tile / at.chunk) * state_rows) *
                       kStateFloats<kHeadDim>;
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const int row = r * kWarps + warp;
        if (row >= at.num_rows()) break;
        RowState<kValues> chunk;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const Vector<float, 2> of_warp = stats[w * kRows + row];
          alignas(16) float values[kValues];
          const int column = (lane * kValues / 8 ^ row % 8) * 8 + lane * kValues % 8;
          load_values(values, reinterpret_cast<const float*>(stage_of(stage, w)) + row * kHeadDim + column);
          chunk.merge(of_warp.at[0], of_warp.at[1], values);
        }
        RowState<kValues>& state = states_of_rows[kInShared ? 0 : r];
        float* const values_so_far = shared_values + row * kHeadDim + lane * kValues;
        if (kInShared && has_first_chunk) {
          state = RowState<kValues>{};
          if (at.tile >= at.chunk) {
            load_values(state.values, values_so_far);
            state.largest = shared_stats[row].at[0];
            state.sum = shared_stats[row].at[1];
          }
        }
        if (has_first_chunk) {
          state.merge(chunk.largest, chunk.sum, chunk.values);
        } else {
          state = chunk;
        }
        if (kInShared && has_first_chunk) {
          store_values(values_so_far, state.values);
          __syncwarp();
          if (lane == 0) shared_stats[row] = {state.largest, state.sum};
          __syncwarp();
        }
        if (has_first_chunk && ends_rows) {
          const int pair = at.first_row() + row, head = at.kv_head * group + pair % group;
          const long long token = at.of.begin + pair / group;
          state.take_sink(options.sink(head));
          store_row<T>(out, lse, state, token * n_heads + head, head_dim);
        } else if (is_split) {
          store_values(slot + row * kHeadDim + lane * kValues, state.values);
          if (lane == 0) {
            *reinterpret_cast<Vector<float, 2>*>(slot + state_rows * kHeadDim + 2 * row) = {state.largest,
                                                                                            state.sum};
          }
        }
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
      softmax[0] = softmax[1] = SoftmaxRow{};
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
      }
      if (ends_rows) {
        is_new = has_first_chunk = true;
#pragma unroll
        for (int r = 0; r < (kInShared ? 1 : kWarpRows); ++r) states_of_rows[r] = RowState<kValues>{};
      }
    }
    at.next(end);
    present >>= 16;
  }
  cp_async_wait<0>();
}

}  // namespace lorakit
