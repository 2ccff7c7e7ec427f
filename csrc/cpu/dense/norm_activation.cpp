// Checks, statistics, threads and registration of normalization and activation; the kernels and their
// mathematics are in norm_activation_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dense/layer_params.h"
#include "cpu/dense/statistics.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/values.h"
#include "cpu/simd/accumulator.h"
#include "cpu/simd/operand.h"
#include "stable/check.h"

namespace rk {
namespace {

struct NormArguments {
  const Tensor& x;
  const OptionalTensor &weight, &bias, &alpha, &running_mean, &running_var;
  ActivationName activation;
  bool batch_norm, training;
  double norm_eps, dice_eps;

  int64_t N() const { return x.size(0); }
  int64_t H() const { return x.size(1); }
  bool has_alpha() const { return activation >= ActivationName::prelu; }
  bool batch_statistics() const { return batch_norm && training; }
};

#define RK_NORM_CHECK(condition, ...) RK_CHECK(condition, "norm_activation: ", __VA_ARGS__)

// The texts are those of ops/norm_activation.py.
void check(const NormArguments& a) {
  const Tensor& x = a.x;
  check_activation("norm_activation", a.activation);
  RK_CHECK_DIM("norm_activation", x, 2);
  RK_CHECK_FLOATING("norm_activation", x);
  RK_NORM_CHECK(a.batch_norm || a.activation != ActivationName::dice_batch_norm,
                "dice_batch_norm needs batch_norm");
  RK_NORM_CHECK(a.weight.has_value() == a.bias.has_value(), "give both weight and bias, or neither");
  RK_NORM_CHECK(a.batch_norm || !a.weight, "weight and bias belong to batch_norm");
  RK_NORM_CHECK(a.alpha.has_value() == a.has_alpha(), "activation ", static_cast<int64_t>(a.activation),
                a.has_alpha() ? " needs an alpha" : " has no alpha");
  RK_NORM_CHECK(!a.batch_norm || a.training || (a.running_mean && a.running_var),
                "give running_mean and running_var, or training");
  RK_NORM_CHECK(!a.batch_statistics() || a.N() != 1, "training needs more than one row, got ", a.N());
  if (a.batch_norm) check_epsilon("norm_activation", "norm_eps", a.norm_eps, a.training);
  if (a.activation == ActivationName::dice) check_epsilon("norm_activation", "dice_eps", a.dice_eps, false);
  const auto check_vector = [&](const OptionalTensor& t, const char* name, bool may_be_one) {
    if (!t) return;
    RK_NORM_CHECK(t->dim() == 1 && (t->size(0) == a.H() || (may_be_one && t->size(0) == 1)), name,
                  " must be [H] = [", a.H(), may_be_one ? "] or [1], got " : "], got ", shape_of(*t));
    RK_NORM_CHECK(is_floating(dtype_of(*t)), name, " must be float32, float64, float16 or bfloat16, got ",
                  name_of(dtype_of(*t)));
    RK_NORM_CHECK(t->is_cpu(), name, " must be on the device of x, cpu");
  };
  check_vector(a.weight, "weight", false);
  check_vector(a.bias, "bias", false);
  check_vector(a.running_mean, "running_mean", false);
  check_vector(a.running_var, "running_var", false);
  check_vector(a.alpha, "alpha", true);
}

// Rows whose statistics are taken at once: enough to make little of merging them, few enough for float32
// sums.
constexpr int64_t kStatisticsRows = 64;

// Rows in chunks of about equal work. The bounds depend on the shape alone, and sums are taken by chunk: the
// same bits for any number of threads.
struct NormChunks {
  explicit NormChunks(const NormArguments& a, int64_t bytes) : N(a.N()) {
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(N * a.H() / kNormChunk, 128));
    rows = std::max<int64_t>(1, (N + most - 1) / most);
    // Blocks of rows: three arrays of accumulators stay in L1, rows read in groups of
    // vectors.
    block =
        std::min<int64_t>(std::max<int64_t>(kNormBlockBytes / (a.H() * bytes + 1), kNormMinRows), kBlockRows);
  }
  int64_t size() const { return (N + rows - 1) / rows; }
  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t end(int64_t chunk) const { return std::min(N, (chunk + 1) * rows); }

  template <class Body>
  void parallel_for(const Body& body) const {
    torch::stable::parallel_for(0, size(), 1, [&](int64_t c0, int64_t c1) { body(c0, c1); });
  }
  int64_t N, rows, block;
};

// The layer as the kernels take it: g = n, or x without a normalization.
template <class A>
class NormLayer {
 public:
  explicit NormLayer(const NormArguments& a) : args_(a) {
    const int64_t H = a.H();
    f.out = H;
    f.ones_mask = arena_.row(std::vector<A>(H, A(1)));
    f.epsilon = static_cast<A>(H * a.dice_eps);
    f.activation = a.activation == ActivationName::relu              ? Activation::relu
                   : a.activation == ActivationName::sigmoid         ? Activation::sigmoid
                   : a.activation == ActivationName::dice            ? Activation::dice
                   : a.activation == ActivationName::dice_batch_norm ? Activation::dice_batch_norm
                                                                     : Activation::leaky;
    std::vector<A> alpha{static_cast<A>(a.activation == ActivationName::linear      ? 1
                                        : a.activation == ActivationName::leakyrelu ? 0.01
                                                                                    : 0)};
    if (a.alpha) alpha = values_of<A>(*a.alpha);
    if (alpha.size() == 1) alpha.resize(H, alpha[0]);
    f.alpha = arena_.row(alpha);
    if (a.batch_norm && !a.training)
      set_statistics(values_of<double>(*a.running_mean), values_of<double>(*a.running_var));
  }

  // Mean and biased variance of each column.
  void set_statistics(const std::vector<double>& mean, const std::vector<double>& var) {
    const int64_t H = args_.H();
    std::vector<double> r(H), shift(H), weight(H, 1), bias(H, 0);
    for (int64_t h = 0; h < H; ++h) {
      r[h] = 1 / std::sqrt(var[h] + args_.norm_eps);
      shift[h] = -mean[h] * r[h];
    }
    if (args_.weight) {
      weight = values_of<double>(*args_.weight);
      bias = values_of<double>(*args_.bias);
    }
    f.g_scale = f.r = arena_.row(r);
    f.g_shift = arena_.row(shift);
    f.y_scale = arena_.row(weight);
    f.y_shift = arena_.row(bias);
  }

  // The means of e and of e n over the batch.
  void set_backward_means(const LayerGrad<A>& sums) {
    const int64_t H = args_.H(), N = std::max<int64_t>(args_.N(), 1);
    A *c1 = arena_.take(padded<A>(H)), *c2 = arena_.take(padded<A>(H));
    for (int64_t h = 0; h < H; ++h) {
      c1[h] = f.y_scale[h] * sums.sums[0][h] / N;
      c2[h] = f.y_scale[h] * sums.sums[1][h] / N;
    }
    f.c1 = c1;
    f.c2 = c2;
  }

  LayerParams<A> f{};

 private:
  const NormArguments& args_;
  Arena<A> arena_;
};

// One thread's memory for blocks of rows: dice's alone, the others go without.
template <class A>
struct NormWorkspace {
  NormWorkspace(const LayerParams<A>& f, int64_t block) {
    if (f.activation != Activation::dice) return;
    const int64_t ld = padded<A>(f.out);
    LayerScratch<A>& s = scratch.layer;
    s.g = arena.take(block * ld);
    s.a = arena.take(block * ld);
    for (A** of_rows : {&s.mean, &s.inverse, &s.from_first, &s.mean_w, &s.along_units})
      *of_rows = arena.take(block);
    scratch.d = arena.take(block * ld);
    scratch.grad_shift = arena.take(ld);
  }
  Arena<A> arena;
  NormScratch<A> scratch{};
};

// Sums of a range of rows.
template <class A>
struct NormSums {
  explicit NormSums(int64_t H) : ld(padded<A>(H)) {
    grad.alpha = arena.take(5 * ld);
    for (int64_t i = 0; i < 4; ++i) grad.sums[i] = grad.alpha + (1 + i) * ld;
  }
  void operator+=(const NormSums& other) {
    for (int64_t i = 0; i < 5 * ld; ++i) grad.alpha[i] += other.grad.alpha[i];
  }
  int64_t ld;
  Arena<A> arena;
  LayerGrad<A> grad{};
};

// Of no rows: the running statistics, which an update with them leaves as they are.
template <class A>
void keep_statistics(const NormArguments& a, A* batch_stats) {
  for (const OptionalTensor* t : {&a.running_mean, &a.running_var}) {
    const std::vector<A> kept = values_or_zeros<A>(*t ? &**t : nullptr, a.H());
    batch_stats = std::copy(kept.begin(), kept.end(), batch_stats);
  }
}

template <class T, class A = Accumulator<T>>
void accumulate_statistics(const NormArguments& a, const NormChunks& chunks, const Tensor& x,
                           NormLayer<A>& layer, A* batch_stats) {
  const int64_t H = a.H();
  NormStatistics<T> k{};
  k.x = static_cast<const T*>(x.const_data_ptr());
  k.stride_row = x.stride(0);
  k.H = H;
  k.block = kStatisticsRows;
  std::vector<double> memory(2 * H * chunks.size());
  std::vector<ColumnStats> stats(chunks.size());
  for (size_t c = 0; c < stats.size(); ++c)
    stats[c] = {0, memory.data() + 2 * c * H, memory.data() + (2 * c + 1) * H};
  chunks.parallel_for([&](int64_t c0, int64_t c1) {
    Arena<A> arena;
    A* vectors = arena.take(2 * padded<A>(H));
    for (int64_t c = c0; c < c1; ++c)
      RK_DISPATCH_ISA(norm_statistics<T>, k, {chunks.begin(c), chunks.end(c)}, vectors, stats[c]);
  });
  const MergedStats all(stats, H);
  std::vector<double> var(H);
  for (int64_t h = 0; h < H; ++h) {
    batch_stats[h] = static_cast<A>(all.mean[h]);
    batch_stats[H + h] = static_cast<A>(all.deviation[h] / (all.count - 1));
    var[h] = all.deviation[h] / all.count;
  }
  layer.set_statistics(all.mean, var);
}

std::tuple<Tensor, Tensor> norm_activation_cpu(const Tensor& x, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& alpha,
                                               const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, int64_t activation,
                                               bool batch_norm, bool training, double norm_eps,
                                               double dice_eps) {
  const NormArguments a{x,
                        weight,
                        bias,
                        alpha,
                        running_mean,
                        running_var,
                        static_cast<ActivationName>(activation),
                        batch_norm,
                        training,
                        norm_eps,
                        dice_eps};
  check(a);
  const Tensor xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x, {a.N(), a.H()});
  Tensor batch_stats =
      torch::stable::new_empty(x, {a.batch_statistics() ? 2 * a.H() : 0}, accumulator_dtype(dtype_of(x)));
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const NormChunks chunks(a, sizeof(A));
    NormLayer<A> layer(a);
    A* stats = static_cast<A*>(batch_stats.mutable_data_ptr());
    if (a.batch_statistics() && a.N() == 0)
      keep_statistics(a, stats);
    else if (a.batch_statistics())
      accumulate_statistics<T>(a, chunks, xu, layer, stats);
    NormActivation<T> k{};
    k.layer = layer.f;
    k.x = static_cast<const T*>(xu.const_data_ptr());
    k.stride_row = xu.stride(0);
    k.out = static_cast<T*>(out.mutable_data_ptr());
    k.block = chunks.block;
    k.non_temporal = is_non_temporal(out);
    chunks.parallel_for([&](int64_t c0, int64_t c1) {
      const NormWorkspace<A> w(layer.f, chunks.block);
      RK_DISPATCH_ISA(norm_activation<T>, k, {chunks.begin(c0), chunks.end(c1 - 1)}, w.scratch.layer);
    });
  });
  return {out, batch_stats};
}

// One pass over the rows, or with statistics of the batch one for the sums and one for grad_x -> the sums.
template <class T, class A = Accumulator<T>>
NormSums<A> backward_passes(const NormArguments& a, const NormChunks& chunks, NormLayer<A>& layer,
                            const Tensor& x, const Tensor& grad_out, Tensor& grad_x) {
  NormActivationBackward<T> k{};
  k.grad_out = static_cast<const T*>(grad_out.const_data_ptr());
  k.stride_grad = grad_out.stride(0);
  k.x = static_cast<const T*>(x.const_data_ptr());
  k.stride_row = x.stride(0);
  k.block = chunks.block;
  std::vector<std::unique_ptr<NormSums<A>>> partial(chunks.size());
  const auto pass = [&](T* to) {
    k.layer = layer.f;
    k.grad_x = to;
    chunks.parallel_for([&](int64_t c0, int64_t c1) {
      const NormWorkspace<A> w(layer.f, chunks.block);
      for (int64_t c = c0; c < c1; ++c) {
        partial[c] = std::make_unique<NormSums<A>>(a.H());
        RK_DISPATCH_ISA(norm_activation_backward<T>, k, {chunks.begin(c), chunks.end(c)}, w.scratch,
                        partial[c]->grad);
      }
    });
  };
  NormSums<A> sums(a.H());
  const auto add = [&] {
    for (const auto& p : partial) sums += *p;
  };
  T* to = static_cast<T*>(grad_x.mutable_data_ptr());
  if (a.batch_statistics()) {
    pass(nullptr);
    add();
    layer.set_backward_means(sums.grad);
    pass(to);
  } else {
    pass(to);
    add();
  }
  return sums;
}

// Of weight, bias and alpha, as far as there are such.
template <class A>
Tensors param_gradients(const NormArguments& a, const NormSums<A>& sums) {
  Tensors grads;
  if (a.weight) {
    const A *e = sums.grad.sums[0], *en = sums.grad.sums[1];
    grads.push_back(gradient_of(*a.weight, [&](int64_t h) { return en[h]; }));
    grads.push_back(gradient_of(*a.bias, [&](int64_t h) { return e[h]; }));
  }
  if (a.alpha) {
    A all = 0;
    for (int64_t h = 0; h < a.H(); ++h) all += sums.grad.alpha[h];
    const bool one = a.alpha->numel() == 1;
    grads.push_back(gradient_of(*a.alpha, [&](int64_t h) { return one ? all : sums.grad.alpha[h]; }));
  }
  return grads;
}

std::tuple<Tensor, std::vector<Tensor>> norm_activation_backward_cpu(
    const Tensor& grad_out, const Tensor& batch_stats, const Tensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& alpha, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, int64_t activation, bool batch_norm, bool training, double norm_eps,
    double dice_eps) {
  const NormArguments a{x,
                        weight,
                        bias,
                        alpha,
                        running_mean,
                        running_var,
                        static_cast<ActivationName>(activation),
                        batch_norm,
                        training,
                        norm_eps,
                        dice_eps};
  check(a);
  const int64_t N = a.N(), H = a.H();
  check_form("norm_activation_backward", "grad_out", grad_out, {N, H}, dtype_of(x));
  check_form("norm_activation_backward", "batch_stats", batch_stats, {a.batch_statistics() ? 2 * H : 0},
             accumulator_dtype(dtype_of(x)));
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out);
  Tensor grad_x = new_empty_paged(x, {N, H});
  Tensors grad_params;
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const NormChunks chunks(a, sizeof(A));
    NormLayer<A> layer(a);
    if (a.batch_statistics()) {
      const std::vector<double> stats = values_of<double>(batch_stats);
      std::vector<double> mean(stats.begin(), stats.begin() + H), var(stats.begin() + H, stats.end());
      for (double& v : var) v *= std::max(N - 1., 0.) / std::max<int64_t>(N, 1);
      layer.set_statistics(mean, var);
    }
    const NormSums<A> sums = backward_passes<T>(a, chunks, layer, xu, gu, grad_x);
    grad_params = param_gradients(a, sums);
  });
  return {grad_x, grad_params};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("norm_activation", TORCH_BOX(&rk::norm_activation_cpu));
  m.impl("norm_activation_backward", TORCH_BOX(&rk::norm_activation_backward_cpu));
}
