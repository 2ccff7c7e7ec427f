// The embedding op's backward: lookups sorted by row, summed tile by tile. The kernels and the mathematics
// are in embedding_bag_backward.h and embedding_bag.h.
#include <cstring>
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "embedding_bag_features.h"
#include "embedding_bag_sort.h"
#include "memory.h"

namespace rk {

RK_DECLARE_ISA(template <class I> bool embedding_ids_fit(const Bags&, const I*, int64_t, int64_t))
RK_DECLARE_ISA(template <class T, class I>
               void embedding_max_grad_rows(const Bags&, const I*, T*, int64_t, int64_t))
RK_DECLARE_ISA(template <class T, class I>
               void embedding_factor_grad(const Bags&, const I*, T*, int64_t, int64_t))
RK_DECLARE_ISA(template <class T>
               void embedding_reduce(const Runs&, const TableGrad&, int64_t, int64_t, void*, void*))
RK_DECLARE_ISA(template <class T>
               void embedding_join(const Runs&, const TableGrad&, int64_t, int64_t, char*, int64_t))

// Lookups of a tile. A constant: the order of the sums follows from it.
constexpr int64_t kTile = 256;

// The lookups of all features, sorted by (table, row); those without a gradient come last, after the n of
// `runs`.
struct SortedLookups {
  std::unique_ptr<uint64_t[]> sorted;
  std::unique_ptr<const void*[]> grad_rows;
  std::unique_ptr<double[]> factors;
  Tensors max_grad_rows;
  std::vector<uint64_t> first_key;  // of each table, and the end of the last
  Runs runs;
};

static SortedLookups sort_lookups(const FeatureArgs& args, const Features& features, const Tensors& grads,
                                  const Ints& rows) {
  SortedLookups s;
  const size_t n = features.bags.size();
  s.first_key.assign(1, 0);
  for (const int64_t r : rows) s.first_key.push_back(s.first_key.back() + r);
  const uint64_t skipped = s.first_key.back();
  std::vector<int64_t> first(1, 0);  // lookup of each feature
  bool scaled = false;
  s.max_grad_rows.resize(n, grads[0]);
  Tensors kept;
  std::vector<const double*> weights(n);
  for (size_t f = 0; f < n; ++f) {
    const Bags& bag = features.bags[f];
    first.push_back(first.back() + (bag.B ? bag.N : 0));
    scaled |= bag.mode == kMean || bag.per_sample_weights;
    if (bag.per_sample_weights) {
      kept.push_back(
          torch::stable::contiguous(torch::stable::to(args.per_sample_weights[f], ScalarType::Double)));
      weights[f] = static_cast<const double*>(kept.back().const_data_ptr());
    }
    if (bag.mode == kMax) s.max_grad_rows[f] = torch::stable::new_empty(grads[f], {bag.N, bag.D});
  }
  const int64_t N = first.back();
  const int key_bits = bits_of(skipped), shift = bits_of(N);
  STD_TORCH_CHECK(key_bits + shift <= 64, "embedding_bag_backward: too many rows and ids, ", skipped, " and ",
                  N);
  s.sorted = uninitialized<uint64_t>(N);
  s.grad_rows = uninitialized<const void*>(N);
  if (scaled) s.factors = uninitialized<double>(N);

  const BagTasks plan(features);
  std::atomic<bool> fit{true};
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bag = features.bags[f];
    const int64_t frozen = args.frozen_rows[args.tables[f]];
    const uint64_t first_key = s.first_key[args.tables[f]];
    const int64_t item = grads[f].element_size();
    dispatch_ids(bag, [&, f = f, b0 = b0, b1 = b1](const auto* ids) {
      if (!RK_DISPATCH_ISA(embedding_ids_fit, bag, ids, bag.begin(b0), bag.begin(b1))) {
        fit = false;
        return;
      }
      if (bag.mode == kMax)
        dispatch_floating(grads[f].scalar_type(), [&](auto* type) {
          auto* grad_rows = static_cast<decltype(type)>(s.max_grad_rows[f].mutable_data_ptr());
          RK_DISPATCH_ISA(embedding_max_grad_rows, bag, ids, grad_rows, b0, b1);
        });
      const char* grad_rows =
          static_cast<const char*>(bag.mode == kMax ? s.max_grad_rows[f].const_data_ptr() : bag.out);
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t p0 = bag.begin(b), p1 = bag.begin(b + 1);
        int64_t count = 1;
        if (bag.mode == kMean)
          count = std::max<int64_t>(1, p1 - p0 - std::count(ids + p0, ids + p1, bag.padding_idx));
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t i = first[f] + p;
          const bool skip = ids[p] == bag.padding_idx || ids[p] == frozen;
          s.sorted[i] = (skip ? skipped : first_key + ids[p]) << shift | i;
          s.grad_rows[i] = grad_rows + (bag.mode == kMax ? p * bag.D : b * bag.stride_ob) * item;
          if (scaled) s.factors[i] = (weights[f] ? weights[f][p] : 1.) / count;
        }
      }
    });
  });
  if (!fit)
    for (size_t f = 0; f < n; ++f) features.check_range(args, f);

  radix_sort(s.sorted, N, shift, key_bits);
  const uint64_t* end = std::lower_bound(s.sorted.get(), s.sorted.get() + N, skipped << shift);
  s.runs = {s.sorted.get(), end - s.sorted.get(), shift, s.grad_rows.get(), s.factors.get()};
  return s;
}

// Adds up every row's gradient into the tables' [R, D].
static void reduce(const SortedLookups& s, const Tensors& grad_weights, const Ints& widths) {
  const Runs& runs = s.runs;
  const int64_t tiles = (runs.n + kTile - 1) / kTile, width = *std::max_element(widths.begin(), widths.end());
  const int64_t carry_bytes = 2 * width * sizeof(double);
  auto carries = uninitialized<char>(tiles * carry_bytes);
  const auto table_of = [&](uint64_t key) {
    return std::upper_bound(s.first_key.begin(), s.first_key.end(), key) - s.first_key.begin() - 1;
  };
  const auto table_grad = [&](int64_t t) {
    return TableGrad{s.first_key[t], widths[t], grad_weights[t].data_ptr()};
  };
  run_tasks(tiles, runs.n * (width + 16), [&](int64_t tile) {
    auto scratch = uninitialized<double>(width);
    const int64_t end = std::min(runs.n, (tile + 1) * kTile);
    for (int64_t p0 = tile * kTile, p1; p0 < end; p0 = p1) {
      const int64_t t = table_of(runs.key(p0));
      p1 = std::lower_bound(runs.sorted + p0, runs.sorted + end, s.first_key[t + 1] << runs.shift) -
           runs.sorted;
      dispatch_floating(grad_weights[t].scalar_type(), [&](auto* type) {
        RK_DISPATCH_ISA(embedding_reduce<std::remove_pointer_t<decltype(type)>>, runs, table_grad(t), p0, p1,
                        carries.get() + tile * carry_bytes, scratch.get());
      });
    }
  });
  // A run that goes on after its first tile ends: its key is not that of the tile's first lookup, or starts
  // there.
  run_tasks(tiles - 1, runs.n, [&](int64_t tile) {
    const int64_t p0 = tile * kTile, p1 = p0 + kTile;
    const uint64_t key = runs.key(p1);
    if (runs.key(p1 - 1) != key || (p0 > 0 && runs.key(p0 - 1) == key)) return;
    const int64_t t = table_of(key);
    dispatch_floating(grad_weights[t].scalar_type(), [&](auto* type) {
      RK_DISPATCH_ISA(embedding_join<std::remove_pointer_t<decltype(type)>>, runs, table_grad(t), p1, kTile,
                      carries.get() + tile * carry_bytes, carry_bytes);
    });
  });
}

static void zero(const Tensors& tensors) {
  constexpr int64_t kChunk = 1 << 20;
  std::vector<std::pair<char*, int64_t>> chunks;
  for (const Tensor& t : tensors) {
    char* begin = static_cast<char*>(t.data_ptr());
    const int64_t bytes = t.numel() * t.element_size();
    for (int64_t i = 0; i < bytes; i += kChunk) chunks.emplace_back(begin + i, std::min(kChunk, bytes - i));
  }
  run_tasks(chunks.size(), chunks.size() * kChunk / 64,
            [&](int64_t i) { std::memset(chunks[i].first, 0, chunks[i].second); });
}

static std::tuple<Tensors, Tensors> embedding_bag_backward_cpu(
    const std::vector<std::optional<Tensor>>& grad_outs, const Tensors& weights, const Ints& rows,
    const Tensors& indices, const Tensors& offsets, const Tensors& per_sample_weights, const Ints& tables,
    const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows) {
  const FeatureArgs args{indices, offsets,     per_sample_weights, tables,
                         modes,   padding_idx, frozen_rows,        nullptr};
  Features features(args, rows.size());
  const size_t n = indices.size();
  STD_TORCH_CHECK(grad_outs.size() == n, "embedding_bag_backward: grad_outs must have one entry a feature, ",
                  n, ", got ", grad_outs.size());
  const auto given = std::find_if(grad_outs.begin(), grad_outs.end(), [](const auto& g) { return bool(g); });
  STD_TORCH_CHECK(given != grad_outs.end(), "embedding_bag_backward: grad_outs has no gradient");
  Tensors grads(n, **given), tables_kept;
  for (const Tensor& w : weights) tables_kept.push_back(unit_stride_rows(w));
  Ints widths(rows.size(), 0);
  std::vector<const Tensor*> like(rows.size(), nullptr);
  for (size_t f = 0; f < n; ++f) {
    Bags& bag = features.bags[f];
    bag.R = rows[tables[f]];
    if (!grad_outs[f]) {
      bag.B = 0;  // adds nothing
      continue;
    }
    RK_CHECK_FLOATING("embedding_bag_backward", *grad_outs[f]);
    grads[f] = unit_stride_rows(*grad_outs[f]);
    const Tensor& grad = grads[f];
    const int64_t D = grad.size(grad.dim() - 1), t = tables[f];
    STD_TORCH_CHECK(grad.dim() > 1 && grad.numel() == bag.B * D && (!like[t] || D == widths[t]),
                    "embedding_bag_backward: grad_outs[", f, "] has shape ", shape_of(grad), " for ", bag.B,
                    " bags");
    STD_TORCH_CHECK(!like[t] || like[t]->scalar_type() == grad.scalar_type(),
                    "embedding_bag_backward: grad_outs[", f,
                    "] has another dtype than the others of its table");
    widths[t] = bag.D = D;
    like[t] = &grad;
    bag.out = const_cast<void*>(grad.const_data_ptr());
    bag.stride_ob = grad.dim() == 2 ? grad.stride(0) : D;
    if (bag.mode == kMax || bag.per_sample_weights) {
      STD_TORCH_CHECK(weights.size() == rows.size(),
                      "embedding_bag_backward: weights must have one entry a table, ", rows.size(), ", got ",
                      weights.size());
      const Tensor& w = tables_kept[t];
      STD_TORCH_CHECK(
          w.dim() == 2 && w.size(0) == rows[t] && w.size(1) == D && w.scalar_type() == grad.scalar_type(),
          "embedding_bag_backward: weights[", t, "] has shape ", shape_of(w), " and dtype ",
          name_of(w.scalar_type()), ", its gradient ", rows[t], " rows of shape ", shape_of(grad),
          " and dtype ", name_of(grad.scalar_type()));
      bag.weight = w.const_data_ptr();
      bag.stride_wr = w.stride(0);
      features.check_factors(args, f, grad.scalar_type());
    }
  }
  const SortedLookups sorted = sort_lookups(args, features, grads, rows);

  Tensors grad_weights, grad_factors;
  for (size_t t = 0; t < rows.size(); ++t)
    grad_weights.push_back(like[t] ? new_empty_paged(*like[t], {rows[t], widths[t]})
                                   : torch::stable::new_empty(**given, {0}));
  zero(grad_weights);
  if (sorted.runs.n) reduce(sorted, grad_weights, widths);

  for (const Tensor& w : per_sample_weights) grad_factors.push_back(torch::stable::new_empty(w, w.sizes()));
  zero(grad_factors);
  const BagTasks plan(features);
  run_tasks(grad_factors.empty() ? 0 : plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bag = features.bags[f];
    if (!bag.per_sample_weights) return;
    dispatch_ids(bag, [&, f = f, b0 = b0, b1 = b1](const auto* ids) {
      dispatch_floating(grads[f].scalar_type(), [&](auto* type) {
        auto* grad_factor = static_cast<decltype(type)>(grad_factors[f].mutable_data_ptr());
        RK_DISPATCH_ISA(embedding_factor_grad, bag, ids, grad_factor, b0, b1);
      });
    });
  });
  return {grad_weights, grad_factors};
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_bag_backward", TORCH_BOX(&rk::embedding_bag_backward_cpu));
}
