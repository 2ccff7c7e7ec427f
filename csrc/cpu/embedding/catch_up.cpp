// Rows of tables under exact Adam, brought up to the last step: those that a batch looks up, or all of them.
// And the steps' part in it: their history, and the step of the rows that they touched. The mathematics is in
// catch_up_kernel.h.
#include "cpu/embedding/catch_up.h"

#include <cmath>

#include "cpu/embedding/features.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"
#include "cpu/tuning.h"
#include "embedding/optimizer.h"

#define RK_CHECK_CATCH_UP(condition, ...) RK_CHECK(condition, "embedding_catch_up: ", __VA_ARGS__)

namespace rk {
namespace {

// A table's clock: step, base, decay, eps.
constexpr size_t kClock = 4;
constexpr int64_t kHistoryWidth = sizeof(AdamStart) / sizeof(double);

void check_history(const char* op, const Tensor& history) {
  RK_CHECK(history.is_cpu() && history.dim() == 2 && history.size(1) == kHistoryWidth &&
               history.scalar_type() == ScalarType::Double && history.is_contiguous(),
           op, ": a history must be float64 [S, ", kHistoryWidth, "], contiguous, got ",
           name_of(history.scalar_type()), " ", shape_of(history));
}

int32_t* last_steps_of(const char* op, const Tensor& last, int64_t R) {
  RK_CHECK(last.is_cpu() && last.dim() == 1 && last.size(0) == R && last.scalar_type() == ScalarType::Int &&
               last.is_contiguous(),
           op, ": last_steps must be int32 [", R, "], contiguous, got ", name_of(last.scalar_type()), " ",
           shape_of(last));
  return static_cast<int32_t*>(last.mutable_data_ptr());
}

}  // namespace

std::vector<CatchUp> catch_ups(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                               const Tensors& histories, const std::vector<double>& clocks) {
  const size_t n = weights.size();
  RK_CHECK_CATCH_UP(
      states.size() == 2 * n && last_steps.size() == n && histories.size() == n &&
          clocks.size() == kClock * n,
      "of each table there must be 2 states, last_steps, a history and a clock of 4 numbers, got ",
      states.size(), ", ", last_steps.size(), ", ", histories.size(), " and ", clocks.size(), " for ", n);
  std::vector<CatchUp> all;
  for (size_t t = 0; t < n; ++t) {
    const double hyper[] = {0, 0, 0, 0, 0, 1, 1, 0};  // what all optimizers have
    const auto u =
        make_update<Update>("embedding_catch_up", kAdamW, hyper, weights[t], states.data() + 2 * t);
    check_history("embedding_catch_up", histories[t]);
    CatchUp c{};
    c.weight = u.weight, c.stride_wr = u.stride_wr, c.R = weights[t].size(0), c.D = weights[t].size(1);
    c.state[0] = u.state[0], c.state[1] = u.state[1], c.stride_sr = u.stride_sr;
    c.last_steps = last_steps_of("embedding_catch_up", last_steps[t], c.R);
    c.history = static_cast<const AdamStart*>(histories[t].const_data_ptr());
    const double* clock = clocks.data() + kClock * t;
    c.step = static_cast<int64_t>(clock[0]), c.base = static_cast<int64_t>(clock[1]);
    c.decay = clock[2], c.eps = clock[3];
    RK_CHECK_CATCH_UP(0 <= c.base && c.base <= c.step && c.step - c.base < histories[t].size(0),
                      "the history of table ", t, " must reach from step ", c.base, " to ", c.step,
                      ", got shape ", shape_of(histories[t]));
    all.push_back(c);
  }
  return all;
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
                            const Ints& padding_idx, const Ints& frozen_rows, const Names& names,
                            const std::vector<double>& clocks) {
  const std::vector<CatchUp> all = catch_ups(weights, states, last_steps, histories, clocks);
  const FeatureArgs args{indices, offsets,     per_sample_weights, tables,
                         modes,   padding_idx, frozen_rows,        &names};
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
                              const Ints& padding_idx, const Ints& frozen_rows, const Ints& steps) {
  RK_CHECK(steps.size() == last_steps.size(), "embedding_mark_steps: steps must have one entry a table, ",
           last_steps.size(), ", got ", steps.size());
  std::vector<CatchUp> all(last_steps.size());
  for (size_t t = 0; t < all.size(); ++t) {
    all[t].R = last_steps[t].numel();
    all[t].last_steps = last_steps_of("embedding_mark_steps", last_steps[t], all[t].R);
  }
  const FeatureArgs args{indices, offsets,     per_sample_weights, tables,
                         modes,   padding_idx, frozen_rows,        nullptr};
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

// Adds step number `step` of rate lr to the history of a clock that starts at `base`; decay_before and
// decay_after are the product of all (1 - lr weight_decay) without and with its own.
void adam_history_cpu(const Tensor& history, int64_t base, int64_t step, double beta1, double beta2,
                      double lr, double decay_before, double decay_after) {
  check_history("adam_history", history);
  RK_CHECK(0 <= base && base < step && step - base < history.size(0), "adam_history: step ", step,
           " must lie after base ", base, " and fit into a history of shape ", shape_of(history));
  auto* starts = static_cast<AdamStart*>(history.mutable_data_ptr());
  const double log_beta2 = std::log(beta2), corrected = lr / (1 - std::pow(beta1, step)) / decay_after;
  // The steps that count come about so long after t; nothing more comes of the last ones.
  const double delay = std::ceil(1 / (1 - beta1));
  const int64_t window = beta1 > 0 ? static_cast<int64_t>(std::ceil(std::log(1e-18) / std::log(beta1))) : 0;
  AdamStart& fresh = starts[step - 1 - base];
  const double t = static_cast<double>(step - 1);
  fresh.centre = std::sqrt(std::exp(delay * log_beta2) / -std::expm1((t + delay) * log_beta2));
  fresh.decay = decay_before;
  std::fill_n(fresh.term, kAdamTerms, 0.);
  const double root2 = std::sqrt(-std::expm1(step * log_beta2));
  for (int64_t k = std::min(window, step - base); k > 0; --k) {
    AdamStart& start = starts[step - k - base];
    const double r = std::sqrt(std::sqrt(starts[k].power2) / (root2 * start.centre)), tau = (1 - r) / (1 + r);
    double term = corrected * starts[k].power1 / r;
    start.term[0] += term;
    term *= 2;
    for (int n = 1; n < kAdamTerms; ++n) start.term[n] += term *= tau;
  }
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_catch_up", TORCH_BOX(&rk::embedding_catch_up_cpu));
  m.impl("embedding_catch_up_all", TORCH_BOX(&rk::embedding_catch_up_all_cpu));
  m.impl("embedding_mark_steps", TORCH_BOX(&rk::embedding_mark_steps_cpu));
  m.impl("adam_history", TORCH_BOX(&rk::adam_history_cpu));
}
