// Rows of tables under exact Adam, brought up to the last step: those that a batch looks up, or all of them.
// And the steps' part in it: their history, and the step of the rows that they touched. The mathematics is in
// catch_up_kernel.h.
#include "cpu/embedding/catch_up.h"

#include "cpu/embedding/features.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"
#include "cpu/tuning.h"
#include "embedding/catch_up.h"

namespace rk {

std::vector<CatchUp> catch_ups(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                               const Tensors& histories, const std::vector<double>& clocks) {
  return make_catch_ups<CatchUp, Update>(weights, states, last_steps, histories, clocks,
                                         [](const Tensor& t, const Tensor&) { return t.is_cpu(); });
}

namespace {

// Idle rows of one table, found one by one and caught up chunk by chunk, so that a chunk's memory is there
// when its turn comes.
template <class T>
class Chunks {
 public:
  explicit Chunks(const CatchUp& table)
      : table_(table),
        most_(std::max<int64_t>(kFewestIdle, std::min(kMostIdle, kIdleValues / (table.D + 1)))) {}
  ~Chunks() {
    run(now_);
    run(next_);
  }

  void add(int64_t row, int32_t last) {
    prefetch(row, last > 0);
    next_.rows[next_.n++] = {row, last};
    if (next_.n < most_) return;
    run(now_);
    std::swap(now_, next_);
  }

 private:
  struct Chunk {
    IdleRow rows[kMostIdle];
    int64_t n = 0;
  };

  void prefetch(int64_t row, bool moments) const {
    using A = Accumulator<T>;
    const auto lines = [](const auto* p, int64_t n) {
      for (const char *at = reinterpret_cast<const char*>(p), *end = at + n * sizeof(*p); at < end;
           at += kCacheLine)
        __builtin_prefetch(at, 1);
    };
    lines(static_cast<const T*>(table_.weight) + row * table_.stride_wr, table_.D);
    for (const void* state : table_.state)
      if (moments) lines(static_cast<const A*>(state) + row * table_.stride_sr, table_.D);
  }
  void run(Chunk& chunk) const {
    if (chunk.n) RK_DISPATCH_ISA(embedding_catch_up_rows<T>, table_, chunk.rows, chunk.n);
    chunk.n = 0;
  }

  const CatchUp& table_;
  const int64_t most_;
  Chunk now_, next_;
};

// Of the rows that several lookups name, one thread claims each: the others see it as current, and it will be
// once all are done. Ids outside the table are left to the lookup's own error.
template <class T>
void catch_up_bags(const CatchUp& table, const Bags& bags, int64_t b0, int64_t b1) {
  Chunks<T> chunks(table);
  dispatch_ids(bags, [&](const auto* ids) {
    const int64_t p0 = bags.begin(b0), p1 = bags.begin(b1);
    const auto is_row = [&](int64_t id) {
      return static_cast<uint64_t>(id) < static_cast<uint64_t>(table.R);
    };
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t ahead = ids[std::min(p + kIdleAhead, p1 - 1)], id = ids[p];
      if (is_row(ahead)) __builtin_prefetch(table.last_steps + ahead, 1);
      if (!is_row(id)) continue;
      int32_t last = __atomic_load_n(table.last_steps + id, __ATOMIC_RELAXED);
      if (table.is_idle(last) &&
          __atomic_compare_exchange_n(table.last_steps + id, &last, table.current(last), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        chunks.add(id, last);
    }
  });
}

template <class T>
void catch_up_range(const CatchUp& table, int64_t r0, int64_t r1) {
  Chunks<T> chunks(table);
  for (int64_t row = r0; row < r1; ++row) {
    const int32_t last = table.last_steps[row];
    if (!table.is_idle(last)) continue;
    table.last_steps[row] = table.current(last);
    chunks.add(row, last);
  }
}

// The features of tables of these sizes, for their ids alone.
Features features_of(const FeatureArgs& args, const std::vector<CatchUp>& tables) {
  Features features(args, tables.size());
  for (size_t f = 0; f < args.size(); ++f) {
    const CatchUp& table = tables[args.tables[f]];
    features.bags[f].R = table.R;
    features.bags[f].D = table.D;
  }
  return features;
}

void embedding_catch_up_cpu(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                            const Tensors& histories, const Tensors& indices, const Tensors& offsets,
                            const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                            const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                            const Names& names, const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   &names};
  const Features features = features_of(args, all);
  const BagTasks plan(features);
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const CatchUp& table = all[tables[f]];
    dispatch_floating(weights[tables[f]].scalar_type(), [&, f = f, b0 = b0, b1 = b1](auto* type) {
      catch_up_bags<std::remove_pointer_t<decltype(type)>>(table, features.bags[f], b0, b1);
    });
  });
}

void embedding_catch_up_all_cpu(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                                const Tensors& histories, const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  std::vector<BagTask> tasks;
  int64_t work = 0;
  for (size_t t = 0; t < all.size(); ++t) {
    work += all[t].R * (all[t].D + kLookupOverhead);
    for (int64_t r = 0; r < all[t].R; r += kFlushRows)
      tasks.push_back({t, r, std::min(all[t].R, r + kFlushRows)});
  }
  run_tasks(tasks.size(), work, [&](int64_t task) {
    const auto [t, r0, r1] = tasks[task];
    dispatch_floating(weights[t].scalar_type(), [&, t = t, r0 = r0, r1 = r1](auto* type) {
      catch_up_range<std::remove_pointer_t<decltype(type)>>(all[t], r0, r1);
    });
  });
}

// The rows that a step moved, by the lookups whose gradients it took, are as of that step.
void embedding_mark_steps_cpu(const Tensors& last_steps, const Tensors& indices, const Tensors& offsets,
                              const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                              const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                              const Ints& steps) {
  RK_CHECK(steps.size() == last_steps.size(), "embedding_mark_steps: steps must have one entry a table, ",
           last_steps.size(), ", got ", steps.size());
  std::vector<CatchUp> all(last_steps.size());
  for (size_t t = 0; t < all.size(); ++t) {
    all[t].R = last_steps[t].numel();
    all[t].last_steps =
        last_steps_of("embedding_mark_steps", last_steps[t], all[t].R, last_steps[t].is_cpu());
  }
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   nullptr};
  const Features features = features_of(args, all);
  const BagTasks plan(features);
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bags = features.bags[f];
    const int64_t padding = bags.padding_idx, frozen = frozen_rows[tables[f]], p1 = bags.begin(b1);
    const uint64_t R = bags.R;
    int32_t* last = all[tables[f]].last_steps;
    const int32_t step = static_cast<int32_t>(steps[tables[f]]);
    dispatch_ids(bags, [&, b0 = b0](const auto* ids) {
      for (int64_t p = bags.begin(b0); p < p1; ++p) {
        const int64_t id = ids[p];
        if (static_cast<uint64_t>(id) < R && id != padding && id != frozen)
          __atomic_store_n(last + id, step, __ATOMIC_RELAXED);
      }
    });
  });
}

struct Math {
  static double sqrt(double x) { return std::sqrt(x); }
  static double exp(double x) { return std::exp(x); }
  static double expm1(double x) { return std::expm1(x); }
};

// Adds a step to the history of a clock that starts at `base`.
void adam_history_cpu(const Tensor& history, int64_t base, int64_t step, double beta1, double beta2,
                      double lr, double decay_before, double decay_after) {
  const HistoryStep added =
      make_history_step(history, history.is_cpu(), base, step, beta1, beta2, lr, decay_before, decay_after);
  added.begin(Math());
  for (int64_t k = added.n; k > 0; --k) added.add(k, Math());
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_catch_up", TORCH_BOX(&rk::embedding_catch_up_cpu));
  m.impl("embedding_catch_up_all", TORCH_BOX(&rk::embedding_catch_up_all_cpu));
  m.impl("embedding_mark_steps", TORCH_BOX(&rk::embedding_mark_steps_cpu));
  m.impl("adam_history", TORCH_BOX(&rk::adam_history_cpu));
}
