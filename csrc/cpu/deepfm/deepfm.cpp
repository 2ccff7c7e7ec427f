// DeepFM without its last sigmoid, in eval: checks, threads and registration. The mathematics are in
// fm_kernel.h and hidden_layers_kernel.h.
#include <algorithm>
#include <cstring>
#include <functional>

#include "cpu/deepfm/params.h"
#include "cpu/dense/params.h"
#include "cpu/embedding/features.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"
#include "cpu/simd/operand.h"
#include "embedding/fm.h"

namespace rk {
namespace {

#define RK_DEEPFM_CHECK(condition, ...) RK_CHECK(condition, "deepfm: ", __VA_ARGS__)

// The texts are those of ops/deepfm.py.
void check_layers(const Tensors& mlp, int64_t in, const Tensor& like) {
  RK_DEEPFM_CHECK(mlp.size() >= 4 && mlp.size() % 2 == 0,
                  "mlp must be the weight and the bias of each of two layers or more, got ", mlp.size(),
                  " tensors");
  for (size_t i = 0; i < mlp.size(); i += 2) {
    const Tensor &w = mlp[i], &b = mlp[i + 1];
    RK_DEEPFM_CHECK(w.dim() == 2 && w.size(1) == in && b.dim() == 1 && b.size(0) == w.size(0) &&
                        (i + 2 < mlp.size() || w.size(0) == 1),
                    "mlp's layer ", i / 2, " must have a weight [", i + 2 < mlp.size() ? "H" : "1", ", ", in,
                    "] and its bias, got shapes ", shape_of(w), " and ", shape_of(b));
    for (const Tensor* t : {&w, &b})
      RK_DEEPFM_CHECK(dtype_of(*t) == ScalarType::Float && same_device(*t, like), "mlp's layer ", i / 2,
                      " must be torch.float32, got ", name_of(dtype_of(*t)), " on cpu");
    in = w.size(0);
  }
}

// The layers' weights and biases in the kernel's order.
struct PackedLayers {
  Tensor memory;
  std::vector<HiddenLayer> layers;
  int64_t widest = 0;

  // mlp: W_1, b_1, W_2, b_2 ... of the hidden layers and then of the output layer; `in` is what the first
  // takes.
  PackedLayers(const Tensors& mlp, int64_t in) {
    const size_t n = mlp.size() / 2 - 1;
    int64_t size = 0;
    for (size_t i = 0; i < n; ++i) {
      const int64_t out = HiddenLayer::whole(mlp[2 * i].size(0));
      layers.push_back({nullptr, nullptr, mlp[2 * i].size(1), out});
      widest = std::max(widest, out);
      size += out * (layers[i].in + 1);
    }
    memory = torch::stable::new_empty(mlp[0], {size});
    float* p = static_cast<float*>(memory.mutable_data_ptr());
    std::vector<std::function<void()>> panels;
    Tensors given;
    for (size_t i = 0; i < n; ++i) {
      HiddenLayer& l = layers[i];
      const Tensor w = torch::stable::contiguous(mlp[2 * i]), b = torch::stable::contiguous(mlp[2 * i + 1]);
      given.push_back(w);
      const int64_t out = w.size(0), K = l.in;
      const float* from = static_cast<const float*>(w.const_data_ptr());
      for (int64_t n0 = 0, width; n0 < l.out; n0 += width) {
        width = HiddenLayer::panel(l.out - n0);
        panels.push_back([=] { pack(from + n0 * K, K, std::min(width, out - n0), width, p + n0 * K); });
      }
      l.weight = p;
      p += l.out * K;
      std::memcpy(p, b.const_data_ptr(), out * sizeof(float));
      std::fill(p + out, p + l.out, 0.f);
      l.bias = p;
      p += l.out;
    }
    run_tasks(panels.size(), size, [&](int64_t i) { panels[i](); });
  }

  // `real` rows of a weight -> columns of a panel `width` wide, the others zeros.
  static void pack(const float* rows, int64_t K, int64_t real, int64_t width, float* panel) {
    for (int64_t k0 = 0; k0 < K; k0 += 64)  // a stretch of rows that stays in L1
      for (int64_t n = 0; n < width; ++n)
        for (int64_t k = k0, k1 = std::min(K, k0 + 64); k < k1; ++k)
          panel[k * width + n] = n < real ? rows[n * K + k] : 0.f;
  }
};

// A thread's activations of a block. Zeroed: rows that only fill a tile are multiplied too, and denormal
// numbers would be slow.
struct Block {
  Block(const PackedLayers& packed, int64_t in)
      : stride_x(padded<float>(in)), stride_hidden(padded<float>(packed.widest)) {
    x = arena.take(kMlpRows * stride_x);
    for (float*& h : hidden) h = arena.take(kMlpRows * stride_hidden);
    for (float** sums : {&fm, &linear, &deep}) *sums = arena.take(kMlpRows);
  }
  HiddenLayers hidden_layers(const PackedLayers& packed, int64_t rows) const {
    HiddenLayers a{};
    a.layers = packed.layers.data();
    a.num_layers = static_cast<int64_t>(packed.layers.size());
    a.x = x;
    for (int i : {0, 1}) a.hidden[i] = hidden[i];
    a.stride_x = stride_x;
    a.stride_hidden = stride_hidden;
    a.rows = rows;
    return a;
  }

  Arena<float> arena;
  int64_t stride_x, stride_hidden;
  float *x, *hidden[2], *fm, *linear, *deep;
};

// x [n, columns of dense] = dense's rows from b0 on. Columns in the outer loop: in a batch each is
// contiguous.
void copy_dense(const OptionalTensor& dense, int64_t b0, int64_t n, float* x, int64_t stride_x) {
  if (!dense || dense->size(1) == 0) return;
  const float* from = static_cast<const float*>(dense->const_data_ptr()) + b0 * dense->stride(0);
  const int64_t stride_row = dense->stride(0), stride_column = dense->stride(1), columns = dense->size(1);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t b = 0; b < n; ++b) x[b * stride_x + c] = from[b * stride_row + c * stride_column];
}

// Checks the tables and points the bags at them. Returns them with rows of unit stride.
Tensors bind_tables(const Tensors& weights, const FeatureArgs& args, int64_t D, std::vector<Bags>& bags) {
  Tensors rows;
  for (size_t t = 0; t < weights.size(); ++t) {
    RK_CHECK_BAG(weights[t].dim() == 2, "weights[", t, "] must be [R, D], got shape ", shape_of(weights[t]));
    RK_DEEPFM_CHECK(
        weights[t].size(1) == D && weights[t].is_cpu() && dtype_of(weights[t]) == ScalarType::Float,
        "weights[", t, "] must be [R, ", D, "] torch.float32, got shape ", shape_of(weights[t]), " and ",
        name_of(dtype_of(weights[t])));
    rows.push_back(unit_stride_rows(weights[t]));
  }
  const int64_t B = bags[0].B;
  for (size_t f = 0; f < bags.size(); ++f) {
    RK_DEEPFM_CHECK(args.indices[f].dim() == 1 && bags[f].B == B, args.name(f), " must be [", B,
                    "], got shape ", shape_of(args.indices[f]));
    const Tensor& w = rows[args.tables[f]];
    bags[f].weight = w.const_data_ptr();
    bags[f].R = w.size(0);
    bags[f].D = D;
    bags[f].stride_wr = w.stride(0);
  }
  return rows;
}

// The arguments, checked; shared by all threads.
struct Network {
  const std::vector<Bags>& bags;
  int64_t D;
  const OptionalTensor& dense;
  Tensor linear_weight, output_weight;
  float output_bias;
  PackedLayers layers;
};

// y [samples of the range] = the logits of at most a block of samples.
void run_block(const Network& net, const Block& block, Range range, float* y) {
  const int64_t n = range.end - range.begin, F = net.bags.size(), D = net.D, width = F * D;
  BlockLookups lookups{};
  lookups.bags = net.bags.data();
  lookups.F = F;
  lookups.D = D;
  lookups.x = block.x;
  lookups.stride_x = block.stride_x;
  RK_DISPATCH_ISA(look_up_block<float>, lookups, range);
  copy_dense(net.dense, range.begin, n, block.x + width, block.stride_x);
  FmInteraction<float> fm{};
  fm.x = block.x;
  fm.stride_sample = block.stride_x;
  fm.stride_field = D;
  fm.out = block.fm;
  fm.F = F;
  fm.D = D;
  fm.reduce_sum = true;
  RK_DISPATCH_ISA(fm_interaction<float>, fm, {0, n});
  Linear<float> linear{}, output{};
  linear.x = block.x;
  linear.stride_row = block.stride_x;
  linear.weight = static_cast<const float*>(net.linear_weight.const_data_ptr());
  linear.n = width;
  linear.out = block.linear;
  RK_DISPATCH_ISA(linear<float>, linear, {0, n});
  output.x = RK_DISPATCH_ISA(hidden_layers<float>, block.hidden_layers(net.layers, n));
  output.stride_row = block.stride_hidden;
  output.weight = static_cast<const float*>(net.output_weight.const_data_ptr());
  output.n = net.output_weight.size(1);
  output.out = block.deep;
  RK_DISPATCH_ISA(linear<float>, output, {0, n});
  for (int64_t b = 0; b < n; ++b) y[b] = block.fm[b] + block.linear[b] + (block.deep[b] + net.output_bias);
}

Tensor deepfm_cpu(const Tensors& weights, const Tensors& indices, const Ints& tables, const Names& names,
                  const Tensor& linear_weight, const OptionalTensor& dense, const Tensors& mlp) {
  const Tensors none;
  const Ints modes(indices.size(), kNone), padding_idx(indices.size(), -1), frozen_rows(weights.size(), -1);
  const Ints known;
  const FeatureArgs args{indices, none, none, tables, modes, padding_idx, frozen_rows, known, &names};
  Features features(args, weights.size());
  std::vector<Bags>& bags = features.bags;
  const int64_t F = bags.size(), B = bags[0].B,
                D = weights[tables[0]].dim() == 2 ? weights[tables[0]].size(1) : 0;
  const int64_t width = F * D, in = width + (dense && dense->dim() == 2 ? dense->size(1) : 0);
  const Tensors rows = bind_tables(weights, args, D, bags);
  const Tensor linear = linear_weight_of("deepfm", linear_weight, rows[0], width);
  if (dense) check_dense("deepfm", *dense, rows[0], B);
  check_layers(mlp, in, rows[0]);
  const Network net{bags,
                    D,
                    dense,
                    linear,
                    torch::stable::contiguous(mlp[mlp.size() - 2]),
                    *static_cast<const float*>(mlp.back().const_data_ptr()),
                    PackedLayers(mlp, in)};

  Tensor out = torch::stable::new_empty(rows[0], {B, 1});
  float* y = static_cast<float*>(out.mutable_data_ptr());
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (B + kMlpRows - 1) / kMlpRows);
  std::atomic<int64_t> next{0};
  std::atomic<bool> in_range{true};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Block block(net.layers, in);
    for (int64_t b0; in_range && (b0 = next++ * kMlpRows) < B;) {
      const Range samples{b0, std::min(B, b0 + kMlpRows)};
      for (const Bags& bag : bags)
        if (!ids_in_range(bag, samples.begin, samples.end)) {
          in_range = false;
          return;
        }
      run_block(net, block, samples, y + b0);
    }
  });
  if (!in_range)
    for (int64_t f = 0; f < F; ++f) features.check_range(args, f);
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) { m.impl("deepfm", TORCH_BOX(&rk::deepfm_cpu)); }
