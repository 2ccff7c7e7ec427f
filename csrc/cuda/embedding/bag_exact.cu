// Lookups of tables under exact Adam and its fused step on a GPU: checks, launches, registration. The kernels
// are in bag_exact.cuh.
#include "cuda/common/driver.h"
#include "cuda/embedding/bag_exact.cuh"
#include "cuda/embedding/catch_up.h"
#include "cuda/embedding/lookup.h"
#include "cuda/embedding/optimizer.h"

namespace rk {
namespace cuda {

static Tensors embedding_bag_exact_cuda(const Tensors& weights, const Tensors& states,
                                        const Tensors& last_steps, const Tensors& histories,
                                        const Tensors& indices, const Tensors& offsets,
                                        const Tensors& per_sample_weights, const Ints& tables,
                                        const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows,
                                        const Ints& known, const Names& names,
                                        const std::vector<double>& clocks, bool concat) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   &names};
  Forward forward(weights, args, concat);
  forward.launch_features(
      args,
      [&](size_t f) {
        ExactBags bags{};
        static_cast<Bags&>(bags) = forward.features[f];
        const CatchUp& table = all[tables[f]];
        bags.state[0] = table.state[0], bags.state[1] = table.state[1], bags.stride_sr = table.stride_sr;
        bags.last_steps = table.last_steps, bags.clock = table;
        bags.packed = bags.packed && table.packed;
        bags.log2_lanes =
            log2_lanes(bags.packed ? bags.D * states[2 * tables[f]].element_size() / 16 : bags.D);
        return bags;
      },
      [](auto* type, const Device& device, const Batch<ExactBags>& batch, int64_t blocks, Report* report) {
        device.launch(embedding_bag_exact<std::remove_pointer_t<decltype(type)>>, blocks, 0, batch, report);
      });
  return std::move(forward.outs);
}

static Tensors embedding_bag_exact_update_cuda(const OptionalTensors& grad_outs, const Tensors& weights,
                                               const Tensors& states, const Tensors& last_steps,
                                               const Tensors& histories, const Tensors& indices,
                                               const Tensors& offsets, const Tensors& per_sample_weights,
                                               const Ints& tables, const Ints& modes, const Ints& padding_idx,
                                               const Ints& frozen_rows, const Ints& known,
                                               const std::vector<double>& hyper,
                                               const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   nullptr};
  check_optimizer("embedding_bag_update", kAdamW, weights.size(), states.size(), hyper.size());
  std::vector<ExactUpdate> updates(weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table("embedding_bag_update", weights[t], t);
    static_cast<Update&>(updates[t]) =
        make_cuda_update("embedding_bag_update", kAdamW, hyper.data() + hyper_of(kAdamW) * t, weights[t],
                         states.data() + 2 * t);
    updates[t].clock = all[t], updates[t].last_steps = all[t].last_steps;
  }
  return step_on_gradients(args, grad_outs, weights, std::move(updates),
                           [](auto* type, const Device& device, const Batch<ExactUpdate>& batch,
                              const Gradients& gradients, int lanes) {
                             device.launch(embedding_update_exact<std::remove_pointer_t<decltype(type)>>,
                                           blocks_for(gradients.n, lanes), 0, batch, gradients, lanes);
                           });
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  if (rk::cuda::refusal() != rk::cuda::Refusal::none) return;
  m.impl("embedding_bag_exact", TORCH_BOX(&rk::cuda::embedding_bag_exact_cuda));
  m.impl("embedding_bag_exact_update", TORCH_BOX(&rk::cuda::embedding_bag_exact_update_cuda));
}
