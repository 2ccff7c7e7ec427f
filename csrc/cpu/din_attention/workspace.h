// Chunks of work, a thread's memory and its partial sums in DIN attention.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/din_attention/geometry.h"
#include "cpu/din_attention/params.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/operand.h"
#include "cpu/tuning.h"

namespace rk {

// Chunks of samples of about equal work for the threads. They depend on the input alone and statistics are
// summed by chunk, so the forward has the same bits on any number of threads.
class DinChunks {
 public:
  template <class A>
  DinChunks(const Din<A>& net, const DinGeometry& g) {
    const int64_t B = static_cast<int64_t>(g.count.size()), most = std::min(B, kDinChunks);
    double row = kDinRowFlops, sample = kDinSampleFlops;
    for (int64_t i = 0; i < net.layers; ++i) row += (i == 0 ? net.D : net.layer[i].in) * net.layer[i].out;
    sample += 3. * net.D * net.layer[0].out;
    const double total = g.valid * row + B * sample;
    double done = 0;
    bounds_.push_back(0);
    for (int64_t b = 0; b < B; ++b) {
      done += g.count[b] * row + sample;
      if (done * most >= total * bounds_.size()) bounds_.push_back(b + 1);
    }
    if (bounds_.back() != B) bounds_.push_back(B);
    grain_ = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(size() * kDinChunkFlops / (total + 1))));
  }
  int64_t size() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  Range samples(int64_t chunk, int64_t end) const { return {bounds_[chunk], bounds_[end]}; }

  // Calls body(first chunk, end) on ranges of chunks, which depend on the number of threads only.
  template <class Body>
  void parallel_for(const Body& body) const {
    torch::stable::parallel_for(0, size(), grain_, body);
  }

 private:
  std::vector<int64_t> bounds_;
  int64_t grain_ = 1;
};

// One thread's memory.
template <class A>
struct DinWorkspace {
  DinWorkspace(const Din<A>& net, const DinGeometry& g, bool backward) {
    const int64_t R = std::min(kBlockRows, g.longest), ldD = padded<A>(net.D), H = net.layer[0].out,
                  ldH = padded<A>(H), kept_rows = g.shared() ? g.longest : R;
    int64_t widest = 0;
    for (int64_t i = 0; i < net.layers; ++i) {
      const int64_t ld = padded<A>(net.layer[i].out);
      widest = std::max(widest, ld);
      A* product = arena.take(R * ld);
      layers.push_back({product, backward ? arena.take(R * ld) : product,
                        net.drops ? arena.take(R * ld) : nullptr, arena.take(R), arena.take(R), arena.take(R),
                        arena.take(R), arena.take(R)});
    }
    scratch.layer = layers.data();
    scratch.target = arena.take(kDinTargets * ldD);
    scratch.out = arena.take(ldD);
    scratch.history = arena.take(kept_rows * ldD);
    scratch.operand = arena.take(operand_size<A>(net.D, H));
    scratch.bias = arena.take(kDinTargets * ldH);
    if (backward) {
      scratch.grad_out = arena.take(ldD);
      scratch.grad_target = arena.take(ldD);
      scratch.operand_rows = arena.take(H * ldD);
      scratch.grad_operand = arena.take(H * ldD);
      scratch.grad_bias = arena.take(ldH);
      scratch.grad = arena.take(R * widest);
      scratch.grad_below = arena.take(R * widest);
      scratch.grad_history = arena.take(kept_rows * ldD);
    }
    if (g.mask.defined()) {
      positions.resize(g.mask.size(1));
      scratch.positions = positions.data();
    }
  }
  Arena<A> arena;
  std::vector<LayerScratch<A>> layers;
  std::vector<int32_t> positions;
  DinScratch<A> scratch{};
};

// Gradients summed over a range of chunks, in memory of its own.
template <class A>
struct PartialGrads {
  explicit PartialGrads(const Din<A>& net) {
    for (int64_t i = 0; i < net.layers; ++i) {
      const LayerParams<A>& f = net.layer[i];
      const int64_t ld = padded<A>(f.out), size = f.out * padded<A>(i == 0 ? net.D : f.in);
      LayerGrad<A> grad{take(size), nullptr,  nullptr,
                        take(ld),   take(ld), {take(ld), take(ld), take(ld), take(ld)}};
      if (i == 0) {
        grad.weight_product = take(size);
        grad.weight_target = take(size);
      }
      layers.push_back(grad);
    }
    grad = {layers.data(), take(padded<A>(net.layer[net.layers - 1].out)), take(1)};
  }
  void operator+=(const PartialGrads& other) {
    for (size_t k = 0; k < parts.size(); ++k)
      for (int64_t i = 0; i < parts[k].second; ++i) parts[k].first[i] += other.parts[k].first[i];
  }
  A* take(int64_t n) {
    parts.emplace_back(arena.take(n), n);
    return parts.back().first;
  }
  Arena<A> arena;
  std::vector<std::pair<A*, int64_t>> parts;
  std::vector<LayerGrad<A>> layers;
  DinGrad<A> grad;
};

}  // namespace rk
