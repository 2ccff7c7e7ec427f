// From the parameters of DIN attention to the operands of its kernels: precision, layout and folded
// normalizations.
//
// A normalization is an affine function of each channel once its mean m and variance are known, and is folded
// into the product before it: forward g = y; backward g = n = (z - m) r, r = 1 / sqrt(var + eps), which the
// gradient needs. With own normalization (weight gamma, bias beta) y = gamma n + beta; Dice's (gamma', beta',
// m', r') gives v = gamma' (y - m') r' + beta'. Where both take the batch's statistics, those of y follow
// from those of z: m' = beta, var' = gamma^2 var / (var + eps).
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/dense/layer_params.h"
#include "cpu/din_attention/params.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/values.h"
#include "cpu/simd/operand.h"

namespace rk {

// The flags of the schema.
struct DinConfig {
  ActivationName activation;
  bool batch_norm, use_softmax, count_padding, return_scores, training;
  double norm_eps, dice_eps, dropout;
  uint64_t seed;
  std::string group;

  bool keeps_dice() const { return training && activation == ActivationName::dice; }
  bool dice_norm() const { return activation == ActivationName::dice_batch_norm; }
  int64_t norms() const { return batch_norm + dice_norm(); }
  int64_t activation_params() const {
    return dice_norm() ? 3 : activation == ActivationName::prelu || activation == ActivationName::dice;
  }
  int64_t params_per_layer() const { return 2 + 2 * batch_norm + activation_params(); }
};

// A batch normalization of H channels: parameters and biased statistics.
struct BatchNorm {
  std::vector<double> weight, bias, mean, var;
  double eps;

  double inverse(int64_t h) const { return 1 / std::sqrt(var[h] + eps); }
};

template <class A>
struct HiddenParams {
  int64_t in, out;
  std::vector<A> weight, bias, alpha;
  BatchNorm own, dice;  // empty where there is none
};

template <class A>
class FoldedNetwork {
 public:
  FoldedNetwork(const DinConfig& config, int64_t D, const std::vector<Tensor>& params) : config_(config) {
    auto param = params.begin();
    const auto norm = [&](double eps) {
      const auto weight = values_of<double>(*param++), bias = values_of<double>(*param++);
      return BatchNorm{weight, bias, {}, {}, eps};
    };
    while (params.end() - param > 2) {
      HiddenParams<A> hidden{};
      hidden.in = param->size(1);
      hidden.out = param->size(0);
      hidden.weight = values_of<A>(*param++);
      hidden.bias = values_of<A>(*param++);
      if (config.batch_norm) hidden.own = norm(config.norm_eps);
      if (config.activation_params()) hidden.alpha = values_of<A>(*param++);
      if (config.dice_norm()) hidden.dice = norm(config.dice_eps);
      hidden_.push_back(std::move(hidden));
    }
    no_hidden_ = hidden_.empty();
    if (no_hidden_) {  // the output layer alone: a linear hidden layer of one unit
      config_.activation = ActivationName::linear;
      hidden_.push_back({4 * D, 1, values_of<A>(param[0]), values_of<A>(param[1]), {}, {}, {}});
    }
    net_.D = D;
    net_.layers = static_cast<int64_t>(hidden_.size());
    net_.use_softmax = config.use_softmax;
    net_.drops = config.dropout > 0 && !no_hidden_;
    net_.dropout = {config.seed, static_cast<int32_t>(std::nearbyint(config.dropout * (1 << 24))),
                    static_cast<A>(config.dropout < 1 ? 1 / (1 - config.dropout) : 0)};
    layers_.resize(hidden_.size());
    net_.layer = layers_.data();
    net_.out_weight = arena_.row(no_hidden_ ? std::vector<A>{A(1)} : values_of<A>(param[0]));
    net_.out_bias = no_hidden_ ? A(0) : values_of<A>(param[1])[0];
    for (size_t i = 0; i < hidden_.size(); ++i) fixed_part(layers_[i], hidden_[i]);
  }

  int64_t layers() const { return net_.layers; }
  bool no_hidden() const { return no_hidden_; }
  bool has_norm() const { return config_.norms() > 0 && !no_hidden_; }
  Din<A>& net() { return net_; }
  HiddenParams<A>& hidden(int64_t i) { return hidden_[i]; }
  LayerParams<A>& layer(int64_t i) { return layers_[i]; }

  // The statistics of layer i's z in training: biased, over all valid rows.
  void set_batch_statistics(int64_t i, const std::vector<double>& mean, const std::vector<double>& var) {
    HiddenParams<A>& f = hidden_[i];
    BatchNorm& of_z = config_.batch_norm ? f.own : f.dice;
    of_z.mean = mean;
    of_z.var = var;
    if (!config_.batch_norm || !config_.dice_norm()) return;
    f.dice.mean = f.own.bias;
    f.dice.var.resize(f.out);
    for (int64_t h = 0; h < f.out; ++h)
      f.dice.var[h] = f.own.weight[h] * f.own.weight[h] * var[h] / (var[h] + f.own.eps);
  }

  // Operands of the forward product of layer i. Before its statistics are known: g = z.
  void fold_forward(int64_t i, bool statistics_known = true) {
    const HiddenParams<A>& f = hidden_[i];
    LayerParams<A>& layer = layers_[i];
    std::vector<double> scale(f.out, 1), shift(f.out, 0), v_scale(f.out), v_shift(f.out);
    if (statistics_known && has_norm()) {
      for (int64_t h = 0; h < f.out; ++h) {
        if (config_.batch_norm) {
          scale[h] = f.own.weight[h] * f.own.inverse(h);
          shift[h] = f.own.bias[h] - f.own.mean[h] * scale[h];
        }
        if (config_.dice_norm()) {
          v_scale[h] = f.dice.weight[h] * f.dice.inverse(h);
          v_shift[h] = f.dice.bias[h] - f.dice.mean[h] * v_scale[h];
        }
      }
      if (config_.dice_norm()) {
        layer.v_scale = arena_.row(v_scale);
        layer.v_shift = arena_.row(v_shift);
      }
    }
    fold(i, scale, shift);
  }

  // Operands of the backward: g = n, and the products by W's rows.
  void fold_backward(int64_t i) {
    const HiddenParams<A>& f = hidden_[i];
    LayerParams<A>& layer = layers_[i];
    std::vector<double> scale(f.out, 1), shift(f.out, 0), y_scale, y_shift, v_scale(f.out), v_shift(f.out);
    if (has_norm()) {
      const BatchNorm& of_z = config_.batch_norm ? f.own : f.dice;
      y_scale = of_z.weight;
      y_shift = of_z.bias;
      for (int64_t h = 0; h < f.out; ++h) {
        scale[h] = of_z.inverse(h);
        shift[h] = -of_z.mean[h] * scale[h];
        if (!config_.dice_norm()) continue;
        if (config_.batch_norm) {
          v_scale[h] = f.dice.weight[h] * f.dice.inverse(h) * f.own.weight[h];
          v_shift[h] =
              f.dice.weight[h] * f.dice.inverse(h) * (f.own.bias[h] - f.dice.mean[h]) + f.dice.bias[h];
        } else {
          v_scale[h] = f.dice.weight[h];
          v_shift[h] = f.dice.bias[h];
          y_scale[h] = 1 / scale[h];
          y_shift[h] = of_z.mean[h];
        }
      }
      layer.r = arena_.row(scale);
      layer.c1 = layer.c2 = arena_.take(padded<A>(f.out));
      layer.y_scale = arena_.row(y_scale);
      layer.y_shift = arena_.row(y_shift);
      if (config_.dice_norm()) {
        layer.v_scale = arena_.row(v_scale);
        layer.v_shift = arena_.row(v_shift);
      }
    }
    fold(i, scale, shift);
    const int64_t ld = padded<A>(i == 0 ? net_.D : f.in);
    if (i > 0) {
      A* rows = arena_.take(f.out * ld);
      for (int64_t h = 0; h < f.out; ++h)
        for (int64_t k = 0; k < f.in; ++k) rows[h * ld + k] = f.weight[h * f.in + k];
      layer.weight_rows = rows;
    } else {
      first_layer_parts(std::vector<double>(f.out, 1), ld, 1, &net_.target_rows, &net_.history_rows,
                        &net_.product_rows);
    }
  }

  // From the sums over N rows that a layer's backward left (see LayerGrad::sums): c1 and c2.
  void set_backward_sums(int64_t i, const A* const (&sums)[4], double N) {
    const HiddenParams<A>& f = hidden_[i];
    std::vector<double> c1(f.out), c2(f.out);
    for (int64_t h = 0; h < f.out; ++h) {
      if (config_.batch_norm) {
        c1[h] = f.own.weight[h] * sums[0][h] / N;
        c2[h] = f.own.weight[h] * sums[1][h] / N;
      }
      if (config_.dice_norm()) {
        const double kappa = config_.batch_norm ? f.own.weight[h] * f.dice.inverse(h) : 1;
        const double left = config_.batch_norm ? f.own.eps / (f.own.var[h] + f.own.eps) : 0;
        c1[h] += kappa * f.dice.weight[h] * sums[2][h] / N;
        c2[h] += kappa * f.dice.weight[h] * sums[3][h] * (1 + kappa * kappa * left) / N;
      }
    }
    layers_[i].c1 = arena_.row(c1);
    layers_[i].c2 = arena_.row(c2);
  }

  // Gradients of the normalizations' parameters from the same sums.
  void norm_gradients(int64_t i, const A* const (&sums)[4], std::vector<double> (&own)[2],
                      std::vector<double> (&dice)[2]) {
    const HiddenParams<A>& f = hidden_[i];
    for (int64_t h = 0; h < f.out; ++h) {
      const double y = sums[0][h], yn = sums[1][h], v = sums[2][h], vn = sums[3][h];
      if (config_.batch_norm) {
        double weight = yn, bias = y;
        if (config_.dice_norm()) {
          const double r = f.dice.inverse(h), through = r * f.dice.weight[h];
          if (config_.training) {
            const double kappa = f.own.weight[h] * r, rho = f.own.var[h] / (f.own.var[h] + f.own.eps);
            weight += through * vn * (1 - kappa * kappa * rho);
          } else {
            weight += through * vn;
            bias += through * v;
          }
        }
        own[0].push_back(weight);
        own[1].push_back(bias);
      }
      if (config_.dice_norm()) {
        const double weight =
            config_.batch_norm
                ? f.dice.inverse(h) * (f.own.weight[h] * vn + (f.own.bias[h] - f.dice.mean[h]) * v)
                : vn;
        dice[0].push_back(weight);
        dice[1].push_back(v);
      }
    }
  }

 private:
  void fixed_part(LayerParams<A>& layer, const HiddenParams<A>& f) {
    layer.in = f.in;
    layer.out = f.out;
    layer.dropped = static_cast<A>(net_.drops ? config_.dropout : 0);
    layer.ones_mask = arena_.row(std::vector<A>(f.out, A(1)));
    layer.epsilon = static_cast<A>(f.out * config_.dice_eps);
    std::vector<A> alpha = f.alpha;
    switch (config_.activation) {
      case ActivationName::relu:
        layer.activation = Activation::relu;
        break;
      case ActivationName::sigmoid:
        layer.activation = Activation::sigmoid;
        break;
      case ActivationName::dice:
        layer.activation = Activation::dice;
        break;
      case ActivationName::dice_batch_norm:
        layer.activation = Activation::dice_batch_norm;
        break;
      default:
        layer.activation = Activation::leaky;
        if (config_.activation == ActivationName::linear) alpha = {A(1)};
        if (config_.activation == ActivationName::leakyrelu) alpha = {A(0.01)};
    }
    if (alpha.size() == 1) alpha.resize(f.out, alpha[0]);  // one for all units
    layer.alpha = arena_.row(alpha);
  }

  // scale (Wt + Wd), scale (Wh - Wd) and scale Wp with unit h and column d at h * stride_h + d * stride_d.
  void first_layer_parts(const std::vector<double>& scale, int64_t stride_h, int64_t stride_d,
                         const A** target, const A** history, const A** product) {
    const HiddenParams<A>& f = hidden_[0];
    const int64_t D = net_.D, size = stride_h > stride_d ? f.out * stride_h : operand_size<A>(D, f.out);
    A *t = arena_.take(size), *h_ = arena_.take(size), *p = arena_.take(size);
    for (int64_t h = 0; h < f.out; ++h) {
      const A *w = f.weight.data() + h * 4 * D, s = static_cast<A>(scale[h]);
      for (int64_t d = 0; d < D; ++d) {
        const int64_t i = h * stride_h + d * stride_d;
        t[i] = s * (w[d] + w[2 * D + d]);
        h_[i] = s * (w[D + d] - w[2 * D + d]);
        p[i] = s * w[3 * D + d];
      }
    }
    if (stride_h == 1)
      for (A* operand : {t, h_, p}) copy_tail(operand, D, f.out);
    *target = t;
    *history = h_;
    *product = p;
  }

  void fold(int64_t i, const std::vector<double>& scale, const std::vector<double>& shift) {
    const HiddenParams<A>& f = hidden_[i];
    LayerParams<A>& layer = layers_[i];
    layer.g_scale = arena_.row(scale);
    layer.g_shift = arena_.row(shift);
    std::vector<double> bias(f.out);
    for (int64_t h = 0; h < f.out; ++h) bias[h] = scale[h] * f.bias[h] + shift[h];
    layer.bias = arena_.row(bias);
    const int64_t ld = padded<A>(f.out);
    if (i == 0)
      return first_layer_parts(scale, 1, ld, &net_.target_weight, &net_.history_weight, &net_.product_weight);
    A* weight = arena_.take(operand_size<A>(f.in, f.out));
    for (int64_t h = 0; h < f.out; ++h)
      for (int64_t k = 0; k < f.in; ++k)
        weight[k * ld + h] = static_cast<A>(scale[h]) * f.weight[h * f.in + k];
    copy_tail(weight, f.in, f.out);
    layer.weight = weight;
  }

  DinConfig config_;
  bool no_hidden_ = false;
  std::vector<HiddenParams<A>> hidden_;
  std::vector<LayerParams<A>> layers_;
  Arena<A> arena_;
  Din<A> net_{};
};

}  // namespace rk
