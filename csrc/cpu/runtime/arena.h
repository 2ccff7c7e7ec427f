// A task's memory.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/simd/operand.h"
#include "cpu/tuning.h"

namespace rk {

// Zeroed memory at multiples of 64 bytes, freed at once.
template <class A>
class Arena {
 public:
  A* take(int64_t n) {
    n = (n + kLine - 1) / kLine * kLine;
    if (n > left_) {
      left_ = size_ = n > kBlock ? n : kBlock;
      void* p = std::aligned_alloc(64, left_ * sizeof(A));
      if (!p) throw std::bad_alloc();
      blocks_.emplace_back(static_cast<A*>(p), &std::free);
      next_ = static_cast<A*>(p);
    }
    A* p = next_;
    next_ += n;
    left_ -= n;
    if (n) std::memset(static_cast<void*>(p), 0, n * sizeof(A));  // before the first block there is no memory
    return p;
  }

  // What was taken so far is free again; the last block stays for what comes.
  void clear() {
    if (blocks_.empty()) return;
    blocks_.erase(blocks_.begin(), blocks_.end() - 1);
    next_ = blocks_.back().get();
    left_ = size_;
  }

  // A vector of channels as the kernels want it.
  template <class U>
  const A* row(const std::vector<U>& values) {
    A* p = take(padded<A>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) p[i] = static_cast<A>(values[i]);
    return p;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A), kBlock = kArenaBytes / sizeof(A);
  std::vector<std::unique_ptr<A, decltype(&std::free)>> blocks_;
  A* next_ = nullptr;
  int64_t left_ = 0, size_ = 0;  // of the last block
};

}  // namespace rk
