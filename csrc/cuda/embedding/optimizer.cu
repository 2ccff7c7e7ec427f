// An optimizer's step on the rows that a batch looked up, on a GPU: checks, launches, registration. The
// kernel and its mathematics are in optimizer.cuh.
#include "cuda/embedding/backward.h"
#include "cuda/embedding/optimizer.cuh"
#include "embedding/backward.h"
#include "embedding/optimizer.h"

namespace rk {
namespace cuda {

static Update make_cuda_update(const char* op, int64_t optimizer, const double* hyper, const Tensor& weight,
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
    if (state.dim() == 1) continue;
    const uintptr_t pack = 16 / weight.element_size() * state.element_size();
    u.packed = u.packed && reinterpret_cast<uintptr_t>(u.state[i]) % pack == 0 &&
               u.stride_sr * state.element_size() % pack == 0;
  }
  return u;
}

// One launch for as many tables of a dtype as go with it.
static void launch_updates(const Device& device, ScalarType dtype, const std::vector<Update>& updates,
                           int64_t optimizer, const Gradients& gradients) {
  dispatch_floating(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Batch<Update> batch;
    int64_t pieces = 1;
    const auto launch = [&] {
      const int lanes = log2_lanes(pieces);
      device.launch(embedding_update<T>, blocks_for(gradients.n, lanes), 0, batch, gradients,
                    static_cast<Optimizer>(optimizer), lanes);
      batch.n = 0;
    };
    for (const Update& u : updates) {
      if (u.R == 0 || u.D == 0) continue;
      if (batch.n == Batch<Update>::kItems) launch();
      batch.items[batch.n++] = u;
      pieces = std::max<int64_t>(pieces, u.packed ? u.D / kPack<T> : u.D);
    }
    if (batch.n) launch();
  });
}

// The step in the backward: does not wait for the device.
static Tensors embedding_bag_update_cuda(const OptionalTensors& grad_outs, const Tensors& weights,
                                         const Tensors& states, const Tensors& indices,
                                         const Tensors& offsets, const Tensors& per_sample_weights,
                                         const Ints& tables, const Ints& modes, const Ints& padding_idx,
                                         const Ints& frozen_rows, int64_t optimizer,
                                         const std::vector<double>& hyper) {
  const FeatureArgs args{indices, offsets,     per_sample_weights, tables,
                         modes,   padding_idx, frozen_rows,        nullptr};
  check_optimizer("embedding_bag_update", optimizer, weights.size(), states.size(), hyper.size());
  const Ints rows = rows_of(weights);
  std::vector<Update> updates;
  int64_t first_key = 0;
  for (size_t t = 0; t < weights.size(); ++t) {
    updates.push_back(make_cuda_update("embedding_bag_update", optimizer,
                                       hyper.data() + hyper_of(optimizer) * t, weights[t],
                                       states.data() + t * states_of(optimizer)));
    updates[t].first_key = first_key;
    first_key += updates[t].R;
  }
  check_apart(weights);
  auto [runs, grad_per_sample_weights] = run_gradients(args, grad_outs, weights, rows);
  const Device device(weights[0]);
  for (const Tensor& values : runs.values) {
    std::vector<Update> of_dtype;
    for (size_t t = 0; t < weights.size(); ++t)
      if (weights[t].scalar_type() == values.scalar_type()) of_dtype.push_back(updates[t]);
    const Gradients gradients{
        static_cast<const int64_t*>(runs.keys.const_data_ptr()), values.const_data_ptr(),
        static_cast<const int64_t*>(runs.ranks.const_data_ptr()) + runs.n - 1, runs.n, values.size(1)};
    launch_updates(device, values.scalar_type(), of_dtype, optimizer, gradients);
  }
  return std::move(grad_per_sample_weights);
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
  launch_updates(device, weight.scalar_type(), {u}, optimizer,
                 {static_cast<const int64_t*>(keys.const_data_ptr()), grads.const_data_ptr(), nullptr,
                  keys.size(0), grads.stride(0)});
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  m.impl("embedding_bag_update", TORCH_BOX(&rk::cuda::embedding_bag_update_cuda));
  m.impl("sparse_update", TORCH_BOX(&rk::cuda::sparse_update_cuda));
}
