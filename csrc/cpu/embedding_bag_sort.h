// Stable radix sort of packed lookups, the same result at any number of threads.
#pragma once

#include <memory>
#include <vector>

#include "parallel.h"

namespace rk {

// An array that is left unwritten.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// Sorts n keys by the bits [shift, shift + bits) of key - base, from the least digit to the most; `other` is
// as long. Every pass counts the digits of each chunk, gives every (digit, chunk) its place, digits first,
// and moves the keys there.
inline void radix_sort(uint64_t* keys, uint64_t* other, int64_t n, uint64_t base, int shift, int bits) {
  constexpr int kMaxDigit = 12;
  constexpr int64_t kChunk = 16384;
  const int passes = (bits + kMaxDigit - 1) / kMaxDigit;
  if (passes == 0 || n == 0) return;
  const int digit = (bits + passes - 1) / passes;
  const int64_t buckets = int64_t(1) << digit, chunks = (n + kChunk - 1) / kChunk;
  std::vector<int64_t> places(buckets * chunks);
  uint64_t *from = keys, *to = other;
  for (int pass = 0; pass < passes; ++pass) {
    const int low = shift + pass * digit;
    const auto bucket = [=](uint64_t key) { return ((key - base) >> low) & (buckets - 1); };
    run_tasks(chunks, 4 * n, [&](int64_t chunk) {
      int64_t* place = &places[chunk * buckets];
      std::fill_n(place, buckets, 0);
      for (int64_t i = chunk * kChunk, end = std::min(n, i + kChunk); i < end; ++i) ++place[bucket(from[i])];
    });
    int64_t total = 0;
    for (int64_t d = 0; d < buckets; ++d)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t count = places[chunk * buckets + d];
        places[chunk * buckets + d] = total;
        total += count;
      }
    run_tasks(chunks, 4 * n, [&](int64_t chunk) {
      int64_t* place = &places[chunk * buckets];
      for (int64_t i = chunk * kChunk, end = std::min(n, i + kChunk); i < end; ++i)
        to[place[bucket(from[i])]++] = from[i];
    });
    std::swap(from, to);
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
