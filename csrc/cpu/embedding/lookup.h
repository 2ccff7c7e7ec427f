// The embedding op's forward: its arguments, checked, and the lookups of any part of a batch.
#pragma once

#include <atomic>

#include "cpu/embedding/features.h"
#include "cpu/runtime/parallel.h"

namespace rk {

struct ForwardArgs {
  FeatureArgs args;
  Features features;
  Tensors tables;  // rows of unit stride
  // [B, sum of the widths + extra_columns] with concat, else one tensor a feature.
  Tensors outs;

  ForwardArgs(const Tensors& weights, const FeatureArgs& args, bool concat, int64_t extra_columns = 0);
  ScalarType dtype(size_t f) const { return tables[args.tables[f]].scalar_type(); }
  // Writes bags [b0, b1) of feature f, or does nothing and returns false: an id is outside its table.
  bool look_up(size_t f, int64_t b0, int64_t b1) const;
  // Calls look_up(feature, first bag, end) for parts of all lookups, on all threads. Raises where it returns
  // false: an id is outside its table.
  template <class LookUp>
  void for_each_part(const LookUp& look_up) const;
  // Raises for the first id outside its table.
  void check_range() const;
};

template <class LookUp>
void ForwardArgs::for_each_part(const LookUp& look_up) const {
  const BagTasks plan(features);
  std::atomic<bool> in_range{true};
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    if (!look_up(f, b0, b1)) in_range = false;
  });
  if (!in_range) check_range();
}

}  // namespace rk
