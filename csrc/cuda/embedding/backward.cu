// The embedding op's backwards on a GPU: checks, launches, registration. The kernels and their mathematics
// are in backward.cuh.
#include <array>
#include <tuple>

#include "cuda/common/driver.h"
#include "cuda/embedding/backward.cuh"
#include "cuda/embedding/backward.h"
#include "cuda/embedding/known_rows.h"
#include "embedding/backward.h"

namespace rk {
namespace cuda {

// The lookups by key, and the tensors that hold them.
struct Sorted {
  Tensor keys, order, sources, ranks;
  Lookups lookups;
};

class Backward {
 public:
  Backward(const FeatureArgs& args, const OptionalTensors& grad_outs, const Tensors& weights,
           const Ints& rows);
  Tensors grad_per_sample_weights();
  Tensors dense();
  std::pair<Tensors, Tensors> sparse();  // rows and values of each table; waits for the device
  RunGradients runs();

 private:
  template <class Pieces, class Launch>
  void for_features(ScalarType dtype, const Pieces& pieces, const Launch& launch) const;
  Sorted sort() const;
  void rank(Sorted& sorted) const;
  TableGrad table_grad(size_t t) const;
  void reduce(const Sorted& sorted, ScalarType dtype, const std::vector<TableGrad>& tables) const;
  int64_t width(ScalarType dtype) const;
  const Tensor& like() const { return outs_.some; }

  const FeatureArgs& args_;
  const Ints& rows_;
  OutGrads outs_;
  Device device_;
  Tensors grads_, kept_, ids_;
  std::vector<BagGrads> features_;  // those without a gradient have no bags
  int64_t lookups_ = 0;
  Ints first_key_;                  // of each table, and the end of the last
  std::vector<ScalarType> dtypes_;  // of each table
  std::vector<bool> aligned_;       // of each table: the rows of its features' gradients
};

// Before anything is copied or launched.
static OutGrads check_backward(const FeatureArgs& args, const OptionalTensors& grad_outs,
                               const Tensors& weights, const Ints& rows) {
  check_lengths(args, rows.size());
  OutGrads outs(grad_outs, weights, rows, args,
                [&](size_t f) { return count_bags(args, f, check_bags(args, f)); });
  for (size_t f = 0; f < args.size(); ++f)
    RK_CHECK_BACKWARD(!grad_outs[f] || on_device_of(*grad_outs[f], outs.some), "grad_outs[", f,
                      "] must be on the device of the others");
  for (size_t t = 0; t < weights.size(); ++t)
    RK_CHECK_BACKWARD(on_device_of(weights[t], outs.some), "weights[", t,
                      "] must be on the device of the gradients");
  return outs;
}

Backward::Backward(const FeatureArgs& args, const OptionalTensors& grad_outs, const Tensors& weights,
                   const Ints& rows)
    : args_(args),
      rows_(rows),
      outs_(check_backward(args, grad_outs, weights, rows)),
      device_(outs_.some),
      grads_(args.size(), outs_.some),
      features_(args.size()),
      first_key_(1, 0),
      dtypes_(outs_.dtypes()),
      aligned_(rows.size(), true) {
  for (const int64_t n : rows) first_key_.push_back(first_key_.back() + n);
  for (size_t f = 0; f < args.size(); ++f) {
    if (!grad_outs[f]) continue;
    const int64_t t = args.tables[f], D = outs_.widths[t];
    const Tensor& grad = grads_[f] = unit_stride_rows(*grad_outs[f]);
    BagGrads& bags = features_[f];
    static_cast<Bags&>(bags) = bags_of(args, f, grad, kept_);
    bags.D = checked_int32(D, "the width of a table");
    bags.R = rows[t];
    bags.out = const_cast<void*>(grad.const_data_ptr());
    bags.stride_ob = checked_int32(grad.dim() == 2 ? grad.stride(0) : D, "the stride of grad_outs");
    if (bags.mode == kMax || bags.per_sample_weights) {
      kept_.push_back(unit_stride_rows(weights[t]));
      bags.weight = kept_.back().const_data_ptr();
      bags.stride_wr = kept_.back().stride(0);
    }
    if (bags.mode == kMax) {
      kept_.push_back(torch::stable::new_empty(grad, {ids_of(bags), D}));
      bags.grad = kept_.back().mutable_data_ptr();
      bags.a_row_a_lookup = true;
    }
    aligned_[t] = aligned_[t] && rows_aligned(bags.mode == kMax ? kept_.back() : grad);
    bags.first_lookup = lookups_;
    bags.first_key = first_key_[t];
    bags.frozen_row = args.frozen_rows[t];
    lookups_ += ids_of(bags);
  }
  ids_ = find_rows(args);
  for (size_t f = 0; f < args.size(); ++f) use_rows(args, f, ids_, features_[f]);
}

// Calls launch(batch, blocks) on the features of a dtype. `pieces` says how many lanes a bag can use; 0:
// leave it out.
template <class Pieces, class Launch>
void Backward::for_features(ScalarType dtype, const Pieces& pieces, const Launch& launch) const {
  Batches<BagGrads, Launch> batches(launch);
  for (size_t f = 0; f < features_.size(); ++f) {
    BagGrads bags = features_[f];
    if (bags.B == 0 || grads_[f].scalar_type() != dtype || pieces(bags) == 0) continue;
    bags.log2_lanes = log2_lanes(pieces(bags));
    batches.add(bags, blocks_for(bags.B, bags.log2_lanes));
  }
  batches.flush();
}

Tensors Backward::grad_per_sample_weights() {
  Tensors grad_factors;
  for (size_t f = 0; f < args_.per_sample_weights.size(); ++f) {
    const Tensor& factors = args_.per_sample_weights[f];
    const bool used = features_[f].B > 0 && features_[f].per_sample_weights;
    grad_factors.push_back(used ? torch::stable::new_empty(factors, factors.sizes())
                                : torch::stable::new_zeros(factors, factors.sizes()));
    if (used) features_[f].grad = grad_factors[f].mutable_data_ptr();
  }
  for (const ScalarType dtype : kFloating)
    dispatch_floating(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for_features(
          dtype, [](const Bags& bags) { return bags.per_sample_weights ? std::max(bags.D, 1) : 0; },
          [&](const Batch<BagGrads>& batch, int64_t blocks) {
            device_.launch(embedding_factor_grad<T>, blocks, 0, batch);
          });
    });
  return grad_factors;
}

Sorted Backward::sort() const {
  const int64_t skipped = first_key_.back();
  const bool wide = skipped > INT32_MAX;
  Sorted sorted;
  sorted.keys = torch::stable::new_empty(like(), {lookups_}, wide ? ScalarType::Long : ScalarType::Int);
  sorted.sources = torch::stable::new_empty(like(), {2 * lookups_}, ScalarType::Double);
  Lookups& lookups = sorted.lookups = Lookups{sorted.keys.mutable_data_ptr(),
                                              wide,
                                              lookups_,
                                              skipped,
                                              static_cast<Source*>(sorted.sources.mutable_data_ptr()),
                                              nullptr,
                                              nullptr,
                                              false};
  for (const ScalarType dtype : kFloating)
    dispatch_floating(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for_features(
          dtype, [](const Bags& bags) { return bags.mode == kMax ? bags.D : 0; },
          [&](const Batch<BagGrads>& batch, int64_t blocks) {
            device_.launch(embedding_max_grad_rows<T>, blocks, 0, batch);
          });
      for_features(
          dtype, [](const Bags& bags) { return std::max<int64_t>(1, ids_of(bags) / bags.B); },
          [&](const Batch<BagGrads>& batch, int64_t blocks) {
            device_.launch(embedding_lookups<T>, blocks, 0, batch, lookups);
          });
    });
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(sorted.keys), from(std::optional<bool>(true)), from(int64_t(0)),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  sorted.keys = to<Tensor>(stack[0]);
  sorted.order = to<Tensor>(stack[1]);
  lookups.keys = sorted.keys.mutable_data_ptr();
  lookups.order = static_cast<const int64_t*>(sorted.order.const_data_ptr());
  return sorted;
}

// Numbers the runs.
void Backward::rank(Sorted& sorted) const {
  const Tensor starts = torch::stable::new_empty(like(), {lookups_}, ScalarType::Int);
  device_.launch(embedding_run_starts, blocks_for(lookups_, 0), 0, sorted.lookups,
                 static_cast<int32_t*>(starts.mutable_data_ptr()));
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(starts), from(int64_t(0)),
                                    from(std::optional<ScalarType>(ScalarType::Long))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  sorted.ranks = torch::stable::detail::to<Tensor>(stack[0]);
  sorted.lookups.ranks = static_cast<const int64_t*>(sorted.ranks.const_data_ptr());
}

// All of a table but where its sums go.
TableGrad Backward::table_grad(size_t t) const {
  TableGrad table{};
  table.first_key = first_key_[t];
  table.R = rows_[t];
  table.D = table.stride = static_cast<int32_t>(outs_.widths[t]);
  table.packed = aligned_[t] && table.D * element_size(dtypes_[t]) % 16 == 0;
  return table;
}

// The widest table's width, rounded up so that rows of a buffer that serves all tables start where a pack
// may.
int64_t Backward::width(ScalarType dtype) const {
  int64_t width = 0;
  for (size_t t = 0; t < rows_.size(); ++t)
    if (dtypes_[t] == dtype) width = std::max(width, (outs_.widths[t] + 15) / 16 * 16);
  return width;
}

// Calls launch(batch, i), i the first's position, for the tables that `wanted` takes, in order.
template <class Wanted, class Launch>
static void for_tables(const std::vector<TableGrad>& tables, const Wanted& wanted, const Launch& launch) {
  Batch<TableGrad> batch;
  size_t first = 0;
  for (size_t t = 0; t < tables.size(); ++t) {
    if (!wanted(t)) continue;
    if (batch.n == 0) first = t;
    batch.items[batch.n++] = tables[t];
    if (batch.n < Batch<TableGrad>::kItems) continue;
    launch(batch, first);
    batch.n = 0;
  }
  if (batch.n) launch(batch, first);
}

void Backward::reduce(const Sorted& sorted, ScalarType dtype, const std::vector<TableGrad>& tables) const {
  if (width(dtype) == 0) return;
  const int64_t tiles = (lookups_ + kTile - 1) / kTile;
  dispatch_floating(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const auto wanted = [&](size_t t) { return dtypes_[t] == dtype && outs_.widths[t] > 0 && rows_[t] > 0; };
    int64_t pieces = 4;  // with fewer lanes a block's tiles would not fit in its shared memory
    for (size_t t = 0; t < tables.size(); ++t)
      if (wanted(t))
        pieces = std::max<int64_t>(pieces, tables[t].packed ? outs_.widths[t] / kPack<T> : outs_.widths[t]);
    const int lanes = log2_lanes(pieces);
    const int64_t staged_bytes = (kThreads >> lanes) * kTile * sizeof(Staged<A>);
    const Tensor rows = torch::stable::new_empty(like(), {2 * tiles, width(dtype)}, accumulator_dtype(dtype));
    const Carries<A> carries{static_cast<A*>(rows.mutable_data_ptr()), width(dtype)};
    for_tables(tables, wanted, [&](const Batch<TableGrad>& batch, size_t) {
      device_.launch(embedding_reduce<T>, blocks_for(tiles, lanes), staged_bytes, batch, sorted.lookups,
                     carries, lanes);
      device_.launch(embedding_join<T>, blocks_for(tiles, 5), 0, batch, sorted.lookups, carries, lanes);
    });
  });
}

Tensors Backward::dense() {
  Tensors grads;
  std::vector<TableGrad> tables;
  const auto launch = [&](const Batch<Zeros>& batch, int64_t blocks) {
    device_.launch(zero, blocks, 0, batch);
  };
  Batches<Zeros, decltype(launch)> zeros(launch);
  for (size_t t = 0; t < rows_.size(); ++t) {
    tables.push_back(table_grad(t));
    if (!outs_.of_table[t]) {
      grads.push_back(torch::stable::new_empty(like(), {0}));
      continue;
    }
    grads.push_back(torch::stable::new_empty(like(), {rows_[t], outs_.widths[t]}, dtypes_[t]));
    tables[t].sums = grads[t].mutable_data_ptr();
    const int64_t bytes = grads[t].numel() * grads[t].element_size();
    constexpr int64_t kBytesPerBlock = 16 * kThreads * kZerosPerThread;
    zeros.add({tables[t].sums, bytes, 0}, (bytes + kBytesPerBlock - 1) / kBytesPerBlock);
  }
  zeros.flush();
  if (lookups_ == 0) return grads;
  const Sorted sorted = sort();
  for (const ScalarType dtype : kFloating) reduce(sorted, dtype, tables);
  return grads;
}

std::pair<Tensors, Tensors> Backward::sparse() {
  std::vector<TableGrad> tables;
  for (size_t t = 0; t < rows_.size(); ++t) tables.push_back(table_grad(t));
  const auto all = [](size_t) { return true; };
  Ints last_ranks(rows_.size(), 0);
  Sorted sorted;
  if (lookups_ > 0) {
    sorted = sort();
    rank(sorted);
    const Tensor found =
        torch::stable::new_empty(like(), {static_cast<int64_t>(rows_.size())}, ScalarType::Long);
    int64_t* p = static_cast<int64_t*>(found.mutable_data_ptr());
    for_tables(tables, all, [&](const Batch<TableGrad>& batch, size_t first) {
      device_.launch(embedding_last_ranks, 1, 0, batch, sorted.lookups, p + first);
    });
    device_.read(p, last_ranks.size(), last_ranks.data());
  }
  Tensors grad_rows, grad_values;
  for (size_t t = 0; t < rows_.size(); ++t) {
    tables[t].first_rank = t == 0 ? 0 : last_ranks[t - 1];
    const int64_t count = last_ranks[t] - tables[t].first_rank;
    grad_rows.push_back(torch::stable::new_empty(like(), {count}, ScalarType::Long));
    grad_values.push_back(torch::stable::new_empty(like(), {count, tables[t].D}, dtypes_[t]));
    tables[t].rows = static_cast<int64_t*>(grad_rows[t].mutable_data_ptr());
    tables[t].sums = grad_values[t].mutable_data_ptr();
  }
  if (lookups_ > 0) {
    for_tables(
        tables, [&](size_t t) { return rows_[t] > 0; },
        [&](const Batch<TableGrad>& batch, size_t) {
          device_.launch(embedding_run_rows, blocks_for(lookups_, 0), 0, batch, sorted.lookups);
        });
    for (const ScalarType dtype : kFloating) reduce(sorted, dtype, tables);
  }
  return {grad_rows, grad_values};
}

RunGradients Backward::runs() {
  RunGradients runs;
  runs.n = lookups_;
  if (lookups_ == 0) return runs;
  Sorted sorted = sort();
  sorted.lookups.at_starts = true;
  runs.keys = sorted.keys;
  for (const ScalarType dtype : kFloating) {
    if (width(dtype) == 0) continue;
    runs.values.push_back(torch::stable::new_empty(like(), {lookups_, width(dtype)}, dtype));
    std::vector<TableGrad> tables;
    for (size_t t = 0; t < rows_.size(); ++t) {
      tables.push_back(table_grad(t));
      tables[t].sums = runs.values.back().mutable_data_ptr();
      tables[t].stride = static_cast<int32_t>(width(dtype));
    }
    reduce(sorted, dtype, tables);
  }
  return runs;
}

std::pair<RunGradients, Tensors> run_gradients(const FeatureArgs& args, const OptionalTensors& grad_outs,
                                               const Tensors& weights, const Ints& rows) {
  Backward backward(args, grad_outs, weights, rows);
  RunGradients runs = backward.runs();
  return {std::move(runs), backward.grad_per_sample_weights()};
}

static std::tuple<Tensors, Tensors> embedding_bag_backward_cuda(
    const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows, const Tensors& indices,
    const Tensors& offsets, const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
    const Ints& padding_idx, const Ints& frozen_rows, const Ints& known) {
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   nullptr};
  Backward backward(args, grad_outs, weights, rows);
  Tensors grad_weights = backward.dense();
  return {std::move(grad_weights), backward.grad_per_sample_weights()};
}

static std::tuple<Tensors, Tensors, Tensors> embedding_bag_backward_sparse_cuda(
    const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows, const Tensors& indices,
    const Tensors& offsets, const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
    const Ints& padding_idx, const Ints& frozen_rows, const Ints& known) {
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   nullptr};
  Backward backward(args, grad_outs, weights, rows);
  auto [grad_rows, grad_values] = backward.sparse();
  return {std::move(grad_rows), std::move(grad_values), backward.grad_per_sample_weights()};
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  if (rk::cuda::refusal() != rk::cuda::Refusal::none) return;
  m.impl("embedding_bag_backward", TORCH_BOX(&rk::cuda::embedding_bag_backward_cuda));
  m.impl("embedding_bag_backward_sparse", TORCH_BOX(&rk::cuda::embedding_bag_backward_sparse_cuda));
}
