// An optimizer's step on the rows that a batch looked up, on a GPU: checks, launches, registration. The
// kernel and its mathematics are in optimizer.cuh.
#include "cuda/embedding/optimizer.h"

namespace rk {
namespace cuda {

Update make_cuda_update(const char* op, int64_t optimizer, const double* hyper, const Tensor& weight,
                        const Tensor* states) {
  auto u = make_update<Update>(op, optimizer, hyper, weight, states);
  u.R = weight.size(0);
  u.D = checked_int32(weight.size(1), "the width of a table");
  RK_CHECK(on_device(weight), op, ": a table must be on a GPU");
  u.packed = rows_aligned(weight) && u.D * weight.element_size() % 16 == 0;
  for (size_t i = 0; i < states_of(optimizer); ++i) {
    const Tensor& state = states[i];
    RK_CHECK(on_device_of(state, weight), op, ": state ", i, " of a table of shape ", shape_of(weight),
             " must be on the table's device");
    if (state.dim() > 1) u.packed = u.packed && packs_fit(state, weight);
  }
  return u;
}

// Calls the kernel.
static auto stepper(int64_t optimizer) {
  return [=](auto* type, const Device& device, const Batch<Update>& batch, const Gradients& gradients,
             int lanes) {
    device.launch(embedding_update<std::remove_pointer_t<decltype(type)>>, blocks_for(gradients.n, lanes), 0,
                  batch, gradients, static_cast<Optimizer>(optimizer), lanes);
  };
}

// The step in the backward: does not wait for the device.
static Tensors embedding_bag_update_cuda(const OptionalTensors& grad_outs, const Tensors& weights,
                                         const Tensors& states, const Tensors& indices,
                                         const Tensors& offsets, const Tensors& per_sample_weights,
                                         const Ints& tables, const Ints& modes, const Ints& padding_idx,
                                         const Ints& frozen_rows, const Ints& known, int64_t optimizer,
                                         const std::vector<double>& hyper) {
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   nullptr};
  check_optimizer("embedding_bag_update", optimizer, weights.size(), states.size(), hyper.size());
  std::vector<Update> updates;
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table("embedding_bag_update", weights[t], t);
    updates.push_back(make_cuda_update("embedding_bag_update", optimizer,
                                       hyper.data() + hyper_of(optimizer) * t, weights[t],
                                       states.data() + t * states_of(optimizer)));
  }
  return step_on_gradients(args, grad_outs, weights, std::move(updates), stepper(optimizer));
}

// A step on the rows of a coalesced sparse gradient.
static void sparse_update_cuda(const Tensor& weight, const Tensors& states, const Tensor& rows,
                               const Tensor& values, int64_t optimizer, const std::vector<double>& hyper) {
  check_optimizer("sparse_update", optimizer, 1, states.size(), hyper.size());
  Update u = make_cuda_update("sparse_update", optimizer, hyper.data(), weight, states.data());
  check_sparse(weight, rows, values);
  RK_CHECK(on_device_of(rows, weight) && on_device_of(values, weight),
           "sparse_update: rows and values must be on the table's device");
  const Tensor keys = torch::stable::contiguous(rows), grads = unit_stride_rows(values);
  u.packed = u.packed && rows_aligned(grads);
  const Device device(weight);
  launch_updates(device, weight.scalar_type(), std::vector<Update>{u},
                 {static_cast<const int64_t*>(keys.const_data_ptr()), grads.const_data_ptr(), nullptr,
                  keys.size(0), grads.stride(0)},
                 stepper(optimizer));
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  m.impl("embedding_bag_update", TORCH_BOX(&rk::cuda::embedding_bag_update_cuda));
  m.impl("sparse_update", TORCH_BOX(&rk::cuda::sparse_update_cuda));
}
