// DIN attention's backward, for one instruction set: see forward_kernel.h.
#pragma once

#include "cpu/din_attention/forward_kernel.h"
#include "cpu/simd/operand.h"

namespace rk {
namespace RK_ISA {
namespace din {

// dL/dscore of a sample's rows; returns its last block of rows.
template <class T, class A>
static Block<const A> grad_score(const Din<A>& net, const DinRows<T>& rows, int64_t b,
                                 const int32_t* position, const DinScratch<A>& s) {
  const int64_t count = rows.count[b];
  const A* w = net.row_weight + rows.first[b];
  A* grad = net.grad_score + rows.first[b];
  Block<const A> history{};
  if (rows.grad_weight)
    __builtin_memcpy(grad, rows.grad_weight + rows.first[b], count * sizeof(A));
  else
    for_each_block(count, [&](int64_t r0, int64_t n) {
      history = history_rows(rows, b, position, r0, n, net.D, s);
      dot_rows<A>(n, net.D, history.p, history.ld, s.grad_out, 0, grad + r0);
    });
  if (net.use_softmax) {
    A mean = 0;
    for (int64_t r = 0; r < count; ++r) mean += w[r] * grad[r];
    for (int64_t r = 0; r < count; ++r) grad[r] = w[r] * (grad[r] - mean);
  }
  set_padding(rows, b, 0, count, A(0), grad);
  return history;
}

// d = dL/dz of the first layer -> the gradients of n rows of the history, with `add` added to those of other
// samples, and of M.
template <class A>
RK_INLINE void backward_history(const Din<A>& net, int64_t row, int64_t n, const A* d, Block<const A> history,
                                Block<A> grad_history, bool add, const DinScratch<A>& s) {
  using X = Traits<A>;
  const int64_t D = net.D, H = net.layer[0].out, ld = padded<A>(D), vecs = vectors<A>(D), ld0 = padded<A>(H);
  const A *w = net.row_weight + row, *g = s.grad_out;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = 0; j < vecs * X::lanes; j += X::lanes) {
      A* to = grad_history.p + r * grad_history.ld + j;
      const auto pooled = w[r] * X::load(g + j);
      X::store(to, add ? X::load(to) + pooled : pooled);
    }
  gemm<A>(n, vecs, H, {d, ld0, 1}, s.operand_rows, ld, grad_history.p, grad_history.ld, grad_history.p,
          grad_history.ld);
  gemm<A>(H, vecs, n, {d, 1, ld0}, history.p, history.ld, s.grad_operand, ld, s.grad_operand, ld);
}

// What the forward kept of Dice's statistics, by y as it is here: rounding leaves it elsewhere than there,
// and units that are equal must be it here, too.
template <class A>
RK_INLINE void take_dice_statistics(const LayerParams<A>& f, int64_t row, int64_t n,
                                    const LayerScratch<A>& s) {
  const int64_t ld = padded<A>(f.out);
  for (int64_t r = 0; r < n; ++r) s.mean[r] = first_unit(f, s.g + r * ld) + f.kept_from_first[row + r];
  __builtin_memcpy(s.inverse, f.kept_inverse + row, n * sizeof(A));
}

// One block of a sample from dL/dscore back to layer `until`: its sums, or with until < 0 all gradients, of
// which those by M, c and the rows are left in scratch.
template <class T, class A>
static void backward_block(const Din<A>& net, int64_t until, int64_t sample, const int32_t* position,
                           int64_t r0, int64_t row, int64_t n, Block<const A> history, Block<A> grad_history,
                           bool add, Ahead<T, A> ahead, const DinScratch<A>& s, const DinGrad<A>& grad) {
  using X = Traits<A>;
  const bool only_sums = until >= 0;
  // The last layer's Dice makes da and w_out's gradient on the way, unless units were dropped in between.
  const bool dice_last = net.layer[net.layers - 1].activation == Activation::dice && !net.drops;
  const int64_t lowest_grad = only_sums ? until : 0, low = lowest(net, lowest_grad), last = net.layers - 1;
  for (int64_t i = low; i <= last; ++i) {
    const LayerParams<A>& f = net.layer[i];
    ahead.fetch(n / 4 + 1);
    product<FirstLayer<A>>(net, i, f.kept, row, n, history, s);
    ahead.fetch(n / 4 + 1);
    const bool need_a = (!only_sums && !(i == last && dice_last)) || f.activation == Activation::sigmoid ||
                        (i < last && !net.layer[i + 1].kept);
    if (f.kept_inverse) take_dice_statistics(f, row, n, s.layer[i]);
    activate(f, n, s.layer[i], need_a, f.kept_inverse);
    if (!net.drops) continue;
    draw_factors(net.dropout, f, i, sample, position, r0, n, s.layer[i]);
    if (need_a) multiply_factors(f, n, s.layer[i], s.layer[i].a);
  }
  const A* ds = net.grad_score + row;
  A *d = s.grad, *below = s.grad_below;
  const int64_t H = net.layer[last].out, ldH = padded<A>(H), vecsH = vectors<A>(H);
  const A* out_weight = net.out_weight;
  if (!dice_last)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t h = 0; h < vecsH * X::lanes; h += X::lanes)
        X::store(d + r * ldH + h, ds[r] * X::load(out_weight + h));
  if (!only_sums) {
    if (!dice_last)
      gemm<A>(1, vecsH, n, {ds, 0, 1}, s.layer[last].a, ldH, grad.out_weight, ldH, grad.out_weight, ldH);
    for (int64_t r = 0; r < n; ++r) *grad.out_bias += ds[r];
  }
  for (int64_t i = last; i >= lowest_grad; --i) {
    const LayerParams<A>& f = net.layer[i];
    const int64_t ld = padded<A>(f.out), ldk = padded<A>(f.in);
    ahead.fetch(n / 4 + 1);
    if (net.drops) multiply_factors(f, n, s.layer[i], d);
    LastLayer<A> top{};
    if (i == last && dice_last) top = {ds, out_weight, only_sums ? nullptr : grad.out_weight};
    activation_backward(f, n, s.layer[i], d, only_sums && i == until,
                        i == 0 ? s.grad_bias : grad.layer[i].bias, grad.layer[i], top);
    ahead.fetch(n / 4 + 1);
    if (i == lowest_grad) break;
    if (!only_sums)
      gemm<A>(f.out, vectors<A>(f.in), n, {d, 1, ld}, s.layer[i - 1].a, ldk, grad.layer[i].weight, ldk,
              grad.layer[i].weight, ldk);
    gemm<A>(n, vectors<A>(f.in), f.out, {d, ld, 1}, f.weight_rows, ldk, below, ldk, nullptr, 0);
    A* const swap = d;
    d = below;
    below = swap;
  }
  if (!only_sums) backward_history(net, row, n, d, history, grad_history, add, s);
}

// From the gradients by M and c of one sample to those of the first layer and the target.
template <class A>
static void backward_operand(const Din<A>& net, const DinScratch<A>& s, LayerGrad<A> grad) {
  using X = Traits<A>;
  const int64_t ld = padded<A>(net.D), end = vectors<A>(net.D) * X::lanes;
  const A *target_rows = net.target_rows, *product_rows = net.product_rows, *grad_operand = s.grad_operand;
  const A *t = s.target, *grad_bias = s.grad_bias;
  // Columns outside, so that a column's dt stays in a register: its sum over h would wait for memory.
  for (int64_t d = 0; d < end; d += X::lanes) {
    const auto td = X::load(t + d);
    typename X::vec dt = {};
    for (int64_t h = 0; h < net.layer[0].out; ++h) {
      const int64_t i = h * ld + d;
      const A dc = grad_bias[h];
      const auto dM = X::load(grad_operand + i);
      dt += dc * X::load(target_rows + i) + dM * X::load(product_rows + i);
      X::store(grad.weight + i, X::load(grad.weight + i) + dM);
      X::store(grad.weight_product + i, X::load(grad.weight_product + i) + dM * td);
      X::store(grad.weight_target + i, X::load(grad.weight_target + i) + dc * td);
    }
    X::store(s.grad_target + d, dt);
  }
  for (int64_t h = 0; h < net.layer[0].out; ++h) grad.bias[h] += s.grad_bias[h];
}

}  // namespace din

template <class T>
void din_backward(const DinBackward<T>& a, Range samples, const DinScratch<Accumulator<T>>& scratch,
                  const DinGrad<Accumulator<T>>& grad) {
  const Din<Accumulator<T>>& net = a.network;
  const DinRows<T>& rows = a.rows;
  const int64_t until = a.until, b0 = samples.begin, b1 = samples.end;
  const bool need_score = a.need_score;
  using A = Accumulator<T>;
  const bool only_sums = until >= 0;
  const int64_t D = net.D, ld = padded<A>(D), H = net.layer[0].out, ldH = padded<A>(H);
  const bool from_history = din::lowest(net, only_sums ? until : 0) == 0 && !net.layer[0].kept;
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t count = rows.count[b], first = rows.first[b], sample = din::sample_of(rows, b);
    const bool add = rows.user && b > b0 && rows.segment[b] == rows.segment[b - 1];
    const DinScratch<A> s = din::with_target(net, rows, b0, b, b1, from_history, scratch);
    const int32_t* position = din::positions(rows, b, s);
    if (rows.grad_out)
      widen_row(rows.grad_out + sample * rows.stride_gb, s.grad_out, D, tail);
    else
      __builtin_memset(s.grad_out, 0, ld * sizeof(A));
    din::Block<const A> history{};
    if (need_score) history = din::grad_score(net, rows, b, position, s);
    const bool gathered = need_score && !rows.grad_weight && count <= kBlockRows;
    if (from_history && count) din::FirstLayer<A>::form(net, rows, b, position, s);
    if (!only_sums) {
      din::form_operand_rows(net, s);
      __builtin_memset(s.grad_operand, 0, H * ld * sizeof(A));
      __builtin_memset(s.grad_bias, 0, ldH * sizeof(A));
      if (!rows.user) din::clear_grad_rows(rows, b, position, D);
    }
    din::for_each_block(count, [&](int64_t r0, int64_t n) {
      if ((from_history || !only_sums) && !gathered)
        history = din::history_rows(rows, b, position, r0, n, D, s);
      const din::Block<A> grad_history = din::grad_rows(rows, b, position, r0, D, s);
      const din::Ahead<T, A> ahead(net, rows, b, r0 + n, b1, from_history || need_score || !only_sums,
                                   din::lowest(net, only_sums ? until : 0));
      din::backward_block(net, until, sample, position, r0, first + r0, n, history, grad_history, add, ahead,
                          s, grad);
      if (!only_sums && !rows.user && grad_history.p == s.grad_history)
        din::store_grad_rows<T, A>(rows, b, position, r0, n, D, {grad_history.p, grad_history.ld});
    });
    if (only_sums) continue;
    din::backward_operand(net, s, grad.layer[0]);
    narrow_row(s.grad_target, rows.grad_target + sample * D, D, tail);
    if (rows.user && rows.segment[b + 1] != rows.segment[b]) din::store_segment(rows, b, position, D, s);
  }
}

#define RK_INSTANTIATE(T)                                                                        \
  template void din_backward<T>(const DinBackward<T>&, Range, const DinScratch<Accumulator<T>>&, \
                                const DinGrad<Accumulator<T>>&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
