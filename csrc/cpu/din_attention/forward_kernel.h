// DIN attention, for one instruction set.
//
// A sample has a target t [D] and valid rows h_l [D]; the first layer of the attention MLP is
// W = [Wt | Wh | Wd | Wp] on [t, h, t - h, t * h]. Hence
//
//   z_l = c + M h_l,   M = (Wh - Wd) + Wp diag(t)  [H, D],   c = (Wt + Wd) t + b
//
// then come the other layers, z' = W' a + b', each with its normalization and activation
// (dense/activation_kernel.h), and
//
//   score_l = w_out a_l + b_out,   w = score or softmax(score) over the sample's rows,   out = sum_l w_l h_l.
//
// Backward, with G_l = dL/dz_l of the first layer and g = grad_out:
//
//   dw_l = <g, h_l>,   dscore = dw, or w_l (dw_l - sum_k w_k dw_k) under the softmax,   da_l = w_out dscore_l
//   dW' = sum dz' a^T,   db' = sum dz',   da = W'^T dz'
//   dM = sum_l G_l h_l^T,   dc = sum_l G_l,   dh_l = w_l g + M^T G_l
//   dWh += dM,   dWp += dM diag(t),   dWt += dc t^T,   dWd += dc t^T - dM,   db += dc
//   dt = (Wt + Wd)^T dc + sum_H Wp * dM
//
// A normalization in training needs sums over all rows before it can be applied, forward (mean and variance
// of z) and backward (of e = dL/dg and of e g): one pass over the rows for each, from the first layer down
// and back up. Passes read z where it is kept (din_attention.cpp), 4 bytes a value, and else recompute it
// from the layer before, 2 in flops a value: reading is faster as long as the next block is prefetched and
// lies in huge pages (docs/performance/din_attention.md). Dice's two statistics of a row are kept too.
//
// Per row and layer 2 in out flops forward (the first layer's in is D, not 4 D), four more backward and two a
// pass; D loads a row and pass, D stores a row backward. Per sample 4 D H flops form M, 6 D H its gradients.
// Bound by the multipliers.
#pragma once

#include "cpu/dense/activation_kernel.h"
#include "cpu/din_attention/dropout_kernel.h"
#include "cpu/din_attention/first_layer_kernel.h"
#include "cpu/din_attention/rows_kernel.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/operand.h"

namespace rk {
namespace RK_ISA {
namespace din {

// The scratch for sample b with its target and c, computed for kDinTargets samples at a time: a GEMM of one
// row would be bound by its weights' bandwidth and by the latency of its sums.
template <class T, class A>
static DinScratch<A> with_target(const Din<A>& net, const DinRows<T>& rows, int64_t b0, int64_t b, int64_t b1,
                                 bool need_c, DinScratch<A> s) {
  const LayerParams<A>& f = net.layer[0];
  const int64_t ld = padded<A>(net.D), ldH = padded<A>(f.out), i = (b - b0) % kDinTargets;
  s.fresh = !rows.user || b == b0 || rows.user[b] != rows.user[b - 1];
  if (i == 0) {
    const int64_t n = b1 - b < kDinTargets ? b1 - b : kDinTargets;
    const Tail<T> tail(static_cast<int>(net.D % Traits<T>::lanes));
    for (int64_t j = 0; j < n; ++j)
      widen_row(rows.target + sample_of(rows, b + j) * rows.stride_tb, s.target + j * ld, net.D, tail);
    if (need_c)
      gemm<A>(n, vectors<A>(f.out), net.D, {s.target, ld, 1}, net.target_weight, ldH, s.bias, ldH, f.bias, 0,
              tail_width<A>(f.out));
  }
  s.target += i * ld;
  s.bias += i * ldH;
  return s;
}

// M [H, D], for the way back.
template <class A>
static void form_operand_rows(const Din<A>& net, const DinScratch<A>& s) {
  using X = Traits<A>;
  const int64_t ld = padded<A>(net.D), end = vectors<A>(net.D) * X::lanes, H = net.layer[0].out;
  const A *t = s.target, *history_rows = net.history_rows, *product_rows = net.product_rows;
  A* operand_rows = s.operand_rows;
  for (int64_t j = 0; j < H * ld; j += ld)
    for (int64_t d = 0; d < end; d += X::lanes)
      X::store(operand_rows + j + d,
               X::load(history_rows + j + d) + X::load(t + d) * X::load(product_rows + j + d));
}

// g of layer i for the rows in scratch: from z where it was kept, from the history or the activation before
// otherwise.
template <class First, class A>
static void product(const Din<A>& net, int64_t i, bool from_kept, int64_t row, int64_t n,
                    Block<const typename First::Row> history, const DinScratch<A>& s) {
  using X = Traits<A>;
  const LayerParams<A>& f = net.layer[i];
  const int64_t ld = padded<A>(f.out), vecs = vectors<A>(f.out), packed = tail_width<A>(f.out);
  A* g = s.layer[i].g;
  if (!from_kept && i == 0) return First::product(net, n, history, s);
  if (!from_kept)
    return gemm<A>(n, vecs, f.in, {s.layer[i - 1].a, padded<A>(f.in), 1}, f.weight, ld, g, ld, f.bias, 0,
                   packed);
  const Tail<A> tail(static_cast<int>(f.out % X::lanes));
  const A *z = f.kept + row * f.out, *scale = f.g_scale, *shift = f.g_shift;
  const int64_t full = f.out / X::lanes * X::lanes, rest = f.out - full;
  for (int64_t r = 0; r < n; ++r, z += f.out, g += ld) {
    for (int64_t h = 0; h < full; h += X::lanes)
      X::store(g + h, X::load(z + h) * X::load(scale + h) + X::load(shift + h));
    if (rest) X::store(g + full, tail.load(z + full) * X::load(scale + full) + X::load(shift + full));
  }
}

// Merges n rows of z into the statistics. What rounding took from a block's mean is added in double: the
// variance between blocks would notice it where a mean is a thousand times the deviation.
template <class A>
static void add_statistics(const LayerParams<A>& f, int64_t n, const A* z, ColumnStats& stats) {
  using X = Traits<A>;
  const int64_t ld = padded<A>(f.out), end = vectors<A>(f.out) * X::lanes;
  const MergeRows merge(stats, n);
  for (int64_t h = 0; h < end; h += X::lanes) {
    typename X::vec sum = {}, rest = {}, squares = {};
    for (int64_t r = 0; r < n; ++r) sum += X::load(z + r * ld + h);
    const auto mean = sum / static_cast<A>(n);
    for (int64_t r = 0; r < n; ++r) {
      const auto centred = X::load(z + r * ld + h) - mean;
      rest += centred;
      squares += centred * centred;
    }
    for (int j = 0; j < X::lanes; ++j) {
      const double taken = rest[j] == rest[j] ? rest[j] / static_cast<double>(n) : 0;  // infinite z: NaN
      merge(stats, h + j, mean[j] + taken, squares[j] - rest[j] * taken);
    }
  }
  stats.count = merge.count;
}

// out[r] = <x_r, w> + bias.
template <class A>
static void dot_rows(int64_t n, int64_t width, const A* x, int64_t ld, const A* w, A bias, A* out) {
  using X = Traits<A>;
  const auto row = [&](int64_t r, int64_t d)
                       __attribute__((always_inline)) { return X::load(x + r * ld + d); };
  RK_ISA::dot_rows<A>(n, vectors<A>(width) * X::lanes, row, w, bias, out);
}

template <class A>
static void scale(int64_t n, A* x, A factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// x -> e^(x - peak); returns the sum.
template <class A>
static A exponentials(int64_t n, A* x, A peak) {
  using X = Traits<A>;
  A sum = 0;
  for (int64_t i = 0; i < n; i += X::lanes) {
    const int64_t left = n - i < X::lanes ? n - i : X::lanes;
    A lane[X::lanes] = {};
    for (int64_t j = 0; j < left; ++j) lane[j] = x[i + j] - peak;
    store_vector(lane, exp(load_vector<typename X::vec>(lane)));
    for (int64_t j = 0; j < left; ++j) sum += x[i + j] = lane[j];
  }
  return sum;
}

// Rows [r0, r0 + n) of a softmax: w -> e^(w - peak), and what came before, relative to a lower peak, made
// relative to the new one: w, the weighted sum out [ld] and the total.
template <class A>
RK_INLINE void add_exponentials(A* w, int64_t r0, int64_t n, int64_t ld, A* out, A& peak, A& total) {
  const A before = peak;
  for (int64_t r = r0; r < r0 + n; ++r) peak = w[r] > peak ? w[r] : peak;
  if (r0 > 0) {
    A factor = before - peak;
    exponentials<A>(1, &factor, 0);
    scale(r0, w, factor);
    scale(ld, out, factor);
    total *= factor;
  }
  total += exponentials(n, w + r0, peak);
}

// kept [n, out] = z of n rows.
template <class A>
RK_INLINE void keep_rows(const LayerParams<A>& f, int64_t n, const A* z, A* kept) {
  for (int64_t r = 0; r < n; ++r)
    __builtin_memcpy(kept + r * f.out, z + r * padded<A>(f.out), f.out * sizeof(A));
}

// Zeros for what is kept of positions [begin, end), which have no row.
template <class A>
RK_INLINE void clear_absent_rows(const Din<A>& net, int64_t begin, int64_t end) {
  for (int64_t l = begin; l < end; ++l) {
    net.row_weight[l] = 0;
    for (int64_t i = 0; i < net.layers; ++i)
      if (net.layer[i].kept_inverse) net.layer[i].kept_from_first[l] = net.layer[i].kept_inverse[l] = 0;
  }
}

// The first layer that a pass has to compute, when it needs g of layer i and all after it.
template <class A>
RK_INLINE int64_t lowest(const Din<A>& net, int64_t i) {
  while (i > 0 && !net.layer[i].kept) --i;
  return i;
}

}  // namespace din

template <class T>
void din_forward(const DinForward<T>& a, Range samples, const DinScratch<Accumulator<T>>& scratch,
                 ColumnStats* stats) {
  const Din<Accumulator<T>>& net = a.network;
  const DinRows<T>& rows = a.rows;
  const int64_t until = a.until, b0 = samples.begin, b1 = samples.end;
  using A = Accumulator<T>;
  const int64_t D = net.D, ld = padded<A>(D), vecs = vectors<A>(D),
                last = until < net.layers ? until : net.layers - 1;
  const bool pooling = until == net.layers;
  const int64_t low = pooling ? din::lowest(net, last) : until > 0 ? din::lowest(net, until - 1) : 0;
  const bool from_history = low == 0 && (until == 0 || !net.layer[0].kept);
  const bool scores = pooling && !net.drops;  // the last activation makes them on the way
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  const auto sample = [&](auto first_layer, int64_t b, const DinScratch<A>& s) {
    using First = decltype(first_layer);
    using Row = typename First::Row;
    const int64_t count = rows.count[b], first = rows.first[b];
    const int32_t* position = din::positions(rows, b, s);
    if (from_history && count) First::form(net, rows, b, position, s);
    A peak = -__builtin_inff(), total = 0;
    if (pooling)
      for (int64_t d = 0; d < ld; ++d) s.out[d] = 0;
    din::for_each_block(count, [&](int64_t r0, int64_t n) {
      din::Block<const Row> history{};
      if (pooling || from_history) history = First::rows(rows, b, position, r0, n, D, s);
      din::Ahead<T, A> ahead(net, rows, b, r0 + n, b1, pooling || from_history, low);
      for (int64_t i = low; i <= last; ++i) {
        ahead.fetch(n / 3 + 1);
        din::product<First>(net, i, net.layer[i].kept && i < until && i == low, first + r0, n, history, s);
        ahead.fetch(n / 3 + 1);
        if (i >= until) continue;
        const LayerParams<A>& f = net.layer[i];
        Score<A> score{};
        if (scores && i == last) score = {net.out_weight, net.out_bias, net.row_weight + first + r0};
        activate(f, n, s.layer[i], true, false, score);
        if (f.kept_inverse) {
          __builtin_memcpy(f.kept_from_first + first + r0, s.layer[i].from_first, n * sizeof(A));
          __builtin_memcpy(f.kept_inverse + first + r0, s.layer[i].inverse, n * sizeof(A));
        }
        if (!net.drops) continue;
        draw_factors(net.dropout, net.layer[i], i, din::sample_of(rows, b), position, r0, n, s.layer[i]);
        multiply_factors(net.layer[i], n, s.layer[i], s.layer[i].a);
      }
      ahead.fetch(n);
      if (!pooling) {
        const LayerParams<A>& f = net.layer[until];
        din::add_statistics(f, n, s.layer[until].g, *stats);
        if (f.kept) din::keep_rows(f, n, s.layer[until].g, f.kept + (first + r0) * f.out);
        return;
      }
      A* w = net.row_weight + first;
      if (!scores)
        din::dot_rows(n, net.layer[last].out, s.layer[last].a, padded<A>(net.layer[last].out), net.out_weight,
                      net.out_bias, w + r0);
      // Padding has no weight, or beside nothing else all of it: e^0 each.
      din::set_padding(rows, b, r0, n, net.use_softmax ? -A(__FLT_MAX__) : A(0), w);
      if (net.use_softmax) {
        din::add_exponentials(w, r0, n, ld, s.out, peak, total);
        if (rows.pooled && rows.pooled[b]) din::set_padding(rows, b, r0, n, A(0), w);
      }
      if (!rows.out) return;
      gemm<A, MultiplyAdd<A, Row>>(1, vecs, n, {w + r0, 0, 1}, history.p, history.ld, s.out, ld, s.out, ld);
    });
    if (!pooling) {
      const LayerParams<A>& f = net.layer[until];
      const int64_t padding = rows.first[b + 1] - first - count;
      if (f.kept) __builtin_memset(f.kept + (first + count) * f.out, 0, padding * f.out * sizeof(A));
      return;
    }
    if (net.use_softmax && count) {
      din::scale(count, net.row_weight + first, 1 / total);
      din::scale(ld, s.out, 1 / total);
    }
    din::clear_absent_rows(net, first + count, rows.first[b + 1]);
    if (rows.out) narrow_row(s.out, rows.out + din::sample_of(rows, b) * D, D, tail);
  };
  for (int64_t b = b0; b < b1; ++b) {
    const DinScratch<A> s = din::with_target(net, rows, b0, b, b1, from_history, scratch);
#ifdef RK_BF16_PAIRS
    if (din::FirstLayer<T>::serves(D, rows.count[b])) {
      sample(din::FirstLayer<T>(), b, s);
      continue;
    }
#endif
    sample(din::FirstLayer<A>(), b, s);
  }
}

#define RK_INSTANTIATE(T) \
  template void din_forward<T>(const DinForward<T>&, Range, const DinScratch<Accumulator<T>>&, ColumnStats*);
#ifdef RK_BF16_PAIRS
RK_INSTANTIATE(bf16)
#else
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#endif
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
