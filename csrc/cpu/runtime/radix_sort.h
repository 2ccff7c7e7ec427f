// Stable radix sort of packed lookups, the same result at any number of threads.
#pragma once

#include <memory>
#include <utility>

#include "cpu/runtime/parallel.h"
#include "cpu/tuning.h"

namespace rk {

// An array without initial values.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Sorts n keys by the bits [shift, shift + bits) of key - base; `other` is as long. Keys that agree in these
// must lie in ascending order. A pass moves the keys of two blocks at once: with Zipf ids each key waits for
// the counter that the one before incremented.
inline void radix_sort(uint64_t* keys, uint64_t* other, int64_t n, uint64_t base, int shift, int bits) {
  const int passes = (bits + kMaxDigit - 1) / kMaxDigit;
  if (n <= kFewKeys) return std::sort(keys, keys + n);  // faster than zeroing counters
  if (passes == 0) return;
  const int digit = (bits + passes - 1) / passes;
  const int64_t buckets = int64_t(1) << digit, pairs = std::max<int64_t>(1, n / kSortBlockPair);
  auto offsets = uninitialized<int64_t>(2 * pairs * buckets);
  const auto each = [=](int64_t pair, const uint64_t* from, int64_t* offset, int low, const auto& body) {
    const int64_t begin = n * pair / pairs, length = n * (pair + 1) / pairs - begin, half = length / 2;
    const auto counter = [=](int64_t* offset, uint64_t key) -> int64_t& {
      return offset[((key - base) >> low) & (buckets - 1)];
    };
    from += begin;
    for (int64_t i = 0; i < half; ++i) {
      body(counter(offset, from[i]), from[i]);
      body(counter(offset + buckets, from[half + i]), from[half + i]);
    }
    if (length % 2) body(counter(offset + buckets, from[length - 1]), from[length - 1]);
  };
  uint64_t *from = keys, *to = other;
  for (int pass = 0; pass < passes; ++pass, std::swap(from, to)) {
    const int low = shift + pass * digit;
    run_tasks(pairs, 4 * n, [&](int64_t pair) {
      int64_t* offset = offsets.get() + 2 * pair * buckets;
      std::fill_n(offset, 2 * buckets, 0);
      each(pair, from, offset, low, [](int64_t& count, uint64_t) { ++count; });
    });
    int64_t total = 0;
    for (int64_t d = 0; d < buckets; ++d)
      for (int64_t* offset = offsets.get() + d; offset < offsets.get() + 2 * pairs * buckets;
           offset += buckets)
        total += std::exchange(*offset, total);
    run_tasks(pairs, 4 * n, [&](int64_t pair) {
      each(pair, from, offsets.get() + 2 * pair * buckets, low,
           [to = to](int64_t& offset, uint64_t key) { to[offset++] = key; });
    });
  }
  if (from != keys) std::copy_n(from, n, keys);
}

// The bits that hold 0 .. n.
inline int bits_of(uint64_t n) {
  int bits = 0;
  while (bits < 64 && n >> bits) ++bits;
  return bits;
}

}  // namespace rk
