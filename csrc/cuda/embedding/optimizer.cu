// An optimizer's step on the rows that a batch looked up, on a GPU: checks, launches, registration. The
// kernel and its mathematics are in optimizer.cuh.
#include "cuda/common/driver.h"
#include "cuda/embedding/fold.cuh"
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

// The tensors that a table's states end with where lr, the number of the step and the loss scale are on the
// device: count, lr, scale, skip (ops/_rules.py: Live), each one float32.
constexpr size_t kLive = 4;

// Whether the tables' states are followed by those. Raises if they are anything else.
static bool is_live(const char* op, int64_t optimizer, size_t tables, const Tensors& states, size_t hyper) {
  const bool known = optimizer >= 0 && optimizer < int64_t(std::size(kRules));
  const bool live = known && tables > 0 && states.size() == tables * (states_of(optimizer) + kLive);
  check_optimizer(op, optimizer, tables, live ? tables * states_of(optimizer) : states.size(), hyper);
  return live;
}

// Launches embedding_fold for all tables; what it writes.
template <class U>
static Tensor fold(const char* op, int64_t optimizer, const Tensors& weights, const Tensors& states,
                   const std::vector<U>& updates) {
  const size_t each = states_of(optimizer) + kLive;
  RK_CHECK(weights.size() <= UINT16_MAX, op, ": at most ", UINT16_MAX, " tables, got ", weights.size());
  const Tensor folded =
      torch::stable::new_empty(weights[0], {int64_t(weights.size() * sizeof(Now))}, ScalarType::Byte);
  const Device device(weights[0]);
  Batch<Live> batch;
  const auto launch = [&] {
    device.launch(embedding_fold, blocks_for(batch.n, 0), 0, batch, static_cast<Optimizer>(optimizer));
    batch.n = 0;
  };
  for (size_t t = 0; t < weights.size(); ++t) {
    float* of_table[kLive];
    for (size_t i = 0; i < kLive; ++i) {
      const Tensor& value = states[t * each + each - kLive + i];
      RK_CHECK(
          value.numel() == 1 && value.scalar_type() == ScalarType::Float && on_device_of(value, weights[t]),
          op, ": count, lr, scale and skip of a table must each be one float32 on its device, got shape ",
          shape_of(value), " and ", name_of(value.scalar_type()));
      of_table[i] = static_cast<float*>(value.data_ptr());
    }
    if (batch.n == Batch<Live>::kItems) launch();
    batch.items[batch.n++] = {of_table[0],
                              of_table[1],
                              of_table[2],
                              of_table[3],
                              static_cast<Now*>(folded.mutable_data_ptr()) + t,
                              updates[t].beta1,
                              updates[t].beta2};
  }
  if (batch.n) launch();
  return folded;
}

// Calls the kernel. `*live`, by then: what embedding_fold wrote, or null.
static auto stepper(int64_t optimizer, const Now* const* live) {
  return [=](auto* type, const Device& device, const auto& batch, const Gradients& gradients, int lanes) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto* kernel) {
      device.launch(kernel, blocks_for(gradients.n, lanes), 0, batch, gradients,
                    static_cast<Optimizer>(optimizer), lanes, *live);
    };
    if constexpr (std::is_same_v<decltype(batch), const Batch<Update>&>)
      launch(&embedding_update<T>);
    else
      launch(&embedding_update_rounded<T>);
  };
}

// Calls step(updates), as they are or, where one of them is rounded stochastically, all as RoundedUpdates.
template <class Step>
static auto with_rounding(const char* op, int64_t optimizer, const std::vector<double>& hyper,
                          const std::vector<Update>& updates, const Step& step) {
  std::vector<RoundedUpdate> rounded;
  bool any = false;
  for (size_t t = 0; t < updates.size(); ++t) {
    const Rounding r = rounding_of(op, hyper.data() + hyper_of(optimizer) * t);
    rounded.push_back({updates[t], r.key, r.count});
    any = any || r.key;
  }
  return any ? step(rounded) : step(updates);
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
  const char* op = "embedding_bag_update";
  const bool live = is_live(op, optimizer, weights.size(), states, hyper.size());
  const size_t each = states_of(optimizer) + (live ? kLive : 0);
  std::vector<Update> updates;
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table(op, weights[t], t);
    updates.push_back(make_cuda_update(op, optimizer, hyper.data() + hyper_of(optimizer) * t, weights[t],
                                       states.data() + t * each));
    updates[t].number = static_cast<uint16_t>(t);
  }
  return with_rounding(op, optimizer, hyper, updates, [&](const auto& all) {
    Tensor folded;
    const Now* now = nullptr;
    return step_on_gradients(args, grad_outs, weights, all, stepper(optimizer, &now), [&] {
      if (!live) return;
      folded = fold(op, optimizer, weights, states, all);
      now = static_cast<const Now*>(folded.const_data_ptr());
    });
  });
}

// A step on the rows of a coalesced sparse gradient.
static void sparse_update_cuda(const Tensor& weight, const Tensors& states, const Tensor& rows,
                               const Tensor& values, int64_t optimizer, const std::vector<double>& hyper) {
  const bool live = is_live("sparse_update", optimizer, 1, states, hyper.size());
  Update u = make_cuda_update("sparse_update", optimizer, hyper.data(), weight, states.data());
  check_sparse(weight, rows, values);
  RK_CHECK(on_device_of(rows, weight) && on_device_of(values, weight),
           "sparse_update: rows and values must be on the table's device");
  const Tensor keys = torch::stable::contiguous(rows), grads = unit_stride_rows(values);
  u.packed = u.packed && rows_aligned(grads);
  with_rounding("sparse_update", optimizer, hyper, {u}, [&](const auto& all) {
    const Tensor folded = live ? fold("sparse_update", optimizer, {weight}, states, all) : Tensor();
    const Now* now = live ? static_cast<const Now*>(folded.const_data_ptr()) : nullptr;
    const Device device(weight);
    launch_updates(device, weight.scalar_type(), all,
                   {keys.const_data_ptr(), true, grads.const_data_ptr(), keys.size(0), grads.stride(0)},
                   stepper(optimizer, &now));
  });
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  if (rk::cuda::refusal() != rk::cuda::Refusal::none) return;
  m.impl("embedding_bag_update", TORCH_BOX(&rk::cuda::embedding_bag_update_cuda));
  m.impl("sparse_update", TORCH_BOX(&rk::cuda::sparse_update_cuda));
}
