// The steps that dense Adam or AdamW took on rows while no batch looked them up, for one instruction set.
//
// A row's w, m and v are as of step t; up to step T its gradients were zero. With s's rate lr_s and decay
// d_s,
//
//   w <- P_t w - m S(sqrt v)       m <- beta1^(T-t) m       v <- beta2^(T-t) v
//   S(x) = sum_{s = t+1 .. T} q_s / (a_s x + eps)           a_s = sqrt(beta2^(s-t) / (1 - beta2^s))
//   q_s = P_s lr_s beta1^(s-t) / (1 - beta1^s)              P_s = prod_{u = s+1 .. T} (1 - lr_u d_u)
//
// For all rows of one t, S is one function of one number. With any g > 0, r = sqrt(a_s / g) and z = (g x -
// eps) / (g x + eps),
//
//   1 / (a_s x + eps) = 1 / (g x + eps) (1 + 2 sum_{n >= 1} tau^n T_n(z)) / r       tau = (1 - r) / (1 + r)
//
// with Chebyshev's polynomials T_n: their generating function. So S(x) (g x + eps) = sum_n c_n T_n(z), whose
// c_n the steps add to (catch_up.cpp: adam_history). Where g is the a_s of the steps that count, tau is
// small: kAdamTerms terms are exact to 1e-11 from t = 1 on, 4 to 1e-9 from t = 1000 on, and for every x: z is
// in
// [-1, 1] however near to eps or to zero sqrt v is.
//
// Bytes a row: D values of w, m and v, read and written; by a lookup, which leaves the row as it is, read.
// Flops a value: 11 and 1 a term (more than 8 terms: 3), one division and one square root.
#pragma once

#include "cpu/embedding/ids_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace catch_up {

// So few terms, which fade quickly, are summed as powers of z: half the operations of Clenshaw's sums.
constexpr int kPowers = 8;

// What the steps after t do to a row, but terms too small for A to tell.
template <class A>
struct Idle {
  A decay, keep1, keep2, centre, eps;
  A term[kAdamTerms];  // of n <= kPowers terms the factors of z's powers
  int n;               // 4, 6, 8 or all: none beyond counts

  RK_INLINE Idle(const CatchUp& c, int32_t last) {
    const AdamStart &start = c.start_of(last), &powers = c.powers_since(last);
    decay = A(c.decay_since(start)), keep1 = A(powers.power1), keep2 = A(powers.power2);
    centre = A(start.centre), eps = A(c.eps);
    n = start.terms(sizeof(A));
    for (int j = 0; j < kAdamTerms; ++j) term[j] = j < n ? A(c.decay * start.term[j]) : A(0);
    if (n <= kPowers) expand(term);
  }

  // T_0 = 1, T_1 = z, T_2 = 2 z^2 - 1, ... T_7 = 64 z^7 - 112 z^5 + 56 z^3 - 7 z
  static RK_INLINE void expand(A* c) {
    c[0] += c[4] - c[2] - c[6];
    c[1] += 5 * c[5] - 3 * c[3] - 7 * c[7];
    c[2] = 2 * c[2] - 8 * c[4] + 18 * c[6];
    c[3] = 4 * c[3] - 20 * c[5] + 56 * c[7];
    c[4] = 8 * c[4] - 48 * c[6];
    c[5] = 16 * c[5] - 112 * c[7];
    c[6] *= 32;
    c[7] *= 64;
  }
};

// Calls body(Int<n>): loops of known length, and a branch that the processor foretells.
template <class Body>
RK_INLINE void with_terms(int n, const Body& body) {
  if (n == 4) return body(Int<4>());
  if (n == 6) return body(Int<6>());
  if (n == kPowers) return body(Int<kPowers>());
  body(Int<kAdamTerms>());
}

// The new w of columns of a row.
template <int kTerms, class V, class A>
RK_INLINE V moved(V w, V m, V v, const Idle<A>& idle) {
  const V gx = idle.centre * square_root(v), inverse = A(1) / (gx + idle.eps), z = (gx - idle.eps) * inverse;
  V sum = V{} + idle.term[kTerms - 1];
  if constexpr (kTerms <= kPowers) {
#pragma GCC unroll 8
    for (int j = kTerms - 2; j >= 0; --j) sum = idle.term[j] + z * sum;
  } else {
    V b1 = {}, b2 = {};  // Clenshaw's sums
#pragma GCC unroll 16
    for (int j = kTerms - 1; j > 0; --j) {
      const V b = (idle.term[j] - b2) + (z + z) * b1;
      b2 = b1, b1 = b;
    }
    sum = (idle.term[0] - b2) + z * b1;
  }
  V step = m * (sum * inverse);
  // Rounded here: which of the two products is fused with the sum would be the compiler's choice in each
  // copy.
#if defined(__x86_64__)
  asm("" : "+x"(step));
#elif defined(__aarch64__)
  asm("" : "+w"(step));
#endif
  return idle.decay * w - step;
}

// Pointers to a row's columns.
template <class T>
struct Row {
  using A = Accumulator<T>;
  T* w;
  A *m, *v;

  RK_INLINE Row(const CatchUp& c, int64_t row)
      : w(static_cast<T*>(c.weight) + row * c.stride_wr),
        m(static_cast<A*>(c.state[0]) + row * c.stride_sr),
        v(static_cast<A*>(c.state[1]) + row * c.stride_sr) {}
};

// Brings an idle row, which is as of step `last`, up to the table's.
template <class T>
__attribute__((noinline)) void catch_up_row(const CatchUp& c, int64_t row, int32_t last) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(c.D % kLanes));
  const Tail<A> tail_state(static_cast<int>(c.D % kLanes));
  const Row<T> r(c, row);
  if (last <= 0) {
    const A decay = A(c.decay_since(c.start_of(last)));  // it never had a gradient
    for_each_column_block<T>(c.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      for (int i = 0; i < block.vecs; ++i)
        block.store(r.w + d, i, decay * block.load(r.w + d, i, tail), tail);
    });
    return;
  }
  const Idle<A> idle(c, last);
  with_terms(idle.n, [&](auto terms) __attribute__((always_inline)) {
    for_each_column_block<T>(c.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < block.vecs; ++i) {
        const auto m = block.load(r.m + d, i, tail_state), v = block.load(r.v + d, i, tail_state);
        const auto w = moved<terms.value>(block.load(r.w + d, i, tail), m, v, idle);
        block.store(r.w + d, i, w, tail);
        block.store(r.m + d, i, idle.keep1 * m, tail_state);
        block.store(r.v + d, i, idle.keep2 * v, tail_state);
      }
    });
  });
}

template <class T, class I>
__attribute__((noinline)) bool caught_up_rows(const CatchUp& c, const Bags& f, const I* ids, Range lookups,
                                              T* out, int64_t stride_out) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  constexpr int kLine = kCacheLine / sizeof(f32v);  // vectors
  const Tail<T> tail(static_cast<int>(c.D % kLanes));
  const Tail<A> tail_state(static_cast<int>(c.D % kLanes));
  const uint64_t R = c.R;
  const int64_t end = f.N, padding = f.padding_idx;
  for (int64_t p = lookups.begin; p < lookups.end; ++p, out += stride_out) {
    const int64_t id = ids[p];
    if (static_cast<uint64_t>(id) >= R) return false;
    const auto ahead = [&](int64_t distance) __attribute__((always_inline)) {
      const int64_t row = ids[p + distance < end ? p + distance : p];
      return static_cast<uint64_t>(row) < R ? row : id;
    };
    __builtin_prefetch(c.last_steps + ahead(kIdleAhead));
    const Row<T> near(c, ahead(kNearWide)), far(c, ahead(kFarWide));
    const auto prefetch = [&](int i, int64_t d) __attribute__((always_inline)) {
      if (i % kLine) return;
      __builtin_prefetch(near.w + d + i * kLanes, 0, 3);
      __builtin_prefetch(near.m + d + i * kLanes, 0, 3);
      __builtin_prefetch(near.v + d + i * kLanes, 0, 3);
      __builtin_prefetch(far.w + d + i * kLanes, 0, 2);
      __builtin_prefetch(far.m + d + i * kLanes, 0, 2);
      __builtin_prefetch(far.v + d + i * kLanes, 0, 2);
    };
    if (id == padding) continue;
    const Row<T> r(c, id);
    const int32_t last = c.last_steps[id];
    if (last > 0 && last < c.step) {
      const Idle<A> idle(c, last);
      with_terms(idle.n, [&](auto terms) __attribute__((always_inline)) {
        for_each_column_block<T>(c.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int i = 0; i < block.vecs; ++i) {
            prefetch(i, d);
            const auto m = block.load(r.m + d, i, tail_state), v = block.load(r.v + d, i, tail_state);
            block.store(out + d, i, moved<terms.value>(block.load(r.w + d, i, tail), m, v, idle), tail);
          }
        });
      });
      continue;
    }
    const A decay = c.is_idle(last) ? A(c.decay_since(c.start_of(last))) : A(1);
    for_each_column_block<T>(c.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < block.vecs; ++i) {
        prefetch(i, d);
        block.store(out + d, i, decay * block.load(r.w + d, i, tail), tail);
      }
    });
  }
  return true;
}

}  // namespace catch_up

template <class T>
void embedding_catch_up_rows(const CatchUp& c, const IdleRow* rows, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    catch_up::catch_up_row<T>(c, rows[i].row, static_cast<int32_t>(rows[i].last));
}

template <class T>
bool embedding_caught_up_rows(const CatchUp& c, const Bags& f, Range lookups, T* out, int64_t stride_out) {
  return with_ids(f, [&](const auto* ids) __attribute__((always_inline)) {
    return catch_up::caught_up_rows<T>(c, f, ids, lookups, out, stride_out);
  });
}

#define RK_INSTANTIATE(T)                                                            \
  template void embedding_catch_up_rows<T>(const CatchUp&, const IdleRow*, int64_t); \
  template bool embedding_caught_up_rows<T>(const CatchUp&, const Bags&, Range, T*, int64_t);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
