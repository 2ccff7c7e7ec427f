#include "cpu/embedding/features.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/runtime/isa.h"
#include "cpu/runtime/parallel.h"
#include "cpu/tuning.h"

namespace rk {

bool ids_in_range(const Bags& bags, int64_t b0, int64_t b1) {
  return RK_DISPATCH_ISA(embedding_ids_in_range, bags, {bags.begin(b0), bags.begin(b1)});
}

// Where the bags start and the last one ends.
static std::vector<int64_t> starts_of(const FeatureArgs& args, size_t f, int64_t N) {
  const bool wide = check_integers(args, f, "offsets of ", args.offsets[f]);
  const Tensor offsets = torch::stable::contiguous(args.offsets[f]);
  const int64_t B = offsets.size(0);
  std::vector<int64_t> starts(B + 1, N);
  if (wide)
    std::copy_n(static_cast<const int64_t*>(offsets.const_data_ptr()), B, starts.begin());
  else
    std::copy_n(static_cast<const int32_t*>(offsets.const_data_ptr()), B, starts.begin());
  RK_CHECK_BAG(starts[0] == 0 || B == 0, "offsets of ", args.name(f), " must start at 0, got ", starts[0]);
  for (int64_t b = 0; b < B; ++b)
    RK_CHECK_BAG(starts[b] <= starts[b + 1], "offsets of ", args.name(f),
                 " must not decrease and not exceed ", N, ", the number of ids: offsets[", b,
                 "] = ", starts[b], " is before ", starts[b + 1]);
  return starts;
}

Features::Features(const FeatureArgs& args, size_t num_tables) {
  const size_t n = args.indices.size();
  check_lengths(args, num_tables);
  bags.resize(n);
  starts.resize(n);
  keepalive.reserve(4 * n);
  for (size_t f = 0; f < n; ++f) {
    const Tensor& ids = args.indices[f];
    Bags& bag = bags[f];
    bag.wide_ids = check_integers(args, f, "", ids);
    RK_CHECK_BAG(ids.is_cpu(), args.name(f), " must be on cpu like its table");
    const bool pooled = args.modes[f] != kNone, jagged = check_bags(args, f);
    // torch's contiguous looks its operator up by name at each call, 0.2 us.
    keepalive.push_back(ids.is_contiguous() ? ids : torch::stable::contiguous(ids));
    bag.ids = keepalive.back().const_data_ptr();
    bag.N = ids.numel();
    bag.mode = args.modes[f];
    bag.padding_idx = pooled ? args.padding_idx[f] : -1;
    if (jagged) {
      starts[f] = starts_of(args, f, bag.N);
      bag.starts = starts[f].data();
    } else {
      bag.L = pooled ? ids.size(1) : 1;
    }
    bag.B = count_bags(args, f, jagged);
    if (args.has_factors(f)) {
      check_factors(args, f);
      keepalive.push_back(torch::stable::contiguous(args.per_sample_weights[f]));
      bag.per_sample_weights = keepalive.back().const_data_ptr();
    }
  }
  if (!args.known.empty()) find_rows(args);
}

template <class I>
static void write_rows(const Known& known, const I* ids, int64_t* rows, Range lookups) {
  if (known.unknown == Unknown::row) {  // by a conditional move: as fast whatever the ids are
    const uint64_t size = known.size;
    for (int64_t p = lookups.begin; p < lookups.end; ++p)
      rows[p] = uint64_t(int64_t(ids[p])) < size ? ids[p] : int64_t(size - 1);
    return;
  }
  for (int64_t p = lookups.begin; p < lookups.end; ++p) rows[p] = known.row_of(ids[p]);
}

void Features::find_rows(const FeatureArgs& args) {
  struct Task {
    size_t f;
    const Bags ids;
    Range lookups;
  };
  std::vector<Task> tasks;
  int64_t work = 0;
  rows.resize(bags.size());
  for (size_t f = 0; f < bags.size(); ++f) {
    Bags& bag = bags[f];
    if (args.known_of(f).unknown == Unknown::error) continue;
    for (int64_t p = 0; p < bag.N; p += kLookupTaskWork)
      tasks.push_back({f, bag, {p, std::min(bag.N, p + kLookupTaskWork)}});
    work += bag.N;
    rows[f].reset(new int64_t[bag.N]);
    bag.ids = rows[f].get();
    bag.wide_ids = true;
  }
  run_tasks(tasks.size(), work, [&](int64_t i) {
    const auto& [f, bag, lookups] = tasks[i];
    const Known known = args.known_of(f);
    int64_t* to = rows[f].get();
    dispatch_ids(bag, [&, lookups = lookups](const auto* ids) { write_rows(known, ids, to, lookups); });
  });
}

void Features::check_range(const FeatureArgs& args, size_t f) const {
  const Bags& bag = bags[f];
  for (int64_t p = 0; p < bag.N; ++p) {
    const int64_t id =
        bag.wide_ids ? static_cast<const int64_t*>(bag.ids)[p] : static_cast<const int32_t*>(bag.ids)[p];
    RK_CHECK(id >= 0 && id < bag.R, out_of_range(args, f, p, id, bag.R));
  }
}

BagTasks::BagTasks(const Features& features) {
  for (const Bags& bag : features.bags) work += lookup_work(bag);
  const int64_t task_work =
      std::max(kLookupTaskWork, work / (kTasksPerThread * torch::stable::get_num_threads()));
  for (size_t f = 0; f < features.bags.size(); ++f) {
    const Bags& bag = features.bags[f];
    if (bag.B == 0) continue;
    const int64_t pieces = std::min(bag.B, lookup_work(bag) / task_work + 1);
    for (int64_t i = 0; i < pieces; ++i) tasks.push_back({f, bag.B * i / pieces, bag.B * (i + 1) / pieces});
  }
}

}  // namespace rk
