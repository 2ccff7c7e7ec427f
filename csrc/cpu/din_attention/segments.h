// Sums of the gradients of histories that samples share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/din_attention/geometry.h"
#include "cpu/din_attention/workspace.h"
#include "cpu/runtime/values.h"
#include "cpu/simd/operand.h"
#include "cpu/tuning.h"

namespace rk {

// The segments of samples whose gradients of a shared history are summed together: a chunk's samples of one
// history. Where they are not all of its samples they have memory of their own, and all of a history's are
// added up in order, so that its gradient has the same bits on any number of threads.
template <class A>
class DinSegments {
 public:
  DinSegments(const DinChunks& chunks, const DinGeometry& g, int64_t D) : ld_(padded<A>(D)) {
    if (!g.shared()) return;
    const int64_t B = static_cast<int64_t>(g.user.size());
    of_.reserve(B + 1);
    for (int64_t c = 0; c < chunks.size(); ++c) {
      const Range samples = chunks.samples(c, c + 1);
      for (int64_t b = samples.begin, begin = b; b < samples.end; ++b) {
        if (b == begin) first_sample_.push_back(b);
        of_.push_back(static_cast<int64_t>(first_sample_.size()) - 1);
        if (b + 1 == samples.end || g.user[b + 1] != g.user[b]) begin = b + 1;
      }
    }
    of_.push_back(-1);
    const int64_t n = static_cast<int64_t>(first_sample_.size());
    sums_.resize(n);
    memory_.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      const auto user = [&](int64_t j) { return j < 0 || j == n ? -1 : g.user[first_sample_[j]]; };
      if (user(i) != user(i - 1) && user(i) != user(i + 1)) continue;
      memory_[i].reset(new A[g.count[first_sample_[i]] * ld_]);
      sums_[i] = memory_[i].get();
    }
  }
  const int64_t* of_samples() const { return of_.data(); }
  A* const* sums() const { return sums_.data(); }

  // Calls body(first sample, the sum of its history's gradients) for the histories that several segments
  // have.
  template <class Body>
  void for_each_split(const DinGeometry& g, const Body& body) const {
    const int64_t n = static_cast<int64_t>(sums_.size());
    for (int64_t i = 0, end; i < n; i = end) {
      const int64_t b = first_sample_[i], size = g.count[b] * ld_;
      for (end = i + 1; end < n && g.user[first_sample_[end]] == g.user[b];) ++end;
      if (end == i + 1) continue;
      A* const sum = sums_[i];
      torch::stable::parallel_for(0, size, kSerialWork / (end - i) + 1, [&](int64_t k0, int64_t k1) {
        for (int64_t j = i + 1; j < end; ++j)
          for (int64_t k = k0; k < k1; ++k) sum[k] += sums_[j][k];
      });
      body(b, sum);
    }
  }

 private:
  int64_t ld_;
  std::vector<int64_t> of_, first_sample_;
  std::vector<A*> sums_;
  std::vector<std::unique_ptr<A[]>> memory_;
};

// Zeros for the gradients of histories that no sample has.
template <class T>
void clear_unused_histories(const DinArguments& a, const DinGeometry& g, T* grad_history) {
  const int64_t D = a.D();
  int64_t place = 0;  // up to which all is written
  const auto clear_until = [&](int64_t end) {
    if (place < end)
      std::memset(static_cast<void*>(grad_history + place * D), 0, (end - place) * D * sizeof(T));
  };
  for (size_t b = 0; b < g.sample.size(); ++b) {
    clear_until(g.user_place[b]);
    place = g.user_place[b] + g.first[b + 1] - g.first[b];
  }
  clear_until(D ? a.history.numel() / D : 0);
}

// The gradients of histories that several segments have.
template <class A>
void add_segments(const DinGeometry& g, const DinSegments<A>& segments, int64_t D, Tensor& grad_history) {
  with_values(grad_history.scalar_type(), [&](auto* type) {
    auto* const all = static_cast<decltype(type)>(grad_history.mutable_data_ptr());
    segments.for_each_split(g, [&](int64_t b, const A* sum) {
      auto* const grad = all + g.user_place[b] * D;
      std::fill_n(grad, (g.first[b + 1] - g.first[b]) * D, 0);
      for_each_row(g, b, [&](int64_t row, int64_t place) {
        std::copy_n(sum + row * padded<A>(D), D, grad + place * D);
      });
    });
  });
}

}  // namespace rk
