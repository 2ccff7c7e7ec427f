// Lookups of tables under exact Adam, and its fused step: each row is read and written as often as lazy
// Adam's. A lookup computes what its rows have come to and leaves them as they are; the step, which has to
// write them, takes what they missed before its own. The mathematics is in catch_up_kernel.h.
#include "cpu/embedding/backward.h"
#include "cpu/embedding/catch_up.h"
#include "cpu/embedding/lookup.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/radix_sort.h"
#include "cpu/tuning.h"

namespace rk {
namespace {

// Bags of one feature, pooled from rows that lie in L1: some bags' rows are caught up there, then looked up.
template <class T>
class CaughtUpBags {
 public:
  CaughtUpBags(const CatchUp& table, const Bags& bags) : table_(table), bags_(bags) {}

  // Bags [b0, b1). Returns whether their ids are in the table.
  bool look_up(int64_t b0, int64_t b1) {
    if (bags_.are_rows())
      return caught_up({b0, b1}, static_cast<T*>(bags_.out) + b0 * bags_.stride_ob, bags_.stride_ob);
    for (int64_t b = b0, end; b < b1; b = end) {
      end = b + 1;
      while (end < b1 && bags_.begin(end + 1) - bags_.begin(b) <= kIdleLookups) ++end;
      if (!pool(b, end)) return false;
    }
    return true;
  }

 private:
  bool caught_up(Range lookups, T* out, int64_t stride_out) const {
    return RK_DISPATCH_ISA(embedding_caught_up_rows<T>, table_, bags_, lookups, out, stride_out);
  }

  bool pool(int64_t b, int64_t end) {
    const int64_t p0 = bags_.begin(b), n = bags_.begin(end) - p0, D = bags_.D;
    if (n > room_) {
      room_ = std::max(n, kIdleLookups);
      rows_ = uninitialized<T>(room_ * D);
      ids_.resize(room_);
    }
    if (!caught_up({p0, p0 + n}, rows_.get(), D)) return false;
    Bags local = bags_;
    local.weight = rows_.get(), local.stride_wr = D, local.R = n + 1;
    local.ids = ids_.data(), local.wide_ids = true, local.N = n, local.B = end - b;
    if (local.padding_idx >= 0) local.padding_idx = n;
    dispatch_ids(bags_, [&](const auto* ids) {
      for (int64_t j = 0; j < n; ++j) ids_[j] = ids[p0 + j] == bags_.padding_idx ? n : j;
    });
    if (bags_.starts) {
      starts_.clear();
      for (int64_t i = b; i <= end; ++i) starts_.push_back(bags_.starts[i] - p0);
      local.starts = starts_.data();
    }
    local.out = static_cast<T*>(bags_.out) + b * bags_.stride_ob;
    if (bags_.per_sample_weights)
      local.per_sample_weights = static_cast<const T*>(bags_.per_sample_weights) + p0;
    return RK_DISPATCH_ISA(embedding_bags<T>, local, {0, end - b});
  }

  const CatchUp& table_;
  const Bags& bags_;
  int64_t room_ = 0;
  std::unique_ptr<T[]> rows_;
  std::vector<int64_t> ids_, starts_;
};

Tensors embedding_bag_exact_cpu(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                                const Tensors& histories, const Tensors& indices, const Tensors& offsets,
                                const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                                const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                                const Names& names, const std::vector<double>& clocks, bool concat) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const ForwardArgs forward(
      weights, {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, &names},
      concat);
  forward.for_each_part([&](size_t f, int64_t b0, int64_t b1) {
    bool in_range = true;
    dispatch_floating(forward.dtype(f), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      in_range = CaughtUpBags<T>(all[tables[f]], forward.features.bags[f]).look_up(b0, b1);
    });
    return in_range;
  });
  return forward.outs;
}

Tensors embedding_bag_exact_update_cpu(const OptionalTensors& grad_outs, const Tensors& weights,
                                       const Tensors& states, const Tensors& last_steps,
                                       const Tensors& histories, const Tensors& indices,
                                       const Tensors& offsets, const Tensors& per_sample_weights,
                                       const Ints& tables, const Ints& modes, const Ints& padding_idx,
                                       const Ints& frozen_rows, const Ints& known,
                                       const std::vector<double>& hyper, const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const Ints rows = rows_of(weights);
  const BackwardArgs backward(
      grad_outs, weights, rows,
      {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, nullptr});
  return update_tables(backward, weights, states, kAdamW, hyper, {}, all.data());
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_bag_exact", TORCH_BOX(&rk::embedding_bag_exact_cpu));
  m.impl("embedding_bag_exact_update", TORCH_BOX(&rk::embedding_bag_exact_update_cpu));
}
