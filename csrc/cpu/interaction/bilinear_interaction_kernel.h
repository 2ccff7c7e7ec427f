// FiBiNET's bilinear interaction of fields, for one instruction set.
//
// x [B, F, D], W one matrix [D, D] for all fields, one a field f, or one a pair f < g
//
//   z = W x_f     out[b, (f, g)] = z x_g                                elementwise
//   dz = grad_out x_g     dx_g += grad_out z     dx_f += W^T dz         dW = sum_b dz x_f^T
//
// A block of samples goes through all pairs, so that a matrix that comes from L2 serves all of them. With a
// matrix for each field or for all, z is computed once a field, and its dz is the sum over the pairs. Per
// sample, one matrix a pair: forward F D reads, F (F - 1) / 2 D writes, F (F - 1) D^2 flops; backward as many
// more reads and three times the flops, z being computed again.
#pragma once

#include "cpu/interaction/params.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/rows.h"

namespace rk {
namespace RK_ISA {
namespace bilinear {

constexpr int64_t kSamples = 32, kPairsAhead = 4;

// A task's memory: fields and their gradients [F, samples, stride], blocks [samples, stride].
template <class T>
struct Scratch {
  using A = Accumulator<T>;
  int64_t F, D, stride, samples, block, vecs;
  A *fields, *grads, *z, *dz;

  RK_INLINE Scratch(int64_t F, int64_t D, A* memory)
      : F(F),
        D(D),
        stride(padded<A>(D)),
        samples(D * sizeof(A) <= 64 ? 2 * kSamples : kSamples),
        block(samples * stride),
        vecs((D + Traits<A>::lanes - 1) / Traits<A>::lanes) {
    fields = memory;
    grads = fields + F * block;
    z = grads + F * block;
    dz = z + block;
  }
  RK_INLINE int64_t size() const { return (2 * F + 2) * block; }

  // to [n, D] = from [n, D] matrix [D, D], added to `init` where there is one.
  RK_INLINE void multiply(int64_t n, const A* from, const A* matrix, A* to, const A* init) const {
    gemm<A>(n, vecs, D, {from, stride, 1}, matrix, stride, to, stride, init, stride);
  }
};

template <class T>
RK_INLINE void load_fields(const Scratch<T>& s, const BilinearInteraction<T>& a, int64_t sample, int64_t n,
                           const Tail<T>& tail) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t f = 0; f < a.F; ++f)
      widen_row<T>(a.x + (sample + i) * a.stride_sample + f * a.stride_field,
                   s.fields + f * s.block + i * s.stride, a.D, tail);
}

// Calls body(field, other, pair, whether it is the field's first) for every pair.
template <class Body>
RK_INLINE void for_each_pair(int64_t F, const Body& body) {
  int64_t pair = 0;
  for (int64_t f = 0; f < F; ++f)
    for (int64_t g = f + 1; g < F; ++g) body(f, g, pair++, g == f + 1);
}

// out [pair of n samples] = z x_g
template <class T>
RK_INLINE void store_products(const BilinearInteraction<T>& a, const Scratch<T>& s, int64_t n,
                              const Accumulator<T>* other, T* out, const Tail<T>& tail) {
  using X = Traits<Accumulator<T>>;
  const int64_t stride_out = a.F * (a.F - 1) / 2 * a.D;
  for (int64_t i = 0; i < n; ++i) {
    const auto *z = s.z + i * s.stride, *x = other + i * s.stride;
    T* to = out + i * stride_out;
    int64_t d = 0;
    for (; d + X::lanes <= a.D; d += X::lanes) {
      const auto product = X::load(z + d) * X::load(x + d);
      if (a.non_temporal)
        Traits<T>::store_non_temporal(to + d, product);
      else
        Traits<T>::store(to + d, product);
    }
    if (d < a.D) tail.store(to + d, X::load(z + d) * X::load(x + d));
  }
}

// A sample's rows of grad_out are a stream of their own, of more streams than the hardware follows.
template <class T>
RK_INLINE void prefetch(const T* grad_out, int64_t stride, int64_t n, int64_t D) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < D; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(grad_out + i * stride + d);
}

// dz = grad_out x_g, or that added to it, and dx_g += grad_out z, for a pair of n samples.
template <class T>
RK_INLINE void multiply_back(const BilinearInteractionBackward<T>& a, const Scratch<T>& s, int64_t n,
                             const T* grad_out, int64_t g, bool first, const Tail<T>& tail) {
  using X = Traits<Accumulator<T>>;
  for (int64_t i = 0; i < n; ++i) {
    const T* from = grad_out + i * a.stride_grad;
    const auto *x = s.fields + g * s.block + i * s.stride, *z = s.z + i * s.stride;
    auto *dx = s.grads + g * s.block + i * s.stride, *dz = s.dz + i * s.stride;
    const auto column = [&](int64_t d, auto grad) __attribute__((always_inline)) {
      const auto term = grad * X::load(x + d);
      X::store(dz + d, first ? term : X::load(dz + d) + term);
      X::store(dx + d, X::load(dx + d) + grad * X::load(z + d));
    };
    int64_t d = 0;
    for (; d + X::lanes <= s.D; d += X::lanes) column(d, Traits<T>::load(from + d));
    if (d < s.D) column(d, tail.load(from + d));
  }
}

}  // namespace bilinear

template <class T>
int64_t bilinear_interaction_memory(int64_t F, int64_t D) {
  return bilinear::Scratch<T>(F, D, nullptr).size();
}

template <class T>
void bilinear_interaction(BilinearInteraction<T> a, Range samples) {
  const bilinear::Scratch<T> s(a.F, a.D, a.memory);
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  const int64_t matrix = a.D * a.stride, pairs = a.F * (a.F - 1) / 2;
  for (int64_t b = samples.begin; b < samples.end; b += s.samples) {
    const int64_t n = samples.end - b < s.samples ? samples.end - b : s.samples;
    bilinear::load_fields<T>(s, a, b, n, tail);
    bilinear::for_each_pair(a.F, [&](int64_t f, int64_t g, int64_t pair,
                                     bool first) __attribute__((always_inline)) {
      if (first || a.kind == Bilinear::interaction)
        s.multiply(n, s.fields + f * s.block, a.transposed + a.weight_of(f, pair) * matrix, s.z, nullptr);
      bilinear::store_products<T>(a, s, n, s.fields + g * s.block, a.out + (b * pairs + pair) * a.D, tail);
    });
  }
  if (a.non_temporal) fence_non_temporal();
}

template <class T>
void bilinear_interaction_backward(BilinearInteractionBackward<T> a, Range samples) {
  using A = Accumulator<T>;
  const BilinearInteraction<T>& of = a.forward;
  const bilinear::Scratch<T> s(of.F, of.D, of.memory);
  const Tail<T> tail(static_cast<int>(of.D % Traits<T>::lanes));
  const int64_t matrix = of.D * of.stride, pairs = of.F * (of.F - 1) / 2;
  const bool a_pair = of.kind == Bilinear::interaction;
  for (int64_t b = samples.begin; b < samples.end; b += s.samples) {
    const int64_t n = samples.end - b < s.samples ? samples.end - b : s.samples;
    bilinear::load_fields<T>(s, of, b, n, tail);
    for (int64_t i = 0; i < of.F * s.block; ++i) s.grads[i] = 0;
    bilinear::for_each_pair(
        of.F, [&](int64_t f, int64_t g, int64_t pair, bool first) __attribute__((always_inline)) {
          const int64_t weight = of.weight_of(f, pair) * matrix;
          const A* x = s.fields + f * s.block;
          const T* grad_out = a.grad_out + b * a.stride_grad + pair * a.stride_pair;
          if (pair + bilinear::kPairsAhead < pairs)
            bilinear::prefetch(grad_out + bilinear::kPairsAhead * a.stride_pair, a.stride_grad, n, of.D);
          if (first || a_pair) s.multiply(n, x, of.transposed + weight, s.z, nullptr);
          bilinear::multiply_back<T>(a, s, n, grad_out, g, first || a_pair, tail);
          if (g < of.F - 1 && !a_pair) return;
          A *dx = s.grads + f * s.block, *dw = a.grad_weights + weight;
          s.multiply(n, s.dz, a.weights + weight, dx, dx);
          gemm<A>(of.D, s.vecs, n, {s.dz, 1, s.stride}, x, s.stride, dw, of.stride, dw, of.stride);
        });
    for (int64_t i = 0; i < n; ++i)
      for (int64_t f = 0; f < of.F; ++f)
        narrow_row<T>(s.grads + f * s.block + i * s.stride, a.grad_x + ((b + i) * of.F + f) * of.D, of.D,
                      tail);
  }
}

#define RK_INSTANTIATE(T)                                               \
  template int64_t bilinear_interaction_memory<T>(int64_t, int64_t);    \
  template void bilinear_interaction<T>(BilinearInteraction<T>, Range); \
  template void bilinear_interaction_backward<T>(BilinearInteractionBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
