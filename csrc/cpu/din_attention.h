// DIN attention, for one instruction set.
//
// A sample has a target t [D] and valid rows h_l [D]; the first layer of the attention MLP is
// W = [Wt | Wh | Wd | Wp] on [t, h, t - h, t * h]. Hence
//
//   z_l = c + M h_l,   M = (Wh - Wd) + Wp diag(t)  [H, D],   c = (Wt + Wd) t + b
//
// then come the other layers, z' = W' a + b', each with its normalization and activation
// (din_attention_activation.h), and
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
// and back up, which computes z = c + M h again. Recomputing costs 2 D flops a value where keeping costs 4
// bytes written and several times read, which was slower when tried (D 64, widths 80 and 36). The layers
// behind the first have more inputs, and the layers before them besides: their z is kept.
//
// Per row and layer 2 in out flops forward (the first layer's in is D, not 4 D), four more backward and two a
// pass; D loads a row and pass, D stores a row backward. Per sample 4 D H flops form M, 6 D H its gradients.
// Bound by the multipliers.
#pragma once

#include "din_attention_activation.h"
#include "din_attention_dropout.h"
#include "din_attention_gemm.h"

namespace rk {
namespace RK_ISA {
namespace din {

// Which rows of the history sample b has: null for the first ones.
template <class T, class A>
static const int32_t* positions(const DinRows<T>& rows, int64_t b, const DinScratch<A>& s) {
  if (!rows.mask) return nullptr;
  const int64_t places = rows.first[b + 1] - rows.first[b];
  const bool* mask = rows.mask + rows.first[b];
  int64_t n = 0;
  for (int64_t l = 0; l < places; ++l) {
    s.positions[n] = static_cast<int32_t>(l);
    n += mask[l];
  }
  return s.positions;
}

// Calls body(first row, rows) on equal blocks of a sample's n rows.
template <class Body>
RK_INLINE void for_each_block(int64_t n, const Body& body) {
  const int64_t blocks = (n + kDinRows - 1) / kDinRows;
  for (int64_t i = 0; i < blocks; ++i) body(n * i / blocks, n * (i + 1) / blocks - n * i / blocks);
}

template <class T, class A>
RK_INLINE void convert_row(const T* from, A* to, int64_t D, const Tail<T>& tail) {
  int64_t d = 0;
  for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
    Traits<A>::store(to + d, Traits<T>::load(from + d));
  if (d < D) Traits<A>::store(to + d, tail.load(from + d));
}
template <class T, class A>
RK_INLINE void convert_row_back(const A* from, T* to, int64_t D, const Tail<T>& tail) {
  int64_t d = 0;
  for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
    Traits<T>::store(to + d, Traits<A>::load(from + d));
  if (d < D) tail.store(to + d, Traits<A>::load(from + d));
}

// Rows [r0, r0 + n) of sample b into s.history.
template <class T, class A>
static void gather(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t r0, int64_t n,
                   int64_t D, const DinScratch<A>& s) {
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  const T* base = rows.history + (rows.jagged ? rows.first[b] * rows.stride_hl : b * rows.stride_hb);
  for (int64_t r = 0; r < n; ++r)
    convert_row(base + (position ? position[r0 + r] : r0 + r) * rows.stride_hl, s.history + r * padded<A>(D),
                D, tail);
}

// M [D, H] and c of a target.
template <class A>
static void form_operand(const Din<A>& net, const DinScratch<A>& s) {
  using X = Traits<A>;
  const DinLayer<A>& f = net.layer[0];
  const int64_t ld = padded<A>(f.out), vecs = vectors<A>(f.out);
  gemm<A>(1, vecs, net.D, {s.target, 0, 1}, net.target_weight, ld, s.bias, ld, f.bias, ld);
  const A *t = s.target, *history_weight = net.history_weight, *product_weight = net.product_weight;
  A* operand = s.operand;
  for (int64_t d = 0; d < net.D; ++d)
    for (int64_t i = d * ld; i < d * ld + vecs * X::lanes; i += X::lanes)
      X::store(operand + i, X::load(history_weight + i) + t[d] * X::load(product_weight + i));
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
template <class A>
static void product(const Din<A>& net, int64_t i, bool from_kept, int64_t row, int64_t n,
                    const DinScratch<A>& s) {
  using X = Traits<A>;
  const DinLayer<A>& f = net.layer[i];
  const int64_t ld = padded<A>(f.out), vecs = vectors<A>(f.out);
  A* g = s.layer[i].g;
  if (!from_kept) {
    if (i == 0)
      return gemm<A>(n, vecs, net.D, {s.history, padded<A>(net.D), 1}, s.operand, ld, g, ld, s.bias, 0);
    return gemm<A>(n, vecs, f.in, {s.layer[i - 1].a, padded<A>(f.in), 1}, f.weight, ld, g, ld, f.bias, 0);
  }
  const Tail<A> tail(static_cast<int>(f.out % X::lanes));
  const A *z = f.kept + row * f.out, *scale = f.g_scale, *shift = f.g_shift;
  const int64_t full = f.out / X::lanes * X::lanes, rest = f.out - full;
  for (int64_t r = 0; r < n; ++r, z += f.out, g += ld) {
    for (int64_t h = 0; h < full; h += X::lanes)
      X::store(g + h, X::load(z + h) * X::load(scale + h) + X::load(shift + h));
    if (rest) X::store(g + full, tail.load(z + full) * X::load(scale + full) + X::load(shift + full));
  }
}

// Merges n rows of z into the statistics: Chan, Golub and LeVeque (1983), so that the variance loses nothing
// to the mean.
template <class A>
static void add_statistics(const DinLayer<A>& f, int64_t n, const A* z, DinStats& stats) {
  using X = Traits<A>;
  const int64_t ld = padded<A>(f.out), end = vectors<A>(f.out) * X::lanes;
  const double count = stats.count + n, share = n / count, between = stats.count * share;
  for (int64_t h = 0; h < end; h += X::lanes) {
    typename X::vec sum = {}, squares = {};
    for (int64_t r = 0; r < n; ++r) sum += X::load(z + r * ld + h);
    const auto mean = sum / static_cast<A>(n);
    for (int64_t r = 0; r < n; ++r) {
      const auto centred = X::load(z + r * ld + h) - mean;
      squares += centred * centred;
    }
    for (int j = 0; j < X::lanes; ++j) {
      const double delta = mean[j] - stats.mean[h + j];
      stats.mean[h + j] += delta * share;
      stats.deviation[h + j] += squares[j] + delta * delta * between;
    }
  }
  stats.count = count;
}

// out[r] = <x_r, w> + bias.
template <class A>
static void dot_rows(int64_t n, int64_t width, const A* x, const A* w, A bias, A* out) {
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t ld = padded<A>(width), end = vectors<A>(width) * X::lanes;
  sum_rows<A>(
      n,
      [&](int64_t r) {
        V sum = {};
        for (int64_t d = 0; d < end; d += X::lanes) sum += X::load(x + r * ld + d) * X::load(w + d);
        return sum;
      },
      [&](int64_t r, V sum) {
        sum += bias;
        if (n - r >= X::lanes)
          X::store(out + r, sum);
        else
          Tail<A>(static_cast<int>(n - r)).store(out + r, sum);
      });
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

// The first layer that a pass has to compute, when it needs g of layer i and all after it.
template <class A>
RK_INLINE int64_t lowest(const Din<A>& net, int64_t i) {
  while (i > 0 && !net.layer[i].kept) --i;
  return i;
}

}  // namespace din

// Samples [b0, b1). With until < layers, the statistics of z of layer `until` (whose gs is 1, go 0), which is
// kept if there is room for it; with until = layers, the output.
template <class T>
void din_forward(const Din<Accumulator<T>>& net, const DinRows<T>& rows, int64_t until, int64_t b0,
                 int64_t b1, const DinScratch<Accumulator<T>>& s, DinStats* stats) {
  using A = Accumulator<T>;
  const int64_t D = net.D, ld = padded<A>(D), vecs = vectors<A>(D),
                last = until < net.layers ? until : net.layers - 1;
  const bool pooling = until == net.layers;
  const int64_t low = pooling ? din::lowest(net, last) : until > 0 ? din::lowest(net, until - 1) : 0;
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t count = rows.count[b], first = rows.first[b];
    const int32_t* position = din::positions(rows, b, s);
    const bool from_history = count && low == 0 && !net.layer[0].kept;
    if (from_history) {
      din::convert_row(rows.target + b * rows.stride_tb, s.target, D, tail);
      din::form_operand(net, s);
    }
    A peak = -__builtin_inff(), total = 0;
    if (pooling)
      for (int64_t d = 0; d < ld; ++d) s.out[d] = 0;
    din::for_each_block(count, [&](int64_t r0, int64_t n) {
      if (pooling || from_history) din::gather(rows, b, position, r0, n, D, s);
      for (int64_t i = low; i <= last; ++i) {
        din::product(net, i, net.layer[i].kept && i < until && i == low, first + r0, n, s);
        if (i >= until) continue;
        activate(net.layer[i], n, s.layer[i], true);
        if (!net.drops) continue;
        draw_factors(net.dropout, net.layer[i], i, b, position, r0, n, s.layer[i]);
        multiply_factors(net.layer[i], n, s.layer[i], s.layer[i].a);
      }
      if (!pooling) {
        const DinLayer<A>& f = net.layer[until];
        din::add_statistics(f, n, s.layer[until].g, *stats);
        if (f.kept)
          for (int64_t r = 0; r < n; ++r)
            __builtin_memcpy(f.kept + (first + r0 + r) * f.out, s.layer[until].g + r * padded<A>(f.out),
                             f.out * sizeof(A));
        return;
      }
      A* w = net.row_weight + first;
      din::dot_rows(n, net.layer[last].out, s.layer[last].a, net.out_weight, net.out_bias, w + r0);
      if (net.use_softmax) {
        const A before = peak;
        for (int64_t r = r0; r < r0 + n; ++r) peak = w[r] > peak ? w[r] : peak;
        if (r0 > 0) {  // what came before was relative to a lower peak
          A factor = before - peak;
          din::exponentials<A>(1, &factor, 0);
          din::scale(r0, w, factor);
          din::scale(ld, s.out, factor);
          total *= factor;
        }
        total += din::exponentials(n, w + r0, peak);
      }
      gemm<A>(1, vecs, n, {w + r0, 0, 1}, s.history, ld, s.out, ld, s.out, ld);
    });
    if (!pooling) {
      const DinLayer<A>& f = net.layer[until];
      const int64_t padding = rows.first[b + 1] - first - count;
      if (f.kept) __builtin_memset(f.kept + (first + count) * f.out, 0, padding * f.out * sizeof(A));
      continue;
    }
    if (net.use_softmax && count) {
      din::scale(count, net.row_weight + first, 1 / total);
      din::scale(ld, s.out, 1 / total);
    }
    for (int64_t l = first + count; l < rows.first[b + 1]; ++l) net.row_weight[l] = 0;
    din::convert_row_back(s.out, rows.out + b * D, D, tail);
  }
}

namespace din {

// dL/dscore of a sample's rows.
template <class T, class A>
static void grad_score(const Din<A>& net, const DinRows<T>& rows, int64_t b, const int32_t* position,
                       const DinScratch<A>& s) {
  const int64_t count = rows.count[b];
  const A* w = net.row_weight + rows.first[b];
  A* grad = net.grad_score + rows.first[b];
  for_each_block(count, [&](int64_t r0, int64_t n) {
    gather(rows, b, position, r0, n, net.D, s);
    dot_rows<A>(n, net.D, s.history, s.grad_out, 0, grad + r0);
  });
  if (!net.use_softmax) return;
  A mean = 0;
  for (int64_t r = 0; r < count; ++r) mean += w[r] * grad[r];
  for (int64_t r = 0; r < count; ++r) grad[r] = w[r] * (grad[r] - mean);
}

// One block of a sample from dL/dscore back to layer `until`: its sums, or with until < 0 all gradients, of
// which those by M, c and the rows are left in scratch.
template <class A>
static void backward_block(const Din<A>& net, int64_t until, int64_t b, const int32_t* position, int64_t r0,
                           int64_t row, int64_t n, const DinScratch<A>& s, const DinGrad<A>& grad) {
  using X = Traits<A>;
  const bool only_sums = until >= 0;
  const int64_t lowest_grad = only_sums ? until : 0, low = lowest(net, lowest_grad), last = net.layers - 1;
  for (int64_t i = low; i <= last; ++i) {
    const DinLayer<A>& f = net.layer[i];
    product(net, i, f.kept, row, n, s);
    const bool need_a =
        !only_sums || f.activation == DinActivation::sigmoid || (i < last && !net.layer[i + 1].kept);
    activate(f, n, s.layer[i], need_a);
    if (!net.drops) continue;
    draw_factors(net.dropout, f, i, b, position, r0, n, s.layer[i]);
    if (need_a) multiply_factors(f, n, s.layer[i], s.layer[i].a);
  }
  const A* ds = net.grad_score + row;
  A *d = s.grad, *below = s.grad_below;
  const int64_t H = net.layer[last].out, ldH = padded<A>(H), vecsH = vectors<A>(H);
  const A* out_weight = net.out_weight;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t h = 0; h < vecsH * X::lanes; h += X::lanes)
      X::store(d + r * ldH + h, ds[r] * X::load(out_weight + h));
  if (!only_sums) {
    gemm<A>(1, vecsH, n, {ds, 0, 1}, s.layer[last].a, ldH, grad.out_weight, ldH, grad.out_weight, ldH);
    for (int64_t r = 0; r < n; ++r) *grad.out_bias += ds[r];
  }
  for (int64_t i = last; i >= lowest_grad; --i) {
    const DinLayer<A>& f = net.layer[i];
    const int64_t ld = padded<A>(f.out), ldk = padded<A>(f.in);
    if (net.drops) multiply_factors(f, n, s.layer[i], d);
    activation_backward(f, n, s.layer[i], d, only_sums && i == until,
                        i == 0 ? s.grad_bias : grad.layer[i].bias, grad.layer[i]);
    if (i == lowest_grad) break;
    if (!only_sums)
      gemm<A>(f.out, vectors<A>(f.in), n, {d, 1, ld}, s.layer[i - 1].a, ldk, grad.layer[i].weight, ldk,
              grad.layer[i].weight, ldk);
    gemm<A>(n, vectors<A>(f.in), f.out, {d, ld, 1}, f.weight_rows, ldk, below, ldk, nullptr, 0);
    A* const swap = d;
    d = below;
    below = swap;
  }
  if (only_sums) return;
  const int64_t D = net.D, ld = padded<A>(D), vecs = vectors<A>(D), ld0 = padded<A>(net.layer[0].out);
  const A *w = net.row_weight + row, *g = s.grad_out;
  A* dh = s.grad_history;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = 0; j < vecs * X::lanes; j += X::lanes) X::store(dh + r * ld + j, w[r] * X::load(g + j));
  gemm<A>(n, vecs, net.layer[0].out, {d, ld0, 1}, s.operand_rows, ld, s.grad_history, ld, s.grad_history, ld);
  gemm<A>(net.layer[0].out, vecs, n, {d, 1, ld0}, s.history, ld, s.grad_operand, ld, s.grad_operand, ld);
}

// From the gradients by M and c of one sample to those of the first layer and the target.
template <class A>
static void backward_operand(const Din<A>& net, const DinScratch<A>& s, DinLayerGrad<A> grad) {
  using X = Traits<A>;
  const int64_t ld = padded<A>(net.D), end = vectors<A>(net.D) * X::lanes;
  const A *target_rows = net.target_rows, *product_rows = net.product_rows, *grad_operand = s.grad_operand;
  const A *t = s.target, *grad_bias = s.grad_bias;
  A* grad_t = s.grad_target;
  __builtin_memset(grad_t, 0, ld * sizeof(A));
  for (int64_t h = 0; h < net.layer[0].out; ++h) {
    const A dc = grad_bias[h];
    for (int64_t d = 0; d < end; d += X::lanes) {
      const int64_t i = h * ld + d;
      const auto dM = X::load(grad_operand + i), td = X::load(t + d);
      X::store(grad_t + d,
               X::load(grad_t + d) + dc * X::load(target_rows + i) + dM * X::load(product_rows + i));
      X::store(grad.weight + i, X::load(grad.weight + i) + dM);
      X::store(grad.weight_product + i, X::load(grad.weight_product + i) + dM * td);
      X::store(grad.weight_target + i, X::load(grad.weight_target + i) + dc * td);
    }
  }
  for (int64_t h = 0; h < net.layer[0].out; ++h) grad.bias[h] += s.grad_bias[h];
}

}  // namespace din

// Samples [b0, b1). With until >= 0, the sums of layer `until`; otherwise all gradients. With need_score,
// dL/dscore first.
template <class T>
void din_backward(const Din<Accumulator<T>>& net, const DinRows<T>& rows, int64_t until, bool need_score,
                  int64_t b0, int64_t b1, const DinScratch<Accumulator<T>>& s,
                  const DinGrad<Accumulator<T>>& grad) {
  using A = Accumulator<T>;
  const bool only_sums = until >= 0;
  const int64_t D = net.D, ld = padded<A>(D), H = net.layer[0].out, ldH = padded<A>(H);
  const bool from_history = din::lowest(net, only_sums ? until : 0) == 0 && !net.layer[0].kept;
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t count = rows.count[b], first = rows.first[b], places = rows.first[b + 1] - first;
    const int32_t* position = din::positions(rows, b, s);
    din::convert_row(rows.target + b * rows.stride_tb, s.target, D, tail);
    din::convert_row(rows.grad_out + b * rows.stride_gb, s.grad_out, D, tail);
    if (need_score) din::grad_score(net, rows, b, position, s);
    if (from_history && count) din::form_operand(net, s);
    if (!only_sums) {
      din::form_operand_rows(net, s);
      __builtin_memset(s.grad_operand, 0, H * ld * sizeof(A));
      __builtin_memset(s.grad_bias, 0, ldH * sizeof(A));
      // Rows without a gradient: all but the valid ones.
      T* g = rows.grad_history + first * D;
      if (position)
        __builtin_memset(static_cast<void*>(g), 0, places * D * sizeof(T));
      else
        __builtin_memset(static_cast<void*>(g + count * D), 0, (places - count) * D * sizeof(T));
    }
    din::for_each_block(count, [&](int64_t r0, int64_t n) {
      const bool gathered = need_score && count <= kDinRows;
      if (from_history && !gathered) din::gather(rows, b, position, r0, n, D, s);
      din::backward_block(net, until, b, position, r0, first + r0, n, s, grad);
      if (only_sums) return;
      for (int64_t r = 0; r < n; ++r)
        din::convert_row_back(s.grad_history + r * ld,
                              rows.grad_history + (first + (position ? position[r0 + r] : r0 + r)) * D, D,
                              tail);
    });
    if (only_sums) continue;
    din::backward_operand(net, s, grad.layer[0]);
    din::convert_row_back(s.grad_target, rows.grad_target + b * D, D, tail);
  }
}

#define RK_INSTANTIATE(T)                                                                                \
  template void din_forward<T>(const Din<Accumulator<T>>&, const DinRows<T>&, int64_t, int64_t, int64_t, \
                               const DinScratch<Accumulator<T>>&, DinStats*);                            \
  template void din_backward<T>(const Din<Accumulator<T>>&, const DinRows<T>&, int64_t, bool, int64_t,   \
                                int64_t, const DinScratch<Accumulator<T>>&, const DinGrad<Accumulator<T>>&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
