// The kernels and the mathematics are in segment_sum_kernel.h and lookup_kernel.h.
#include "cpu/embedding/sorted_lookups.h"

#include <algorithm>
#include <atomic>

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/radix_sort.h"
#include "cpu/tuning.h"

namespace rk {

// Lookups of a tile. The order of the sums follows from it, so no machine's cache or threads may change it.
constexpr int64_t kTile = 256;

// Whether each lookup has a gradient of its own: those of one bag differ. Else it is its bag's.
static bool has_own_gradients(const Bags& bag) { return bag.mode == kMax || bag.per_sample_weights; }

SortedLookups::SortedLookups(const BackwardArgs& backward) {
  place_lookups(backward);
  write_keys(backward);
  sort(backward.rows);
}

void SortedLookups::place_lookups(const BackwardArgs& backward) {
  const FeatureArgs& args = backward.args;
  const std::vector<Bags>& bags = backward.features.bags;
  const Tensors& grads = backward.grads;
  const size_t num_tables = backward.rows.size();
  first_.assign(num_tables + 1, 0);
  first_grad_.assign(num_tables + 1, 0);
  bool scaled = false;
  offsets_.resize(bags.size());
  max_grad_rows_.resize(bags.size(), grads[0]);
  for (size_t f = 0; f < bags.size(); ++f) {
    const Bags& bag = bags[f];
    int64_t &lookups = first_[args.tables[f] + 1], &gradients = first_grad_[args.tables[f] + 1];
    offsets_[f] = {lookups, gradients};
    lookups += bag.B ? bag.N : 0;
    gradients += bag.B && has_own_gradients(bag) ? bag.N : bag.B;
    scaled |= bag.mode == kMean || bag.per_sample_weights;
    if (bag.mode == kMax) max_grad_rows_[f] = torch::stable::new_empty(grads[f], {bag.N, bag.D});
  }
  first_key_.assign(1, 0);
  for (size_t t = 0; t < num_tables; ++t) {
    first_[t + 1] += first_[t];
    first_grad_[t + 1] += first_grad_[t];
    first_key_.push_back(first_key_.back() + backward.rows[t] + 1);  // the last is that of lookups left out
  }
  for (size_t f = 0; f < bags.size(); ++f) {
    offsets_[f].lookup += first_[args.tables[f]];
    offsets_[f].grad += first_grad_[args.tables[f]];
  }
  const int64_t num_grads = first_grad_.back();
  const int key_bits = bits_of(first_key_.back());
  shift_ = bits_of(num_grads);
  RK_CHECK(key_bits + shift_ <= 64, "embedding_bag_backward: too many rows and ids, ", first_key_.back(),
           " and ", num_grads);
  sorted_ = uninitialized<uint64_t>(first_.back());
  grad_rows_ = uninitialized<const void*>(num_grads);
  if (scaled) factors_ = uninitialized<double>(num_grads);
}

void SortedLookups::write_keys(const BackwardArgs& backward) {
  const FeatureArgs& args = backward.args;
  const Features& features = backward.features;
  Tensors factors = args.per_sample_weights;
  for (size_t f = 0; f < factors.size(); ++f)
    if (features.bags[f].per_sample_weights)
      factors[f] = torch::stable::contiguous(torch::stable::to(factors[f], ScalarType::Double));
  const BagTasks plan(features);
  std::atomic<bool> in_range{true};
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const BagTask& part = plan.tasks[task];
    const size_t f = part.f;
    const Bags& bag = features.bags[f];
    const int64_t t = args.tables[f];
    const Range range{part.b0, part.b1};
    LookupKeys keys{};
    keys.first_key = first_key_[t];
    keys.skipped_key = first_key_[t + 1] - 1;
    keys.frozen_row = args.frozen_rows[t];
    keys.first_grad = offsets_[f].grad;
    keys.shift = shift_;
    keys.one_each = has_own_gradients(bag);
    if (!RK_DISPATCH_ISA(embedding_keys, bag, keys, range, sorted_.get() + offsets_[f].lookup)) {
      in_range = false;
      return;
    }
    if (bag.mode == kMax)
      dispatch_floating(backward.grads[f].scalar_type(), [&](auto* type) {
        auto* grad_rows = static_cast<decltype(type)>(max_grad_rows_[f].mutable_data_ptr());
        RK_DISPATCH_ISA(embedding_max_grad_rows, bag, range, grad_rows);
      });
    const double* weights =
        bag.per_sample_weights ? static_cast<const double*>(factors[f].const_data_ptr()) : nullptr;
    write_gradients(bag, f, weights, backward.grads[f].element_size(), range);
  });
  if (!in_range)
    for (size_t f = 0; f < args.size(); ++f) features.check_range(args, f);
}

void SortedLookups::write_gradients(const Bags& bag, size_t f, const double* weights, int64_t item_bytes,
                                    Range range) {
  const void** grad_rows = grad_rows_.get() + offsets_[f].grad;
  double* factors = factors_ ? factors_.get() + offsets_[f].grad : nullptr;
  const bool is_max = bag.mode == kMax;
  const char* grad = static_cast<const char*>(is_max ? max_grad_rows_[f].const_data_ptr() : bag.out);
  const int64_t stride = (is_max ? bag.D : bag.stride_ob) * item_bytes;
  dispatch_ids(bag, [&](const auto* ids) {
    const auto count = [&](int64_t b) -> int64_t {
      const int64_t p0 = bag.begin(b), p1 = bag.begin(b + 1);
      if (bag.mode != kMean) return 1;
      return std::max<int64_t>(1, p1 - p0 - std::count(ids + p0, ids + p1, bag.padding_idx));
    };
    if (weights) {
      for (int64_t b = range.begin; b < range.end; ++b)
        for (int64_t p = bag.begin(b), n = count(b); p < bag.begin(b + 1); ++p) {
          grad_rows[p] = grad + b * stride;
          factors[p] = weights[p] / n;
        }
      return;
    }
    const int64_t i0 = is_max ? bag.begin(range.begin) : range.begin,
                  i1 = is_max ? bag.begin(range.end) : range.end;
    for (int64_t i = i0; i < i1; ++i) grad_rows[i] = grad + i * stride;
    if (factors)
      for (int64_t i = i0; i < i1; ++i) factors[i] = bag.mode == kMean ? 1. / count(i) : 1;
  });
}

// Each table by itself: fewer bits than all tables' keys have, and a batch's lookups in one table fit in L2.
// Long tables are sorted one after another, each by all threads.
void SortedLookups::sort(const Ints& rows) {
  const int64_t num_tables = rows.size(), N = first_.back();
  auto other = uninitialized<uint64_t>(N);
  const auto sort_table = [&](int64_t t) {
    radix_sort(sorted_.get() + first_[t], other.get() + first_[t], first_[t + 1] - first_[t],
               first_key_[t] << shift_, shift_, bits_of(rows[t]));
  };
  run_tasks(num_tables, 4 * N, [&](int64_t t) {
    if (first_[t + 1] - first_[t] < kSortedByAll) sort_table(t);
  });
  int64_t end = 0;
  for (int64_t t = 0; t < num_tables; ++t) {
    if (first_[t + 1] - first_[t] >= kSortedByAll) sort_table(t);
    uint64_t *from = sorted_.get() + first_[t], *to = sorted_.get() + first_[t + 1];
    to = std::lower_bound(from, to, (first_key_[t + 1] - 1) << shift_);
    if (end != first_[t]) std::copy(from, to, sorted_.get() + end);
    end += to - from;
  }
  segments_.sorted = sorted_.get();
  segments_.n = end;
  segments_.shift = shift_;
  segments_.grad_rows = grad_rows_.get();
  segments_.factors = factors_.get();
}

int64_t SortedLookups::tiles() const { return (segments_.n + kTile - 1) / kTile; }

int64_t SortedLookups::table_of(uint64_t key) const {
  return std::upper_bound(first_key_.begin(), first_key_.end(), key) - first_key_.begin() - 1;
}

static int64_t count_starts(const Segments& lookups, int64_t p0, int64_t p1) {
  int64_t n = 0;
  for (int64_t p = p0; p < p1; ++p) n += p == 0 || lookups.key(p - 1) != lookups.key(p);
  return n;
}

int64_t SortedLookups::segments_before(int64_t p) const {
  if (segments_before_tile_.empty()) return 0;
  return segments_before_tile_[p / kTile] + count_starts(segments_, p / kTile * kTile, p);
}

Ints SortedLookups::count_rows() {
  segments_before_tile_.assign(tiles() + 1, 0);
  run_tasks(tiles(), segments_.n, [&](int64_t tile) {
    segments_before_tile_[tile + 1] =
        count_starts(segments_, tile * kTile, std::min(segments_.n, (tile + 1) * kTile));
  });
  for (int64_t tile = 0; tile < tiles(); ++tile)
    segments_before_tile_[tile + 1] += segments_before_tile_[tile];
  Ints counts;
  for (const uint64_t key : first_key_) {
    const uint64_t* at =
        std::lower_bound(segments_.sorted, segments_.sorted + segments_.n, key << segments_.shift);
    segments_before_table_.push_back(segments_before(at - segments_.sorted));
    if (segments_before_table_.size() > 1)
      counts.push_back(segments_before_table_.back() -
                       segments_before_table_[segments_before_table_.size() - 2]);
  }
  return counts;
}

void SortedLookups::reduce(std::vector<TableGrad> tables, const std::vector<ScalarType>& dtypes,
                           const Ints& widths) const {
  if (segments_.n == 0) return;
  for (size_t t = 0; t < tables.size(); ++t) {
    tables[t].first_key = first_key_[t];
    tables[t].first_grad = first_grad_[t];
    tables[t].D = widths[t];
  }
  const int64_t width = *std::max_element(widths.begin(), widths.end());
  const int64_t sum_bytes = width * sizeof(double);
  const auto carry_bytes = uninitialized<char>(2 * tiles() * sum_bytes);
  const Carries carries{carry_bytes.get(), sum_bytes};
  const auto rows_before = [&](int64_t t, int64_t p) {
    return segments_before_table_.empty() ? 0 : segments_before(p) - segments_before_table_[t];
  };
  constexpr int64_t kTask = kTile * kTilesPerTask;
  run_tasks((segments_.n + kTask - 1) / kTask, segments_.n * (width + kLookupOverhead), [&](int64_t task) {
    auto scratch = uninitialized<double>(std::max(kChunkValues, kFewestLookups * width));
    const int64_t end = std::min(segments_.n, (task + 1) * kTask);
    for (int64_t p0 = task * kTask, p1; p0 < end; p0 = p1) {
      const int64_t t = table_of(segments_.key(p0));
      const uint64_t next = first_key_[t + 1] << segments_.shift;
      p1 = std::lower_bound(segments_.sorted + p0, segments_.sorted + end, next) - segments_.sorted;
      dispatch_floating(dtypes[t], [&](auto* type) {
        const SegmentSum sum{segments_, tables[t], carries, kTile, rows_before(t, p0)};
        RK_DISPATCH_ISA(embedding_reduce<std::remove_pointer_t<decltype(type)>>, sum, {p0, p1},
                        scratch.get());
      });
    }
  });
  run_tasks(tiles() - 1, segments_.n, [&](int64_t tile) {
    const int64_t p0 = tile * kTile, p1 = p0 + kTile;
    const uint64_t key = segments_.key(p1);
    const bool goes_on = segments_.key(p1 - 1) == key,
               started_before = p0 > 0 && segments_.key(p0 - 1) == key;
    if (!goes_on || started_before) return;
    const int64_t t = table_of(key);
    dispatch_floating(dtypes[t], [&](auto* type) {
      const SegmentSum sum{segments_, tables[t], carries, kTile, rows_before(t, p1) - 1};
      RK_DISPATCH_ISA(embedding_join<std::remove_pointer_t<decltype(type)>>, sum, p1);
    });
  });
}

}  // namespace rk
