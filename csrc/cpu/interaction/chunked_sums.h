// Gradients of parameters: sums over samples, a part for each chunk of them, added up in order. Chunks depend
// on the input alone, so the bits do not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/runtime/parallel.h"
#include "cpu/simd/kernel.h"
#include "cpu/simd/operand.h"
#include "cpu/tuning.h"

namespace rk {

template <class A>
class ChunkedSums {
 public:
  // `work`: elements that a sample reads and writes; `size`: values of a sum; `least`: samples of a chunk.
  ChunkedSums(int64_t samples, int64_t work, int64_t size, int64_t least = 1)
      : samples_(samples), work_(work), size_(padded<A>(size)) {
    const int64_t most = std::clamp(kSumsValues / size_, kFewestChunks, kMostChunks) &
                         ~1;  // an odd last one leaves threads idle
    length_ = std::max((samples + most - 1) / most, std::max(kFmChunk / (work + 1) + 1, least));
    chunks_ = (samples + length_ - 1) / length_;
    parts_.reset(static_cast<A*>(std::aligned_alloc(64, std::max<int64_t>(chunks_, 1) * size_ * sizeof(A))));
    if (!parts_) throw std::bad_alloc();
  }

  // Calls body(samples, sum to add to) for every chunk; returns the total.
  template <class Body>
  A* run(const Body& body) {
    A* parts = parts_.get();
    if (chunks_ == 0) std::fill_n(parts, size_, A(0));
    run_tasks(chunks_, samples_ * work_, [&](int64_t chunk) {
      const int64_t first = chunk * length_;
      A* part = std::fill_n(parts + chunk * size_, size_, A(0)) - size_;
      body(Range{first, std::min(samples_, first + length_)}, part);
    });
    constexpr int64_t length = kChunkValues;
    run_tasks((size_ + length - 1) / length, chunks_ * size_, [&](int64_t range) {
      const int64_t begin = range * length, end = std::min(begin + length, size_);
      for (int64_t chunk = 1; chunk < chunks_; ++chunk)
        for (int64_t i = begin; i < end; ++i) parts[i] += parts[chunk * size_ + i];
    });
    return parts;
  }

 private:
  int64_t samples_, work_, size_, length_, chunks_;
  std::unique_ptr<A, decltype(&std::free)> parts_{nullptr, &std::free};
};

}  // namespace rk
