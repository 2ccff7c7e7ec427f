#include "cpu/serve/user.h"

#include <algorithm>
#include <cstring>

#include "cpu/runtime/isa.h"
#include "cpu/simd/operand.h"
#include "cpu/tuning.h"

namespace rk {

bool pool_rows(const RankRequest& request, const RankLookup& l, int64_t first, int64_t* rows, int64_t room,
               float* out) {
  const FrozenTable& table = request.table(l);
  const int64_t L = request.of(l).width;
  int64_t count = 0;
  std::fill_n(out, table.D, 0.f);
  for (int64_t p = 0; p < L; p += room) {
    const int64_t n = std::min(room, L - p);
    if (!request.rows(l, first + p, n, rows)) return false;
    const int64_t kept = std::remove(rows, rows + n, l.padding_idx) - rows;
    RK_DISPATCH_ISA(frozen_rows, {table, rows, kept, out, 0, true});
    count += kept;
  }
  if (l.mode == kMean && count > 1)
    for (int64_t d = 0; d < table.D; ++d) out[d] /= static_cast<float>(count);
  return true;
}

// Neighbours become one.
static RankRuns joined(RankRuns runs) {
  std::sort(runs.begin(), runs.end(), [](const RankRun& a, const RankRun& b) { return a.begin < b.begin; });
  RankRuns all;
  for (const RankRun& r : runs)
    if (!all.empty() && all.back().end == r.begin)
      all.back().end = r.end;
    else
      all.push_back(r);
  return all;
}

void RankUser::add_field(const RankLookup& l, const float* row, int64_t D) {
  for (int64_t d = 0; d < D; ++d) {
    if (l.weight) logit += l.weight[d] * row[d];
    if (l.fm) add_to_fm(d, row[d]);
  }
}

void RankUser::split_inputs(const RankPlan& plan, RankRuns of_user, RankRuns of_candidates,
                            KeptMemory& memory) {
  if (plan.layers.empty()) return;
  const RankLayer& first = plan.layers[0];
  of_user = joined(std::move(of_user));
  of_candidates = joined(std::move(of_candidates));
  for (const RankRun& r : of_candidates) work += (r.end - r.begin) * first.out;
  float* bias = memory.take(4 * first.groups());
  RK_DISPATCH_ISA(rank_product_of_user, {first.weight, first.groups(), first.in, of_user.data(),
                                         static_cast<int64_t>(of_user.size()), x, bias, first.bias, 0});
  first_bias = bias;
  runs = std::move(of_candidates);
  for (const RankLayer& l : plan.layers)
    if (&l != &first) work += l.in * l.out;
}

namespace {

// A row of the history, as its ids in each table have it, and how often it comes.
struct Row {
  int64_t position;
  float count;
};

// The rows that attend: all but padding, equal ones once.
std::vector<Row> distinct_rows(const RankRequest& request, const RankUnit& u, const int64_t* ids, int64_t L) {
  const RankLookup& first = request.plan.lookups[u.histories[0]];
  const int64_t parts = u.histories.size();
  int64_t end = L;
  if (u.length >= 0) end = std::min(L, std::max<int64_t>(0, request.inputs[u.length].id(0)));
  std::vector<Row> rows;
  for (int64_t l = 0; l < end; ++l)
    if (!u.masked || request.of(first).id(l) != first.padding_idx) rows.push_back({l, 1.f});
  const auto compare = [&](int64_t a, int64_t b) {
    for (int64_t part = 0; part < parts; ++part)
      if (ids[part * L + a] != ids[part * L + b]) return ids[part * L + a] < ids[part * L + b] ? -1 : 1;
    return 0;
  };
  std::sort(rows.begin(), rows.end(), [&](const Row& a, const Row& b) {
    const int order = compare(a.position, b.position);
    return order ? order < 0 : a.position < b.position;
  });
  size_t n = 0;
  for (size_t i = 0; i < rows.size(); ++i)
    if (n && compare(rows[n - 1].position, rows[i].position) == 0)
      rows[n - 1].count += 1;
    else
      rows[n++] = rows[i];
  rows.resize(n);
  return rows;
}

}  // namespace

bool RankUser::add_history(const RankRequest& request, const RankUnit& u, KeptMemory& memory) {
  const int64_t L = request.of(request.plan.lookups[u.histories[0]]).width, parts = u.histories.size();
  int64_t* ids = memory.take_rows(parts * L);
  for (int64_t part = 0; part < parts; ++part)
    if (!request.rows(request.plan.lookups[u.histories[part]], 0, L, ids + part * L)) return false;
  std::vector<Row> rows = distinct_rows(request, u, ids, L);
  // Beside nothing else padding has all the weight of a softmax, each row the same.
  const bool only_padding = rows.empty() && u.use_softmax && u.count_padding;
  if (only_padding)
    for (int64_t l = 0; l < L; ++l) rows.push_back({l, 1.f});
  const int64_t n = rows.size(), width = rank_width(u.D), stride = padded<float>(u.layers[0].out);
  float *history = memory.take(n * width), *init = memory.take(n * stride), *pool = memory.take(n * width),
        *count = memory.take(n);
  int64_t* kept = memory.take_rows(n);
  std::fill_n(history, n * width, 0.f);
  for (int64_t part = 0, d = 0; part < parts; ++part) {
    const FrozenTable& table = request.table(request.plan.lookups[u.histories[part]]);
    for (int64_t i = 0; i < n; ++i) kept[i] = ids[part * L + rows[i].position];
    for (int64_t i = 0; i < n; ++i) __builtin_prefetch(table.data + kept[i] * table.row_bytes);
    RK_DISPATCH_ISA(frozen_rows, {table, kept, n, history + d, width, false});
    d += table.D;
  }
  for (int64_t i = 0; i < n; ++i) {
    count[i] = rows[i].count;
    for (int64_t d = 0; d < width; d += 4)
      for (int64_t j = 0; j < 4; ++j)
        pool[(d / 4 * n + i) * 4 + j] = rows[i].count * history[i * width + d + j];
  }
  RK_DISPATCH_ISA(rank_history,
                  {history, u.history_weight, u.layers[0].bias, n, u.D, u.layers[0].out, stride, init});
  attentions.push_back({u.layers.data(), static_cast<int64_t>(u.layers.size()), u.D, n, history,
                        u.target_weight, u.product_weight, init, stride, pool, count, u.use_softmax});
  if (only_padding) attentions.back().num_layers = 0;
  double row = u.D;
  for (const RankLayer& l : u.layers) row += l.in * l.out;
  work += n * row;
  return true;
}

RankUser::RankUser(const RankRequest& request, KeptMemory& memory) {
  const RankPlan& plan = request.plan;
  memory.restart();
  x = memory.take(plan.width);
  sums = memory.take(plan.fm_width);
  std::fill_n(sums, plan.fm_width, 0.f);
  RankRuns of_user, of_candidates;
  const auto assign = [&](int64_t column, int64_t n, bool user) {
    if (column >= 0) (user ? of_user : of_candidates).push_back({column, column + n});
  };
  constexpr int64_t kRoom = 64;
  int64_t rows[kRoom];
  for (const RankLookup& l : plan.lookups) {
    const int64_t D = request.table(l).D;
    if (l.history) continue;
    assign(l.column, D, request.of(l).user);
    if (!request.of(l).user) {
      lookups.push_back(&l);
      continue;
    }
    float* row = l.column >= 0 ? x + l.column : memory.take(D);
    if (l.mode != kNone)
      in_range = in_range && pool_rows(request, l, 0, rows, kRoom, row);
    else if ((in_range = in_range && request.rows(l, 0, 1, rows)))
      RK_DISPATCH_ISA(frozen_rows, {request.table(l), rows, 1, row, D, false});
    if (!in_range) return;
    add_field(l, row, D);
  }
  for (const RankDense& d : plan.dense) {
    const RankInput& in = request.inputs[d.input];
    assign(d.column, d.width, in.user);
    if (!in.user) {
      dense.push_back(&d);
      continue;
    }
    if (d.column >= 0) std::memcpy(x + d.column, in.data, d.width * sizeof(float));
    for (int64_t k = 0; d.weight && k < d.width; ++k) logit += d.weight[k] * in.values()[k];
    for (int64_t k = 0; d.field && k < plan.fm_width; ++k) add_to_fm(k, d.field[k] * in.values()[0]);
  }
  for (const RankUnit& u : plan.units) {
    assign(u.column, u.D, false);
    in_range = in_range && add_history(request, u, memory);
    if (!in_range) return;
  }
  split_inputs(plan, std::move(of_user), std::move(of_candidates), memory);
}

}  // namespace rk
