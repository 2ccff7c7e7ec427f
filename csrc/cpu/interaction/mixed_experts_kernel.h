// The experts of a mixture of low rank, between the two GEMMs of a layer of DCN v2, for one instruction set.
//
// projections [B, E r + E] = x [V_1 .. V_E, gates], C [E, r, r]
//
//   h_e = tanh(projections_e)    q_e = tanh(C_e h_e)    w = softmax(gates)    out_e = w_e q_e
//
//   dw_e = <grad_e, q_e>         dz_e = w_e grad_e (1 - q_e^2)               dC_e = sum_b dz_e h_e^T
//   grad_gate_e = w_e (dw_e - sum_k w_k dw_k)     grad_projections_e = (C_e^T dz_e) (1 - h_e^2)
//
// Per sample: forward 2 E r tanh, 2 E r^2 flops, E r + E reads and E r writes; backward the same and twice
// the flops more, nothing being kept of the forward. Bound by arithmetic: 256 tanh and 4096 multiply-adds
// with four experts of rank 32, of which a block of kSamples stays in L1.
#pragma once

#include "cpu/interaction/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/rows.h"

namespace rk {
namespace RK_ISA {
namespace experts {

constexpr int64_t kSamples = 32;

// A task's memory: of the gates [E, kSamples], blocks of one expert [kSamples, stride].
template <class T>
struct Scratch {
  using A = Accumulator<T>;
  int64_t E, rank, stride, vecs;
  A *weights, *grads, *h, *z, *dh;

  RK_INLINE Scratch(int64_t E, int64_t rank, A* memory)
      : E(E),
        rank(rank),
        stride(padded<A>(rank)),
        vecs((rank + Traits<A>::lanes - 1) / Traits<A>::lanes),
        weights(memory),
        grads(weights + E * kSamples),
        h(grads + E * kSamples),
        z(h + kSamples * stride),
        dh(z + kSamples * stride) {}
  RK_INLINE int64_t size() const { return 2 * E * kSamples + 3 * kSamples * stride; }

  // to [n, rank] = from [n, rank] matrix [rank, rank].
  RK_INLINE void multiply(int64_t n, const A* from, const A* matrix, A* to) const {
    gemm<A>(n, vecs, rank, {from, stride, 1}, matrix, stride, to, stride, nullptr, 0);
  }
};

// Calls body(first sample) on the samples of a block, as many at once as there are lanes.
template <class A, class Body>
RK_INLINE void for_each_sample_vector(const Body& body) {
  for (int64_t i = 0; i < kSamples; i += Traits<A>::lanes) body(i);
}

// The weights of the experts, one vector for several samples; samples that are not there have some, too.
template <class T>
RK_INLINE void weigh(const Scratch<T>& s, const MixedExperts<T>& a, int64_t sample, int64_t n) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  if (a.E == 0) return;  // there is no memory
  for (int64_t i = 0; i < n; ++i)
    for (int64_t e = 0; e < a.E; ++e)
      s.weights[e * kSamples + i] = to_scalar(a.projections[(sample + i) * a.stride_row + a.E * a.rank + e]);
  for_each_sample_vector<A>([&](int64_t i) __attribute__((always_inline)) {
    const auto weight = [&](int64_t e) { return s.weights + e * kSamples + i; };
    auto most = X::load(weight(0));
    for (int64_t e = 1; e < a.E; ++e) {
      const auto score = X::load(weight(e));
      most = score > most ? score : most;
    }
    typename X::vec sum = {};
    for (int64_t e = 0; e < a.E; ++e) {
      const auto part = exp(X::load(weight(e)) - most);
      X::store(weight(e), part);
      sum += part;
    }
    for (int64_t e = 0; e < a.E; ++e) X::store(weight(e), X::load(weight(e)) / sum);
  });
}

// h and z = C h of an expert.
template <class T>
RK_INLINE void project(const Scratch<T>& s, const MixedExperts<T>& a, int64_t e, int64_t sample, int64_t n,
                       const Tail<T>& tail) {
  for (int64_t i = 0; i < n; ++i)
    widen_row<T>(a.projections + (sample + i) * a.stride_row + e * a.rank, s.h + i * s.stride, a.rank, tail,
                 [](int64_t, typename Traits<T>::vec v) __attribute__((always_inline)) { return tanh(v); });
  s.multiply(n, s.h, a.transposed + e * a.rank * a.stride, s.z);
}

// Calls body(first column, whether a whole vector) for the vectors of an expert's row.
template <class T, class Body>
RK_INLINE void for_each_vector(int64_t rank, const Body& body) {
  for (int64_t d = 0; d < rank; d += Traits<T>::lanes) body(d, d + Traits<T>::lanes <= rank);
}

}  // namespace experts

template <class T>
int64_t mixed_experts_memory(int64_t E, int64_t rank) {
  return experts::Scratch<T>(E, rank, nullptr).size();
}

template <class T>
void mixed_experts(MixedExperts<T> a, Range samples) {
  using namespace experts;
  using X = Traits<Accumulator<T>>;
  const Scratch<T> s(a.E, a.rank, a.memory);
  const Tail<T> tail(static_cast<int>(a.rank % Traits<T>::lanes));
  for (int64_t b = samples.begin; b < samples.end; b += kSamples) {
    const int64_t n = samples.end - b < kSamples ? samples.end - b : kSamples;
    weigh(s, a, b, n);
    for (int64_t e = 0; e < a.E; ++e) {
      project(s, a, e, b, n, tail);
      for (int64_t i = 0; i < n; ++i) {
        const auto weight = s.weights[e * kSamples + i];
        T* out = a.out + (b + i) * a.stride_out + e * a.rank;
        for_each_vector<T>(a.rank, [&](int64_t d, bool whole) __attribute__((always_inline)) {
          store_columns(out + d, weight * tanh(X::load(s.z + i * s.stride + d)), whole, tail);
        });
      }
    }
  }
}

template <class T>
void mixed_experts_backward(MixedExpertsBackward<T> k, Range samples) {
  using namespace experts;
  using A = Accumulator<T>;
  using X = Traits<A>;
  const MixedExperts<T>& a = k.forward;
  const Scratch<T> s(a.E, a.rank, a.memory);
  const Tail<T> tail(static_cast<int>(a.rank % Traits<T>::lanes));
  const int64_t columns = k.stride_projections, matrix = a.rank * a.stride;
  for (int64_t b = samples.begin; b < samples.end; b += kSamples) {
    const int64_t n = samples.end - b < kSamples ? samples.end - b : kSamples;
    weigh(s, a, b, n);
    for (int64_t e = 0; e < a.E; ++e) {
      project(s, a, e, b, n, tail);
      for (int64_t i = 0; i < n; ++i) {
        const A weight = s.weights[e * kSamples + i];
        const T* grad_out = k.grad_out + (b + i) * k.stride_grad + e * a.rank;
        A* z = s.z + i * s.stride;
        typename X::vec along = {};
        for_each_vector<T>(a.rank, [&](int64_t d, bool whole) __attribute__((always_inline)) {
          const auto grad = load_columns(grad_out + d, whole, tail), q = tanh(X::load(z + d));
          along += grad * q;
          if (a.out) store_columns(a.out + (b + i) * a.stride_out + e * a.rank + d, weight * q, whole, tail);
          X::store(z + d, weight * grad * (1 - q * q));
        });
        s.grads[e * kSamples + i] = sum_lanes<A>(along);
      }
      s.multiply(n, s.z, k.weight + e * matrix, s.dh);
      A* grad_weight = k.grad_weight + e * matrix;
      gemm<A>(a.rank, s.vecs, n, {s.z, 1, s.stride}, s.h, s.stride, grad_weight, a.stride, grad_weight,
              a.stride);
      for (int64_t i = 0; i < n; ++i) {
        T* to = k.grad_projections + (b + i) * columns + e * a.rank;
        for_each_vector<T>(a.rank, [&](int64_t d, bool whole) __attribute__((always_inline)) {
          const auto h = X::load(s.h + i * s.stride + d), dh = X::load(s.dh + i * s.stride + d);
          store_columns(to + d, dh * (1 - h * h), whole, tail);
        });
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const auto at = [&](const A* p, int64_t e) { return p[e * kSamples + i]; };
      A mean = 0;
      for (int64_t e = 0; e < a.E; ++e) mean += at(s.weights, e) * at(s.grads, e);
      for (int64_t e = 0; e < a.E; ++e)
        assign(k.grad_projections[(b + i) * columns + a.E * a.rank + e],
               at(s.weights, e) * (at(s.grads, e) - mean));
    }
  }
}

#define RK_INSTANTIATE(T)                                     \
  template int64_t mixed_experts_memory<T>(int64_t, int64_t); \
  template void mixed_experts<T>(MixedExperts<T>, Range);     \
  template void mixed_experts_backward<T>(MixedExpertsBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
