// Passes, threads and registration of DIN attention; the kernels and their mathematics are in
// forward_kernel.h, the preparation of the parameters in folded_network.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/dense/layer_params.h"
#include "cpu/dense/statistics.h"
#include "cpu/din_attention/checks.h"
#include "cpu/din_attention/folded_network.h"
#include "cpu/din_attention/geometry.h"
#include "cpu/din_attention/params.h"
#include "cpu/din_attention/segments.h"
#include "cpu/din_attention/workspace.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/values.h"
#include "cpu/simd/accumulator.h"
#include "cpu/simd/operand.h"
#include "stable/check.h"

namespace rk {
namespace {

template <class T>
DinRows<T> rows_of(const Tensor& history, const Tensor& target, const DinGeometry& g) {
  DinRows<T> rows{};
  rows.history = static_cast<const T*>(history.const_data_ptr());
  rows.target = static_cast<const T*>(target.const_data_ptr());
  rows.jagged = history.dim() == 2;
  rows.stride_hb = history.stride(0);
  rows.stride_hl = history.stride(history.dim() - 2);
  rows.stride_tb = target.stride(0);
  rows.first = g.first.data();
  rows.place = g.place();
  if (g.shared()) {
    rows.sample = g.sample.data();
    rows.user = g.user.data();
  }
  rows.count = g.count.data();
  rows.pooled = g.pooled.empty() ? nullptr : g.pooled.data();
  rows.mask = g.mask.defined() ? static_cast<const uint8_t*>(g.mask.const_data_ptr()) : nullptr;
  return rows;
}

// Calls body(row, place) for all rows computed, with their places among the scores returned.
template <class Body>
void for_each_score(const DinGeometry& g, const Body& body) {
  for (size_t b = 0; b < g.count.size(); ++b) {
    const int64_t first = g.first[b], score = g.shared() ? g.score_place[b] : first;
    for_each_row(g, b, [&](int64_t row, int64_t place) { body(first + row, score + place); });
  }
}

// The weights of rows as the op returns them, 0 for the rows that are not there; and their gradient's way
// back.
template <class A>
void scores_of_rows(const DinGeometry& g, const A* row_weight, Tensor& scores) {
  std::vector<A> places(scores.numel());
  for_each_score(g, [&](int64_t row, int64_t place) { places[place] = row_weight[row]; });
  with_values(scores.scalar_type(), [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    std::copy(places.begin(), places.end(), static_cast<P*>(scores.mutable_data_ptr()));
  });
}
template <class A>
std::vector<A> rows_of_scores(const DinGeometry& g, const Tensor& scores) {
  const std::vector<A> places = values_of<A>(scores);
  std::vector<A> rows(places.size());
  for_each_score(g, [&](int64_t row, int64_t place) { rows[row] = places[place]; });
  return rows;
}

// ---- forward

// What training keeps of a row for the backward: Dice's two statistics of each layer, and z of the normalized
// layers, of the first where all widths together are at most the concatenation's 4 D. Autograd keeps some
// nine values a unit of the composed attention, and the concatenation: so this is at most a tenth of that.
int64_t first_kept(const DinArguments& a) {
  int64_t widths = 0;
  for (int64_t i = 0; i < a.layers(); ++i) widths += a.width(i);
  return widths > 4 * a.D();
}

int64_t kept_widths(const DinArguments& a) {
  if (!a.config.training) return 0;
  int64_t widths = a.config.keeps_dice() ? 2 * a.layers() : 0;
  if (a.config.norms() > 0)
    for (int64_t i = first_kept(a); i < a.layers(); ++i) widths += a.width(i);
  return widths;
}

int64_t saved_size(const DinArguments& a, const DinGeometry& g) {
  return g.first.back() * (1 + kept_widths(a)) + a.joint();
}

int64_t stats_size(const DinArguments& a) {
  int64_t widths = 0;
  for (int64_t i = 0; a.config.training && i < a.layers(); ++i) widths += a.width(i);
  return 2 * a.config.norms() * widths;
}

// The pooled rows' [B, D], or the scores' sizes: [B, L], or of all samples with offsets.
std::vector<int64_t> out_sizes(const DinArguments& a, const DinGeometry& g) {
  if (!a.config.return_scores) return {a.B(), a.D()};
  if (a.offsets) return {g.first.back()};
  return {a.B(), a.history.size(1)};
}

// Lays out `saved`: the rows' weights, what is kept of each layer, and where joint statistics' count is.
template <class A>
A* place_saved(FoldedNetwork<A>& network, const DinArguments& a, int64_t rows, A* saved) {
  network.net().row_weight = saved;
  saved += rows;
  if (a.config.keeps_dice())
    for (int64_t i = 0; i < a.layers(); ++i) {
      network.layer(i).kept_from_first = saved;
      network.layer(i).kept_inverse = saved + rows;
      saved += 2 * rows;
    }
  if (!a.config.training || a.config.norms() == 0) return saved;
  for (int64_t i = first_kept(a); i < a.layers(); ++i) {
    network.layer(i).kept = saved;
    saved += rows * network.layer(i).out;
  }
  return saved;
}

template <class A>
void set_running_statistics(FoldedNetwork<A>& network, const DinArguments& a) {
  auto stats = a.running_stats.begin();
  for (int64_t i = 0; i < a.layers(); ++i) {
    for (auto* norm : {a.config.batch_norm ? &network.hidden(i).own : nullptr,
                       a.config.dice_norm() ? &network.hidden(i).dice : nullptr}) {
      if (!norm) continue;
      norm->mean = values_of<double>(*stats++);
      norm->var = values_of<double>(*stats++);
    }
  }
}

// Statistics of layer i's z over all valid rows, into the network and batch_stats; joint ones' `count`, too.
template <class T, class A = Accumulator<T>>
void accumulate_statistics(FoldedNetwork<A>& network, const DinArguments& a, const DinGeometry& g,
                           const DinChunks& chunks, const DinRows<T>& rows, int64_t i, A*& batch_stats,
                           A* count) {
  const int64_t H = network.layer(i).out, ld = padded<double>(H) + 16;
  std::vector<double> memory(chunks.size() * 2 * ld);
  std::vector<ColumnStats> stats(chunks.size());
  for (size_t c = 0; c < stats.size(); ++c) stats[c] = {0, &memory[2 * c * ld], &memory[(2 * c + 1) * ld]};
  network.fold_forward(i, /*statistics_known=*/false);
  chunks.parallel_for([&](int64_t c0, int64_t c1) {
    DinWorkspace<A> workspace(network.net(), g, false);
    for (int64_t c = c0; c < c1; ++c)
      RK_DISPATCH_ISA(din_forward<T>, {network.net(), rows, i}, chunks.samples(c, c + 1), workspace.scratch,
                      &stats[c]);
  });
  MergedStats all(stats, H);
  if (a.joint()) {
    all = joined(a.config.group, all, a.history);
    check_valid_rows(all.count);
    *count = static_cast<A>(all.count);
  }
  std::vector<double> var(H);
  for (int64_t h = 0; h < H; ++h) var[h] = all.deviation[h] / std::max(all.count, 1.);
  network.set_batch_statistics(i, all.mean, var);
  if (all.count == 0) {  // an update with the running ones leaves them as they are
    for (int64_t j = 2 * a.config.norms() * i; j < 2 * a.config.norms() * (i + 1); ++j) {
      const auto kept = values_or_zeros<A>(a.has_running_stats() ? &a.running_stats[j] : nullptr, H);
      batch_stats = std::copy(kept.begin(), kept.end(), batch_stats);
    }
    return;
  }
  for (const auto* norm : {a.config.batch_norm ? &network.hidden(i).own : nullptr,
                           a.config.dice_norm() ? &network.hidden(i).dice : nullptr}) {
    if (!norm) continue;
    batch_stats = std::copy(norm->mean.begin(), norm->mean.end(), batch_stats);
    for (const double v : norm->var) *batch_stats++ = static_cast<A>(v * (all.count / (all.count - 1)));
  }
}

template <class T, class A = Accumulator<T>>
void forward(const DinArguments& a, const DinGeometry& g, Tensor& out, Tensor& batch_stats, Tensor& saved) {
  FoldedNetwork<A> network(a.config, a.D(), a.params);
  A* const count = place_saved(network, a, g.first.back(), static_cast<A*>(saved.mutable_data_ptr()));
  const Tensor history = unit_stride_last(a.history), target = unit_stride_last(a.target);
  DinRows<T> rows = rows_of<T>(history, target, g);
  rows.out = a.config.return_scores ? nullptr : static_cast<T*>(out.mutable_data_ptr());
  const DinChunks chunks(network.net(), g);
  A* stats = static_cast<A*>(batch_stats.mutable_data_ptr());
  if (!a.config.training) set_running_statistics(network, a);
  for (int64_t i = 0; i < network.layers(); ++i) {
    if (a.config.training && network.has_norm())
      accumulate_statistics(network, a, g, chunks, rows, i, stats, count);
    network.fold_forward(i);
  }
  chunks.parallel_for([&](int64_t c0, int64_t c1) {
    DinWorkspace<A> workspace(network.net(), g, false);
#if defined(RK_HAS_AVX512_BF16)
    // Not in training: its statistics go on into float32, and its backward computes some of z again.
    if constexpr (std::is_same_v<T, bf16>)
      if (!a.config.training && isa() == Isa::avx512_bf16)
        return avx512_bf16::din_forward<T>({network.net(), rows, network.layers()}, chunks.samples(c0, c1),
                                           workspace.scratch, nullptr);
#endif
    RK_DISPATCH_ISA(din_forward<T>, {network.net(), rows, network.layers()}, chunks.samples(c0, c1),
                    workspace.scratch, nullptr);
  });
  if (a.config.return_scores) scores_of_rows(g, network.net().row_weight, out);
}

// ---- backward

// One pass over the rows; returns the sums of all ranges, in order.
template <class T, class A = Accumulator<T>>
std::unique_ptr<PartialGrads<A>> backward_pass(FoldedNetwork<A>& network, const DinGeometry& g,
                                               const DinChunks& chunks, const DinRows<T>& rows, int64_t until,
                                               bool need_score) {
  std::vector<std::unique_ptr<PartialGrads<A>>> partial(chunks.size());
  chunks.parallel_for([&](int64_t c0, int64_t c1) {
    DinWorkspace<A> workspace(network.net(), g, true);
    partial[c0] = std::make_unique<PartialGrads<A>>(network.net());
    RK_DISPATCH_ISA(din_backward<T>, {network.net(), rows, until, need_score}, chunks.samples(c0, c1),
                    workspace.scratch, partial[c0]->grad);
  });
  auto sum = std::make_unique<PartialGrads<A>>(network.net());
  for (const auto& p : partial)
    if (p) *sum += *p;
  return sum;
}

// A layer's sums over rows (see LayerGrad::sums), those of its normalizations, over all processes of the
// group.
template <class A>
void join_sums(const DinArguments& a, int64_t H, A* const (&sums)[4]) {
  const int64_t first = a.config.batch_norm ? 0 : 2, end = a.config.dice_norm() ? 4 : 2;
  std::vector<double> values;
  for (int64_t k = first; k < end; ++k) values.insert(values.end(), sums[k], sums[k] + H);
  values = sum_over_ranks(a.config.group, values, a.history);
  for (int64_t k = first; k < end; ++k) std::copy_n(values.begin() + (k - first) * H, H, sums[k]);
}

// The parameters' gradients in the order of the schema: of the rows of this process.
template <class A>
std::vector<Tensor> param_gradients(FoldedNetwork<A>& network, const DinArguments& a,
                                    const PartialGrads<A>& sum) {
  std::vector<Tensor> grads;
  const int64_t D = a.D();
  const auto push = [&](const auto& value) { grads.push_back(gradient_of(a.params[grads.size()], value)); };
  const auto push_vector = [&](const auto& values) { push([&](int64_t i) { return values[i]; }); };
  for (int64_t i = 0; i < network.layers(); ++i) {
    const LayerGrad<A>& grad = sum.layers[i];
    const int64_t in = network.layer(i).in, ld = padded<A>(i == 0 ? D : in);
    if (i == 0)
      push([&](int64_t j) {
        const int64_t part = j % in / D, k = j / in * ld + j % D;
        return part == 0   ? grad.weight_target[k]
               : part == 1 ? grad.weight[k]
               : part == 2 ? grad.weight_target[k] - grad.weight[k]
                           : grad.weight_product[k];
      });
    else
      push([&](int64_t j) { return grad.weight[j / in * ld + j % in]; });
    if (a.config.training && a.config.batch_norm && !network.no_hidden())
      push([](int64_t) { return A(0); });  // the normalization takes the mean away, and any bias with it
    else
      push_vector(grad.bias);
    if (network.no_hidden()) return grads;
    std::vector<double> own[2], dice[2];
    network.norm_gradients(i, grad.sums, own, dice);
    if (a.config.batch_norm)
      for (const auto& values : own) push_vector(values);
    if (a.config.activation_params()) {
      A all = 0;
      for (int64_t h = 0; h < network.layer(i).out; ++h) all += grad.alpha[h];
      const bool one = network.hidden(i).alpha.size() == 1;
      push([&](int64_t h) { return one ? all : grad.alpha[h]; });
    }
    if (a.config.dice_norm())
      for (const auto& values : dice) push_vector(values);
  }
  push_vector(sum.grad.out_weight);
  push([&](int64_t) { return a.config.use_softmax ? A(0) : *sum.grad.out_bias; });  // a softmax ignores it
  return grads;
}

template <class T, class A = Accumulator<T>>
std::vector<Tensor> backward(const DinArguments& a, const DinGeometry& g, const Tensor& grad_out,
                             const Tensor& batch_stats, const Tensor& saved, Tensor& grad_history,
                             Tensor& grad_target) {
  FoldedNetwork<A> network(a.config, a.D(), a.params);
  const int64_t last = network.layers() - 1;
  const Tensor saved_ = torch::stable::contiguous(saved), grad = unit_stride_last(grad_out);
  const A* const count = place_saved(network, a, g.first.back(), static_cast<A*>(saved_.data_ptr()));
  std::vector<A> grad_score(g.first.back());
  network.net().grad_score = grad_score.data();
  const Tensor history = unit_stride_last(a.history), target = unit_stride_last(a.target);
  DinRows<T> rows = rows_of<T>(history, target, g);
  std::vector<A> grad_weight;
  if (a.config.return_scores) {
    grad_weight = rows_of_scores<A>(g, grad_out);
    rows.grad_weight = grad_weight.data();
  } else {
    rows.grad_out = static_cast<const T*>(grad.const_data_ptr());
    rows.stride_gb = grad.stride(0);
  }
  rows.grad_history = static_cast<T*>(grad_history.mutable_data_ptr());
  const DinChunks chunks(network.net(), g);
  const DinSegments<A> segments(chunks, g, a.D());
  rows.segment = segments.of_samples();
  rows.segment_sum = segments.sums();
  rows.grad_target = static_cast<T*>(grad_target.mutable_data_ptr());
  const bool batch_statistics = a.config.training && network.has_norm();
  const double valid = std::max<double>(a.joint() ? *count : g.valid, 1);  // of none, sums of nothing
  if (!a.config.training) set_running_statistics(network, a);
  const std::vector<double> all_stats = values_of<double>(batch_stats);
  const double* stats = all_stats.data();
  for (int64_t i = 0; i <= last; ++i) {
    if (batch_statistics) {
      const int64_t H = network.layer(i).out;
      std::vector<double> mean(stats, stats + H), var(stats + H, stats + 2 * H);
      for (double& v : var) v *= (valid - 1) / valid;
      network.set_batch_statistics(i, mean, var);
      stats += 2 * H * a.config.norms();
    }
    network.fold_backward(i);
  }
  bool need_score = true;
  for (int64_t i = last; batch_statistics && i >= 0; --i, need_score = false) {
    const auto pass = backward_pass(network, g, chunks, rows, i, need_score);
    if (a.joint()) join_sums(a, network.layer(i).out, pass->layers[i].sums);
    network.set_backward_sums(i, pass->layers[i].sums, valid);
  }
  const auto sum = backward_pass(network, g, chunks, rows, -1, need_score);
  if (a.history_index) {
    clear_unused_histories(a, g, rows.grad_history);
    add_segments(g, segments, a.D(), grad_history);
  }
  return param_gradients(network, a, *sum);
}

// ---- ops

std::tuple<Tensor, Tensor, Tensor> din_attention_cpu(
    const Tensor& history, const Tensor& target, const OptionalTensor& lengths, const OptionalTensor& mask,
    const OptionalTensor& offsets, const OptionalTensor& history_index, const std::vector<Tensor>& params,
    const std::vector<Tensor>& running_stats, int64_t activation, bool batch_norm, bool use_softmax,
    bool count_padding, bool return_scores, bool training, double norm_eps, double dice_eps, double dropout,
    const OptionalTensor& seed, const std::string& group) {
  const DinArguments a = arguments(history, target, lengths, mask, offsets, history_index, params,
                                   running_stats, activation, batch_norm, use_softmax, count_padding,
                                   return_scores, training, norm_eps, dice_eps, dropout, seed, group);
  const DinGeometry g = geometry_of(a);
  Tensor out = torch::stable::new_empty(target, out_sizes(a, g));
  Tensor batch_stats =
      torch::stable::new_empty(target, {stats_size(a)}, accumulator_dtype(dtype_of(history)));
  Tensor saved = new_empty_paged(target, {saved_size(a, g)}, accumulator_dtype(dtype_of(history)));
  dispatch_floating(history.scalar_type(), [&](auto* type) {
    forward<std::remove_pointer_t<decltype(type)>>(a, g, out, batch_stats, saved);
  });
  return {out, batch_stats, saved};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> din_attention_backward_cpu(
    const Tensor& grad_out, const Tensor& batch_stats, const Tensor& saved, const Tensor& history,
    const Tensor& target, const OptionalTensor& lengths, const OptionalTensor& mask,
    const OptionalTensor& offsets, const OptionalTensor& history_index, const std::vector<Tensor>& params,
    const std::vector<Tensor>& running_stats, int64_t activation, bool batch_norm, bool use_softmax,
    bool count_padding, bool return_scores, bool training, double norm_eps, double dice_eps, double dropout,
    const OptionalTensor& seed, const std::string& group) {
  const DinArguments a = arguments(history, target, lengths, mask, offsets, history_index, params,
                                   running_stats, activation, batch_norm, use_softmax, count_padding,
                                   return_scores, training, norm_eps, dice_eps, dropout, seed, group);
  const DinGeometry g = geometry_of(a);
  const int64_t B = a.B(), D = a.D();
  const ScalarType kept = accumulator_dtype(dtype_of(history));
  check_form("din_attention_backward", "grad_out", grad_out, out_sizes(a, g), dtype_of(history));
  check_form("din_attention_backward", "batch_stats", batch_stats, {stats_size(a)}, kept);
  check_form("din_attention_backward", "saved", saved, {saved_size(a, g)}, kept);
  Tensor grad_history = new_empty_paged(history, history.sizes());
  Tensor grad_target = torch::stable::new_empty(target, {B, D});
  std::vector<Tensor> grad_params;
  dispatch_floating(history.scalar_type(), [&](auto* type) {
    grad_params = backward<std::remove_pointer_t<decltype(type)>>(a, g, grad_out, batch_stats, saved,
                                                                  grad_history, grad_target);
  });
  return {grad_history, grad_target, grad_params};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("din_attention", TORCH_BOX(&rk::din_attention_cpu));
  m.impl("din_attention_backward", TORCH_BOX(&rk::din_attention_backward_cpu));
}
