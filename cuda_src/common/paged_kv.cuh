// The paged cache of one layer: (sequence, position, head) -> row of head_dim elements.
#pragma once

#include <common/errors.cuh>

namespace lorakit {

template <typename T>
struct PagedKV {
  T* blocks;                      // [num_pages, 2, num_layers, page_size, n_kv_heads, head_dim]
  const unsigned* lookup_table;   // [batch_size, max_pages] -> page
  const unsigned* cache_lengths;  // [batch_size], tokens cached before this step
  int num_pages, max_pages, num_layers, layer_idx, page_size, n_kv_heads, head_dim;

  // Elements from a key row to its value row.
  __device__ long long value_offset() const {
    return static_cast<long long>(num_layers) * page_size * n_kv_heads * head_dim;
  }

  // The element in `blocks` where a key row starts; -1, and an error reported, without a valid page.
  __device__ long long key_offset(int sequence, long long position, int head, unsigned* errors) const {
    // A length and the difference of two offsets, each below 2^32, are below 2^33: half of it is divided in 32
    // bits, without the call that a division in 64 bits is.
    long long logical_page = 2ll * (static_cast<unsigned>(position >> 1) / static_cast<unsigned>(page_size));
    long long page_slot = position - logical_page * page_size;  // in [0, 2 * page_size)
    if (page_slot >= page_size) {
      ++logical_page;
      page_slot -= page_size;
    }
    return row(page_at(sequence, logical_page), static_cast<int>(page_slot), head, errors);
  }

  // The two steps of it, for who does something else until the page has arrived.
  __device__ unsigned page_at(int sequence, long long logical_page) const {
    if (logical_page >= max_pages) return static_cast<unsigned>(num_pages);
    return lookup_table[static_cast<long long>(sequence) * max_pages + logical_page];
  }
  __device__ long long row(unsigned page, int page_slot, int head, unsigned* errors) const {
    if (page >= static_cast<unsigned>(num_pages)) {
      report(errors, kBadPage);
      return -1;
    }
    const long long slot = (static_cast<long long>(page) * 2 * num_layers + layer_idx) * page_size + page_slot;
    return (slot * n_kv_heads + head) * head_dim;
  }
};

}  // namespace lorakit
