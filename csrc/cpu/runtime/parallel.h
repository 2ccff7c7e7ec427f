// Tasks of unequal length on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/tuning.h"

namespace rk {

// Calls body(task) for every task in [0, tasks); `work`: elements read by all. Each thread takes the next
// task when it is done with its last, so which thread runs a task is left to chance: a task must not write
// what another reads.
template <class Body>
void run_tasks(int64_t tasks, int64_t work, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1 || work < kSerialWork) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  });
}

}  // namespace rk
