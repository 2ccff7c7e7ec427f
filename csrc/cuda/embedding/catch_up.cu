// Rows of tables under exact Adam, brought up to the last step on a GPU: checks, launches, registration. The
// kernels and their mathematics are in catch_up.cuh.
#include "cuda/common/driver.h"
#include "cuda/embedding/catch_up.cuh"
#include "cuda/embedding/catch_up.h"
#include "cuda/embedding/known_rows.h"
#include "cuda/embedding/optimizer.cuh"
#include "embedding/catch_up.h"

namespace rk {
namespace cuda {

std::vector<CatchUp> catch_ups(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                               const Tensors& histories, const std::vector<double>& clocks) {
  auto all = make_catch_ups<CatchUp, Update>(weights, states, last_steps, histories, clocks, on_device_of);
  for (size_t t = 0; t < all.size(); ++t) {
    const Tensor& w = weights[t];
    RK_CHECK_CATCH_UP(on_device(w), "a table must be on a GPU");
    all[t].D = checked_int32(w.size(1), "the width of a table");
    all[t].packed = rows_aligned(w) && all[t].D * w.element_size() % 16 == 0;
    for (int i = 0; i < 2; ++i) {
      const Tensor& state = states[2 * t + i];
      RK_CHECK_CATCH_UP(on_device_of(state, w), "state ", i, " of a table of shape ", shape_of(w),
                        " must be on the table's device");
      all[t].packed = all[t].packed && packs_fit(state, w);
    }
  }
  return all;
}

namespace {

// Batches rows into launches for each dtype.
class IdleBatches {
 public:
  explicit IdleBatches(const Tensor& like) : device_(like) {}

  void add(const CatchUp& table, const Tensor& weight, const Tensor* ids) {
    IdleRows rows{};
    static_cast<CatchUp&>(rows) = table;
    rows.n = table.R;
    if (ids) {
      kept_.push_back(torch::stable::contiguous(*ids));
      rows.ids = kept_.back().const_data_ptr();
      rows.n = ids->numel();
      rows.wide_ids = ids->scalar_type() == ScalarType::Long;
    }
    if (rows.D > 0) all_.push_back({rows, weight.scalar_type()});
  }

  void launch() const {
    for (const ScalarType dtype : kFloating)
      dispatch_floating(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto launch = [&](const Batch<IdleRows>& batch, int64_t blocks) {
          device_.launch(embedding_catch_up<T>, blocks, 0, batch);
        };
        Batches<IdleRows, decltype(launch)> batches(launch);
        for (auto [rows, of] : all_) {
          if (of != dtype) continue;
          rows.log2_lanes = log2_lanes(rows.packed ? rows.D / kStatePack<T> : rows.D);
          batches.add(rows, blocks_for(rows.n, rows.log2_lanes));
        }
        batches.flush();
      });
  }

 private:
  Device device_;
  std::vector<std::pair<IdleRows, ScalarType>> all_;
  Tensors kept_;
};

// Raises for features that contradict themselves, or are elsewhere; `of_table(t)`: a tensor of table t.
template <class OfTable>
void check_lookups(const FeatureArgs& args, size_t tables, const OfTable& of_table) {
  check_lengths(args, tables);
  for (size_t f = 0; f < args.size(); ++f) {
    check_bags(args, f);
    check_integers(args, f, "", args.indices[f]);
    const Tensor& like = of_table(args.tables[f]);
    RK_CHECK_BAG(on_device_of(args.indices[f], like), args.name(f), " must be on the device of its table, ",
                 like.get_device_index(), ", got ", args.indices[f].get_device_index());
  }
}

void embedding_catch_up_cuda(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                             const Tensors& histories, const Tensors& indices, const Tensors& offsets,
                             const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                             const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                             const Names& names, const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   &names};
  check_lookups(args, all.size(), [&](size_t t) -> const Tensor& { return weights[t]; });
  IdleBatches batches(weights[0]);
  const Tensors rows = find_rows(args);
  for (size_t f = 0; f < args.size(); ++f) batches.add(all[tables[f]], weights[tables[f]], &rows[f]);
  batches.launch();
}

void embedding_catch_up_all_cuda(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                                 const Tensors& histories, const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  if (all.empty()) return;
  IdleBatches batches(weights[0]);
  for (size_t t = 0; t < all.size(); ++t) batches.add(all[t], weights[t], nullptr);
  batches.launch();
}

void embedding_mark_steps_cuda(const Tensors& last_steps, const Tensors& indices, const Tensors& offsets,
                               const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                               const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                               const Ints& steps) {
  RK_CHECK(steps.size() == last_steps.size(), "embedding_mark_steps: steps must have one entry a table, ",
           last_steps.size(), ", got ", steps.size());
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   nullptr};
  check_lookups(args, last_steps.size(), [&](size_t t) -> const Tensor& { return last_steps[t]; });
  const Device device(last_steps[0]);
  const auto launch = [&](const Batch<SteppedRows>& batch, int64_t blocks) {
    device.launch(embedding_mark_steps, blocks, 0, batch);
  };
  Batches<SteppedRows, decltype(launch)> batches(launch);
  Tensors kept;
  const Tensors rows = find_rows(args);
  for (size_t f = 0; f < args.size(); ++f) {
    const int64_t t = tables[f], n = rows[f].numel(), R = last_steps[t].numel();
    kept.push_back(torch::stable::contiguous(rows[f]));
    batches.add({last_steps_of("embedding_mark_steps", last_steps[t], R, on_device(last_steps[t])),
                 kept.back().const_data_ptr(), R, n, modes[f] == kNone ? -1 : padding_idx[f], frozen_rows[t],
                 static_cast<int32_t>(steps[t]), 0, rows[f].scalar_type() == ScalarType::Long},
                blocks_for(n, 0));
  }
  batches.flush();
}

void adam_history_cuda(const Tensor& history, int64_t base, int64_t step, double beta1, double beta2,
                       double lr, double decay_before, double decay_after) {
  const HistoryStep added =
      make_history_step(history, on_device(history), base, step, beta1, beta2, lr, decay_before, decay_after);
  Device(history).launch(adam_history, blocks_for(std::max<int64_t>(added.n, 1), 0), 0, added);
}

}  // namespace
}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  if (rk::cuda::refusal() != rk::cuda::Refusal::none) return;
  m.impl("embedding_catch_up", TORCH_BOX(&rk::cuda::embedding_catch_up_cuda));
  m.impl("embedding_catch_up_all", TORCH_BOX(&rk::cuda::embedding_catch_up_all_cuda));
  m.impl("embedding_mark_steps", TORCH_BOX(&rk::cuda::embedding_mark_steps_cuda));
  m.impl("adam_history", TORCH_BOX(&rk::cuda::adam_history_cuda));
}
