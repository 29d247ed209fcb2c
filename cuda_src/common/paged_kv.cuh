// The paged cache of one layer: (sequence, position, head) -> rows of head_dim elements, a key and a value.
#pragma once

#include <common/errors.cuh>

namespace lorakit {

// Where the cache has a token. `page` may be none: PagedKV::is_page.
struct CacheSlot {
  unsigned page;
  int slot;  // in the page
};

// Keys and values are [num_pages, page_size, n_kv_heads, head_dim] each, with strides of their own: any layout
// in which a row lies together.
template <typename T>
struct PagedKV {
  T* keys;  // the first row's
  T* values;
  const unsigned* lookup_table;   // [batch_size, max_pages] -> page
  const unsigned* cache_lengths;  // [batch_size], tokens cached before this step
  int num_pages, max_pages, page_size;
  long long k_page, k_token, k_head, v_page, v_token, v_head;  // elements from one to the next
  int n_kv_heads, head_dim;

  __device__ CacheSlot slot_of(int sequence, long long position) const {
    // A length and the difference of two offsets, each below 2^32, are below 2^33: half of it is divided in 32
    // bits, without the call that a division in 64 bits is.
    long long logical_page = 2ll * (static_cast<unsigned>(position >> 1) / static_cast<unsigned>(page_size));
    long long slot = position - logical_page * page_size;  // in [0, 2 * page_size)
    if (slot >= page_size) {
      ++logical_page;
      slot -= page_size;
    }
    return {page_at(sequence, logical_page), static_cast<int>(slot)};
  }

  __device__ unsigned page_at(int sequence, long long logical_page) const {
    if (logical_page >= max_pages) return static_cast<unsigned>(num_pages);
    return lookup_table[static_cast<long long>(sequence) * max_pages + logical_page];
  }

  // False, and an error reported, if the cache has no such page.
  __device__ bool is_page(unsigned page, unsigned* errors) const {
    if (page < static_cast<unsigned>(num_pages)) return true;
    report(errors, kBadPage);
    return false;
  }

  // Elements from the first row to another, of a page that there is.
  __device__ long long key_row(unsigned page, int slot, int head) const {
    return page * k_page + slot * k_token + head * k_head;
  }
  __device__ long long value_row(unsigned page, int slot, int head) const {
    return page * v_page + slot * v_token + head * v_head;
  }
};

}  // namespace lorakit
