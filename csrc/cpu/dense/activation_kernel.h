// Activations of a hidden layer on a block of rows, forward and backward, for one instruction set. Rows
// have padded(out) values, one unit a lane; absent units are zero going in and have no effect coming out.
// Structures of pointers come by value: through a reference each pointer would be read again after every
// store.
//
// With y = ys g + yo and v = vs g + vo (see LayerParams), per unit:
//
//   leaky            a = y > 0 ? y : alpha y
//   relu             a = y < 0 ? 0 : y
//   sigmoid          a = p(y)                                               p(x) = 1 / (1 + e^-x)
//   dice_batch_norm  a = alpha y + p(v) (y - alpha y)              NaN where y is infinite, as torch's
//   dice             a = y (alpha + (1 - alpha) p(u)),   u = (y - mean) / s,
//                    s^2 = sum_j ((y_j - mean)^2 + epsilon)
//
// Dice's mean and sum run over the units of a row. |u| <= 1 always, so its sigmoid is a short polynomial.
// Backward, with da = dL/da and w = (1 - alpha) da y p (1 - p) = dL/du, since sum u = 0,
//
//   dL/dy = da (alpha + (1 - alpha) p) + (w - mean(w) - u sum_j w_j u_j) / s.
#pragma once

#include "cpu/dense/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

template <class A>
RK_INLINE int64_t vectors(int64_t n) {
  return (n + Traits<A>::lanes - 1) / Traits<A>::lanes;
}

// g -> y of one vector.
template <class A>
RK_INLINE typename Traits<A>::vec pre_activation(const LayerParams<A>& f, typename Traits<A>::vec g,
                                                 int64_t n) {
  using X = Traits<A>;
  return f.y_scale ? g * X::load(f.y_scale + n) + X::load(f.y_shift + n) : g;
}

// y of the first unit of a row.
template <class A>
RK_INLINE A first_unit(const LayerParams<A>& f, const A* g) {
  return f.y_scale ? g[0] * f.y_scale[0] + f.y_shift[0] : g[0];
}

// Calls each(row) -> vector on the rows of a group, and store(first row, their sums) on groups of as many
// rows as lanes.
template <class A, class Each, class Store>
RK_INLINE void sum_rows(int64_t rows, const Each& each, const Store& store) {
  using X = Traits<A>;
  for (int64_t r0 = 0; r0 < rows; r0 += X::lanes) {
    const int64_t group = rows - r0 < X::lanes ? rows - r0 : X::lanes;
    typename X::vec x[X::lanes];
    for (int64_t i = 0; i < group; ++i) x[i] = each(r0 + i);
    for (int64_t i = group; i < X::lanes; ++i) x[i] = typename X::vec{};
    store(r0, sum_each(x));
  }
}

// out[r] = sum_n x(r, n) w[n] + bias, x a vector at unit n < end.
template <class A, class Vector>
RK_INLINE void dot_rows(int64_t rows, int64_t end, const Vector& x, const A* w, A bias, A* out) {
  using X = Traits<A>;
  using V = typename X::vec;
  sum_rows<A>(
      rows,
      [&](int64_t r) __attribute__((always_inline)) {
        V sum = {};
        for (int64_t n = 0; n < end; n += X::lanes) sum += x(r, n) * X::load(w + n);
        return sum;
      },
      [&](int64_t r, V sum) __attribute__((always_inline)) {
        sum += bias;
        if (rows - r >= X::lanes)
          X::store(out + r, sum);
        else
          Tail<A>(static_cast<int>(rows - r)).store(out + r, sum);
      });
}

// Both sums in one pass, of c = y - k with k the row's first unit:
//
//   mean = k + sum c / H,   sum (y - mean)^2 = sum c^2 - (sum c)^2 / H
//
// Each (y_j - mean)^2 is at most their sum, k's too: sum c^2 is at most H + 1 times the difference, so the
// difference loses no more than that to rounding, and nothing to a mean that is large.
template <class A>
static void dice_statistics(LayerParams<A> f, int64_t rows, LayerScratch<A> s) {
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t ld = padded<A>(f.out), last = (f.out - 1) / X::lanes * X::lanes;  // 0 units: 0
  const V ones_mask = X::load(f.ones_mask + last);
  const A share = 1 / static_cast<A>(f.out);
  for (int64_t r0 = 0; r0 < rows; r0 += X::lanes) {
    const int64_t group = rows - r0 < X::lanes ? rows - r0 : X::lanes;
    V sum[X::lanes], squares[X::lanes], shift{};
    for (int64_t i = 0; i < group; ++i) {
      const A* g = s.g + (r0 + i) * ld;
      const A k = shift[i] = first_unit(f, g);
      V c = (pre_activation(f, X::load(g + last), last) - k) * ones_mask;
      sum[i] = c;
      squares[i] = c * c;
      for (int64_t n = 0; n < last; n += X::lanes) {
        c = pre_activation(f, X::load(g + n), n) - k;
        sum[i] += c;
        squares[i] += c * c;
      }
    }
    for (int64_t i = group; i < X::lanes; ++i) sum[i] = squares[i] = V{};
    const V c = sum_each(sum), along = c * share, all = sum_each(squares);
    const V deviation = all < static_cast<A>(__builtin_inf()) ? all - c * along
                                                              : all;  // infinity stays: no difference of two
    X::store(s.from_first + r0, along);
    X::store(s.mean + r0, shift + along);
    X::store(s.inverse + r0, inverse_root((deviation < 0 ? V{} : deviation) + f.epsilon));
  }
}

// What the last layer's activation goes into: value[r] = <a_r, weight> + bias.
template <class A>
struct Score {
  const A* weight;
  A bias, *value;  // null: a itself is wanted
};

// g -> a, or the score of it; with dice also its statistics unless they are known, and without need_a them
// alone.
template <class A>
static void activate(LayerParams<A> f, int64_t rows, LayerScratch<A> s, bool need_a,
                     bool statistics_known = false, Score<A> score = {}) {
  using X = Traits<A>;
  const int64_t ld = padded<A>(f.out), end = vectors<A>(f.out) * X::lanes;
  if (f.activation == Activation::dice && !statistics_known) dice_statistics(f, rows, s);
  if (!need_a) return;
  using V = typename X::vec;
  const auto each = [&](const auto& function) __attribute__((always_inline)) {
    const auto a = [&](int64_t r, int64_t n) __attribute__((always_inline)) {
      const V g = X::load(s.g + r * ld + n);
      return function(g, pre_activation(f, g, n), n, r);
    };
    if (score.value) return dot_rows<A>(rows, end, a, score.weight, score.bias, score.value);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < end; n += X::lanes) X::store(s.a + r * ld + n, a(r, n));
  };
  switch (f.activation) {
    case Activation::leaky:
      return each([&](V, V y, int64_t n, int64_t) { return y > 0 ? y : y * X::load(f.alpha + n); });
    case Activation::relu:
      return each([&](V, V y, int64_t, int64_t) { return relu(y); });
    case Activation::sigmoid:
      return each([&](V, V y, int64_t, int64_t) { return sigmoid(y); });
    case Activation::dice_batch_norm:
      return each([&](V g, V y, int64_t n, int64_t) {
        const V ay = y * X::load(f.alpha + n);
        return ay + sigmoid(g * X::load(f.v_scale + n) + X::load(f.v_shift + n)) * (y - ay);
      });
    case Activation::dice:
      return each([&](V, V y, int64_t n, int64_t r) {
        const V u = (y - s.mean[r] * X::load(f.ones_mask + n)) * s.inverse[r];
        const V alpha = X::load(f.alpha + n);
        return y * (alpha + (1 - alpha) * sigmoid_unit(u));
      });
  }
}

// What only the last layer's backward has: da = w_out dL/dscore, and w_out's gradient.
template <class A>
struct LastLayer {
  const A *grad_score, *out_weight;  // [rows], [padded(out)]; null: da is given
  A* grad_out_weight;                // or null
};

// Dice: d = dL/da -> da (alpha + (1 - alpha) p) + w / s in place; adds to alpha's gradient. The other terms
// of dL/dy are subtracted later, unit by unit; their factors mean(w) / s and sum(w u) / s^2 go to s.mean_w
// and s.along_units. Four rows at a time, so that the units' constants are read once for four of them.
template <bool kLast, class A>
static void dice_backward(LayerParams<A> f, int64_t rows, LayerScratch<A> s, A* d, A* grad_alpha,
                          LastLayer<A> top) {
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t ld = padded<A>(f.out), end = vectors<A>(f.out) * X::lanes;
  constexpr int kMost = X::lanes < 4 ? X::lanes : 4;
  V sum_w[X::lanes], sum_wu[X::lanes];
  const auto some_rows = [&](auto number, int64_t r0, int64_t i0) __attribute__((always_inline)) {
    constexpr int kRows = decltype(number)::value;
    const A *g = s.g + r0 * ld, *mean = s.mean + r0, *inverse = s.inverse + r0,
            *ds = kLast ? top.grad_score + r0 : nullptr;
    A* dp = d + r0 * ld;
    V w_of_row[kRows] = {}, wu_of_row[kRows] = {};
    for (int64_t n = 0; n < end; n += X::lanes) {
      const V alpha = X::load(f.alpha + n), beta = 1 - alpha, ones_mask = X::load(f.ones_mask + n),
              scale = f.y_scale ? X::load(f.y_scale + n) : V{} + 1,
              shift = f.y_scale ? X::load(f.y_shift + n) : V{};
      V out_weight = {}, to_alpha = {}, to_out_weight = {};
      if (kLast) out_weight = X::load(top.out_weight + n);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V y = X::load(g + r * ld + n) * scale + shift, u = (y - mean[r] * ones_mask) * inverse[r];
        const V p = sigmoid_unit(u), da = kLast ? ds[r] * out_weight : X::load(dp + r * ld + n);
        const V day = da * y, w = beta * day * (p - p * p), slope = alpha + beta * p;
        w_of_row[r] += w;
        wu_of_row[r] += w * u;
        to_alpha += day * (1 - p);
        if (kLast) to_out_weight += ds[r] * (y * slope);
        X::store(dp + r * ld + n, da * slope + w * inverse[r]);
      }
      X::store(grad_alpha + n, X::load(grad_alpha + n) + to_alpha);
      if (kLast && top.grad_out_weight)
        X::store(top.grad_out_weight + n, X::load(top.grad_out_weight + n) + to_out_weight);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum_w[i0 + r] = w_of_row[r], sum_wu[i0 + r] = wu_of_row[r];
  };
  for (int64_t r0 = 0; r0 < rows; r0 += X::lanes) {
    const int64_t group = rows - r0 < X::lanes ? rows - r0 : X::lanes;
    for (int64_t i = group; i < X::lanes; ++i) sum_w[i] = sum_wu[i] = V{};
    int64_t i = 0;
    for (; i + kMost <= group; i += kMost) some_rows(Int<kMost>(), r0 + i, i);
    for (; i < group; ++i) some_rows(Int<1>(), r0 + i, i);
    const V inverse = X::load(s.inverse + r0);
    X::store(s.mean_w + r0, sum_each(sum_w) * inverse / static_cast<A>(f.out));
    X::store(s.along_units + r0, sum_each(sum_wu) * inverse * inverse);
  }
}

// Unit by unit: d = dL/da (for dice what dice_backward left) -> dL/dz in place, unless only the sums are
// wanted; adds to the gradients of the bias (dL/dz), alpha and the sums.
template <Activation kind, bool kNormalized, class A>
static void units_backward(LayerParams<A> f, int64_t rows, LayerScratch<A> s, A* d, bool only_sums,
                           A* grad_bias, LayerGrad<A> grad) {
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t ld = padded<A>(f.out), end = vectors<A>(f.out) * X::lanes;
  const auto constant = [](const A* p, int64_t n) { return p ? X::load(p + n) : V{}; };
  for (int64_t n = 0; n < end; n += X::lanes) {
    const V y_scale = constant(f.y_scale, n), y_shift = constant(f.y_shift, n),
            v_scale = constant(f.v_scale, n), v_shift = constant(f.v_shift, n), alpha = constant(f.alpha, n),
            r = constant(f.r, n), c1 = constant(f.c1, n), c2 = constant(f.c2, n);
    V bias = {}, grad_alpha = {}, sum_y = {}, sum_yg = {}, sum_v = {}, sum_vg = {};
    for (int64_t row = 0; row < rows; ++row) {
      A* dp = d + row * ld + n;
      const V da = X::load(dp), g = X::load(s.g + row * ld + n), y = kNormalized ? y_scale * g + y_shift : g;
      V dy = da, dv = {};
      if (kind == Activation::leaky) {
        dy = y > 0 ? da : da * alpha;
        grad_alpha += y > 0 ? V{} : da * y;
      } else if (kind == Activation::relu) {
        dy = relu_backward(da, y);
      } else if (kind == Activation::sigmoid) {
        const V a = X::load(s.a + row * ld + n) * (1 - f.dropped);
        dy = da * (a - a * a);
      } else if (kind == Activation::dice) {
        dy = da - s.mean_w[row] - (y - s.mean[row]) * s.along_units[row];
      } else if (kind == Activation::dice_batch_norm) {
        const V p = sigmoid(v_scale * g + v_shift);
        dy = da * (alpha + (1 - alpha) * p);
        dv = (1 - alpha) * da * y * (p - p * p);
        grad_alpha += da * y * (1 - p);
      }
      if (kNormalized) {
        sum_y += dy;
        sum_yg += dy * g;
        dy *= y_scale;
        if (kind == Activation::dice_batch_norm) {
          sum_v += dv;
          sum_vg += dv * g;
          dy += dv * v_scale;
        }
        dy = r * (dy - c1 - c2 * g);
      }
      bias += dy;
      if (!only_sums) X::store(dp, dy);
    }
    const auto add = [&](A* p, V v) { X::store(p + n, X::load(p + n) + v); };
    if (!only_sums) add(grad_bias, bias);
    if (kind == Activation::leaky || kind == Activation::dice_batch_norm) add(grad.alpha, grad_alpha);
    if (kNormalized) {
      add(grad.sums[0], sum_y);
      add(grad.sums[1], sum_yg);
      add(grad.sums[2], sum_v);
      add(grad.sums[3], sum_vg);
    }
  }
}

// d = dL/da, of the last layer's Dice to be computed, -> dL/dz in place, or with only_sums nothing but the
// sums.
template <class A>
static void activation_backward(LayerParams<A> f, int64_t rows, LayerScratch<A> s, A* d, bool only_sums,
                                A* grad_bias, LayerGrad<A> grad, LastLayer<A> top = {}) {
  using Kind = Activation;
  switch (f.activation) {
    case Kind::leaky:
      return f.r ? units_backward<Kind::leaky, true>(f, rows, s, d, only_sums, grad_bias, grad)
                 : units_backward<Kind::leaky, false>(f, rows, s, d, only_sums, grad_bias, grad);
    case Kind::relu:
      return f.r ? units_backward<Kind::relu, true>(f, rows, s, d, only_sums, grad_bias, grad)
                 : units_backward<Kind::relu, false>(f, rows, s, d, only_sums, grad_bias, grad);
    case Kind::sigmoid:
      return f.r ? units_backward<Kind::sigmoid, true>(f, rows, s, d, only_sums, grad_bias, grad)
                 : units_backward<Kind::sigmoid, false>(f, rows, s, d, only_sums, grad_bias, grad);
    case Kind::dice_batch_norm:
      return units_backward<Kind::dice_batch_norm, true>(f, rows, s, d, only_sums, grad_bias, grad);
    case Kind::dice:
      top.grad_score ? dice_backward<true>(f, rows, s, d, grad.alpha, top)
                     : dice_backward<false>(f, rows, s, d, grad.alpha, top);
      return f.r ? units_backward<Kind::dice, true>(f, rows, s, d, only_sums, grad_bias, grad)
                 : units_backward<Kind::dice, false>(f, rows, s, d, only_sums, grad_bias, grad);
  }
}

}  // namespace RK_ISA
}  // namespace rk
