// The kernels and the mathematics are in segment_sum_kernel.h and lookup_kernel.h.
#include "cpu/embedding/sorted_lookups.h"

#include <cstring>

#include "cpu/runtime/dispatch.h"
#include "cpu/simd/non_temporal.h"
#include "cpu/tuning.h"

namespace rk {

// Lookups of a tile. The order of the sums follows from it, so no machine's cache or threads may change it.
constexpr int64_t kTile = 256;

#define RK_CHECK_BACKWARD(condition, ...) RK_CHECK(condition, "embedding_bag_backward: ", __VA_ARGS__)

static const Tensor& first_of(const OptionalTensors& tensors) {
  const auto given = std::find_if(tensors.begin(), tensors.end(), [](const auto& t) { return bool(t); });
  RK_CHECK_BACKWARD(given != tensors.end(), "grad_outs has no gradient");
  return **given;
}

// Whether the gradient has the leading dimensions of what the feature's lookups gave.
static bool is_like_result(const Tensor& grad, const Bags& bag, const Tensor& ids) {
  if (bag.mode != kNone) return grad.dim() == 2 && grad.size(0) == bag.B;
  const auto shape = ids.sizes(), got = grad.sizes();
  return got.size() == shape.size() + 1 && std::equal(shape.begin(), shape.end(), got.begin());
}

static std::string shape_of_result(const Bags& bag, const Tensor& ids) {
  if (bag.mode != kNone) return "[" + std::to_string(bag.B) + ", D]";
  const std::string shape = shape_of(ids);
  return shape == "[]" ? "[D]" : shape.substr(0, shape.size() - 1) + ", D]";
}

BackwardArgs::BackwardArgs(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
                           const FeatureArgs& args)
    : args(args), features(args, rows.size()), rows(rows), any(first_of(grad_outs)) {
  const size_t n = args.indices.size();
  RK_CHECK_BACKWARD(grad_outs.size() == n, "grad_outs must have one entry a feature, ", n, ", got ",
                    grad_outs.size());
  int64_t all_rows = 0;
  for (size_t t = 0; t < rows.size(); ++t) {
    RK_CHECK_BACKWARD(rows[t] >= 0 && rows[t] < kMostRows - all_rows, "rows[", t,
                      "] must be a table's number of rows, got ", rows[t]);
    all_rows += rows[t];
  }
  check_padding(args, [&](size_t t) { return rows[t]; });
  grads.assign(n, any);
  widths.assign(rows.size(), 0);
  like.assign(rows.size(), nullptr);
  bool need_values = false;
  for (size_t f = 0; f < n; ++f) {
    Bags& bag = features.bags[f];
    const int64_t t = args.tables[f];
    bag.R = rows[t];
    if (!grad_outs[f]) {
      bag.B = 0;  // adds nothing
      continue;
    }
    const Tensor& given = *grad_outs[f];
    RK_CHECK_BACKWARD(is_floating(given.scalar_type()), "grad_outs[", f,
                      "] must be float32, float64, float16 or bfloat16, got ", name_of(given.scalar_type()));
    RK_CHECK_BACKWARD(is_like_result(given, bag, args.indices[f]), "grad_outs[", f, "] must be ",
                      shape_of_result(bag, args.indices[f]), " like the result, got shape ", shape_of(given));
    const int64_t D = given.size(given.dim() - 1);
    RK_CHECK_BACKWARD(!like[t] || (D == widths[t] && like[t]->scalar_type() == given.scalar_type()),
                      "grad_outs[", f, "] must have the width and the dtype of the others of its table, ",
                      widths[t], " and ", name_of(like[t]->scalar_type()), ", got shape ", shape_of(given),
                      " and ", name_of(given.scalar_type()));
    grads[f] = unit_stride_rows(given);
    const Tensor& grad = grads[f];
    widths[t] = bag.D = D;
    like[t] = &grad;
    bag.out = const_cast<void*>(grad.const_data_ptr());
    bag.stride_ob = grad.dim() == 2 ? grad.stride(0) : D;
    features.check_factors(args, f, grad.scalar_type());
    need_values |= bag.mode == kMax || bag.per_sample_weights;
  }
  RK_CHECK_BACKWARD(weights.size() == rows.size() || (weights.empty() && !need_values),
                    "weights must have one entry a table, ", rows.size(), ", got ", weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor& w = weights[t];
    check_table("embedding_bag_backward", w, t);
    RK_CHECK_BACKWARD(w.size(0) == rows[t] &&
                          (!like[t] || (w.size(1) == widths[t] && w.scalar_type() == like[t]->scalar_type())),
                      "weights[", t, "] must have ", rows[t], " rows",
                      like[t] ? " of the gradient's width and dtype, " + std::to_string(widths[t]) + " and " +
                                    name_of(like[t]->scalar_type())
                              : "",
                      ", got shape ", shape_of(w), " and ", name_of(w.scalar_type()));
    tables.push_back(unit_stride_rows(w));
  }
  for (size_t f = 0; f < n && need_values; ++f) {
    features.bags[f].weight = tables[args.tables[f]].const_data_ptr();
    features.bags[f].stride_wr = tables[args.tables[f]].stride(0);
  }
}

Tensors BackwardArgs::factor_grads() const {
  Tensors grad_factors;
  for (const Tensor& w : args.per_sample_weights)
    grad_factors.push_back(torch::stable::new_empty(w, w.sizes()));
  zero(grad_factors);
  const BagTasks plan(features);
  run_tasks(grad_factors.empty() ? 0 : plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bag = features.bags[f];
    if (!bag.per_sample_weights) return;
    dispatch_floating(grads[f].scalar_type(), [&, f = f, b0 = b0, b1 = b1](auto* type) {
      auto* grad_factor = static_cast<decltype(type)>(grad_factors[f].mutable_data_ptr());
      RK_DISPATCH_ISA(embedding_factor_grad, bag, {b0, b1}, grad_factor);
    });
  });
  return grad_factors;
}

SortedLookups::SortedLookups(const BackwardArgs& backward) {
  const FeatureArgs& args = backward.args;
  const Features& features = backward.features;
  const Tensors& grads = backward.grads;
  const size_t n = features.bags.size(), num_tables = backward.rows.size();
  // A lookup's gradient is that of its bag; or, where those of one bag differ, its own.
  const auto one_each = [](const Bags& bag) { return bag.mode == kMax || bag.per_sample_weights; };
  // What belongs to a table lies together: first_[t] and first_grad_[t] are the first lookup and the first
  // gradient of table t, place[f] and place_grad[f] of feature f.
  first_.assign(num_tables + 1, 0);
  first_grad_.assign(num_tables + 1, 0);
  Ints place(n), place_grad(n);
  bool scaled = false;
  max_grad_rows_.resize(n, grads[0]);
  Tensors kept;
  std::vector<const double*> weights(n);
  for (size_t f = 0; f < n; ++f) {
    const Bags& bag = features.bags[f];
    place[f] = first_[args.tables[f] + 1];
    place_grad[f] = first_grad_[args.tables[f] + 1];
    first_[args.tables[f] + 1] += bag.B ? bag.N : 0;
    first_grad_[args.tables[f] + 1] += bag.B && one_each(bag) ? bag.N : bag.B;
    scaled |= bag.mode == kMean || bag.per_sample_weights;
    if (bag.per_sample_weights) {
      kept.push_back(
          torch::stable::contiguous(torch::stable::to(args.per_sample_weights[f], ScalarType::Double)));
      weights[f] = static_cast<const double*>(kept.back().const_data_ptr());
    }
    if (bag.mode == kMax) max_grad_rows_[f] = torch::stable::new_empty(grads[f], {bag.N, bag.D});
  }
  first_key_.assign(1, 0);
  for (size_t t = 0; t < num_tables; ++t) {
    first_[t + 1] += first_[t];
    first_grad_[t + 1] += first_grad_[t];
    first_key_.push_back(first_key_.back() + backward.rows[t] + 1);  // the last is that of lookups left out
  }
  for (size_t f = 0; f < n; ++f) {
    place[f] += first_[args.tables[f]];
    place_grad[f] += first_grad_[args.tables[f]];
  }
  const int64_t N = first_.back(), num_grads = first_grad_.back();
  const int key_bits = bits_of(first_key_.back()), shift = bits_of(num_grads);
  RK_CHECK(key_bits + shift <= 64, "embedding_bag_backward: too many rows and ids, ", first_key_.back(),
           " and ", num_grads);
  sorted_ = uninitialized<uint64_t>(N);
  grad_rows_ = uninitialized<const void*>(num_grads);
  if (scaled) factors_ = uninitialized<double>(num_grads);

  const BagTasks plan(features);
  std::atomic<bool> fit{true};
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bag = features.bags[f];
    const int64_t t = args.tables[f], item = grads[f].element_size();
    const LookupKeys keys{first_key_[t], first_key_[t + 1] - 1, args.frozen_rows[t], place_grad[f],
                          shift,         one_each(bag)};
    dispatch_ids(bag, [&, f = f, b0 = b0, b1 = b1](const auto* ids) {
      if (!RK_DISPATCH_ISA(embedding_keys, bag, keys, {b0, b1}, sorted_.get() + place[f])) {
        fit = false;
        return;
      }
      if (bag.mode == kMax)
        dispatch_floating(grads[f].scalar_type(), [&](auto* type) {
          auto* grad_rows = static_cast<decltype(type)>(max_grad_rows_[f].mutable_data_ptr());
          RK_DISPATCH_ISA(embedding_max_grad_rows, bag, {b0, b1}, grad_rows);
        });
      const void** grad_rows = grad_rows_.get() + place_grad[f];
      double* factors = scaled ? factors_.get() + place_grad[f] : nullptr;
      const char* grad =
          static_cast<const char*>(bag.mode == kMax ? max_grad_rows_[f].const_data_ptr() : bag.out);
      const int64_t stride = (bag.mode == kMax ? bag.D : bag.stride_ob) * item;
      const auto count = [&](int64_t b) -> int64_t {
        const int64_t p0 = bag.begin(b), p1 = bag.begin(b + 1);
        if (bag.mode != kMean) return 1;
        return std::max<int64_t>(1, p1 - p0 - std::count(ids + p0, ids + p1, bag.padding_idx));
      };
      if (bag.per_sample_weights) {
        for (int64_t b = b0; b < b1; ++b)
          for (int64_t p = bag.begin(b), n = count(b); p < bag.begin(b + 1); ++p) {
            grad_rows[p] = grad + b * stride;
            factors[p] = weights[f][p] / n;
          }
        return;
      }
      const int64_t i0 = one_each(bag) ? bag.begin(b0) : b0, i1 = one_each(bag) ? bag.begin(b1) : b1;
      for (int64_t i = i0; i < i1; ++i) grad_rows[i] = grad + i * stride;
      if (scaled)
        for (int64_t i = i0; i < i1; ++i) factors[i] = bag.mode == kMean ? 1. / count(i) : 1;
    });
  });
  if (!fit)
    for (size_t f = 0; f < n; ++f) features.check_range(args, f);

  // Each table by itself: fewer bits than all tables' keys have, and a batch's lookups in one table fit in a
  // near cache. Long tables are sorted one after another, each by all threads.
  auto other = uninitialized<uint64_t>(N);
  const auto sort = [&](int64_t t) {
    radix_sort(sorted_.get() + first_[t], other.get() + first_[t], first_[t + 1] - first_[t],
               first_key_[t] << shift, shift, bits_of(backward.rows[t]));
  };
  run_tasks(num_tables, 4 * N, [&](int64_t t) {
    if (first_[t + 1] - first_[t] < kSortedByAll) sort(t);
  });
  int64_t end = 0;
  for (size_t t = 0; t < num_tables; ++t) {
    if (first_[t + 1] - first_[t] >= kSortedByAll) sort(t);
    uint64_t *from = sorted_.get() + first_[t], *to = sorted_.get() + first_[t + 1];
    to = std::lower_bound(from, to, (first_key_[t + 1] - 1) << shift);
    if (end != first_[t]) std::copy(from, to, sorted_.get() + end);
    end += to - from;
  }
  segments_ = {sorted_.get(), end, shift, grad_rows_.get(), factors_.get()};
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

void zero(const Tensors& tensors) {
  int64_t all_bytes = 0;
  std::vector<std::pair<char*, int64_t>> chunks;
  for (const Tensor& t : tensors) {
    char* begin = static_cast<char*>(t.data_ptr());
    const int64_t bytes = t.numel() * t.element_size();
    all_bytes += bytes;
    for (int64_t i = 0; i < bytes; i += kZeroBytes)
      chunks.emplace_back(begin + i, std::min(kZeroBytes, bytes - i));
  }
  run_tasks(chunks.size(), chunks.size() * kZeroBytes / 64, [&](int64_t i) {
    auto [p, bytes] = chunks[i];
    if (is_non_temporal(p, all_bytes)) {
      const int64_t rest = bytes % kCacheLine, lines = bytes - rest;
      RK_DISPATCH_ISA(zero_lines, p, lines);
      p += lines;
      bytes = rest;
    }
    std::memset(p, 0, bytes);
  });
}

}  // namespace rk
