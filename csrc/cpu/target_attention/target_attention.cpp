// Checks, threads and registration of the target attention; the kernel and its mathematics are in
// target_attention_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/values.h"
#include "cpu/target_attention/params.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

struct TargetArguments {
  const Tensor &query, &history;
  const OptionalTensor &lengths, &mask, &offsets, &history_index;

  int64_t B() const { return query.size(0); }
  int64_t H() const { return query.size(1); }
  int64_t D() const { return query.size(2); }
  int64_t users() const { return offsets ? offsets->size(0) - 1 : history.size(0); }
};

#define RK_TARGET_CHECK(condition, ...) RK_CHECK(condition, "target_attention: ", __VA_ARGS__)

void check_positions(const char* name, const Tensor& t, int64_t size, const char* sized) {
  RK_TARGET_CHECK(t.dim() == 1 && t.size(0) == size, name, " must be [", sized, "] = [", size,
                  "], got shape ", shape_of(t));
  RK_TARGET_CHECK(dtype_of(t) == ScalarType::Int || dtype_of(t) == ScalarType::Long, name,
                  " must be int32 or int64, got ", name_of(dtype_of(t)));
  RK_TARGET_CHECK(t.is_cpu(), "all arguments must be on one device");
}

// The texts are those of ops/target_attention.py.
void check(const TargetArguments& a) {
  RK_TARGET_CHECK(a.query.dim() == 3, "query must have 3 dimensions, got ", a.query.dim(), " (shape ",
                  shape_of(a.query), ")");
  RK_TARGET_CHECK(is_floating(dtype_of(a.query)), "query must be float32, float64, float16 or bfloat16, got ",
                  name_of(dtype_of(a.query)));
  RK_TARGET_CHECK(a.lengths.has_value() + a.mask.has_value() + a.offsets.has_value() < 2,
                  "give one of lengths, mask and offsets");
  const int64_t dims = a.offsets ? 2 : 3;
  RK_TARGET_CHECK(a.history.dim() == dims && a.history.size(dims - 1) == a.D(), "history must be ",
                  a.offsets ? "[N, D]" : "[B, L, D]", " of D = ", a.D(), " columns, got shape ",
                  shape_of(a.history));
  RK_TARGET_CHECK(dtype_of(a.history) == dtype_of(a.query) && a.history.is_cpu(),
                  "history must have the dtype and device of query, ", name_of(dtype_of(a.query)), ", got ",
                  name_of(dtype_of(a.history)));
  if (a.history_index) check_positions("history_index", *a.history_index, a.B(), "B");
  const char* each = a.history_index ? "U" : "B";
  if (a.offsets) {
    RK_TARGET_CHECK(a.offsets->dim() == 1 && a.offsets->size(0) > 0, "offsets must be [", each,
                    " + 1], got shape ", shape_of(*a.offsets));
    check_positions("offsets", *a.offsets, a.history_index ? a.offsets->size(0) : a.B() + 1,
                    a.history_index ? "U + 1" : "B + 1");
  }
  RK_TARGET_CHECK(a.history_index || a.offsets || a.history.size(0) == a.B(),
                  "history and query must have one batch size B, got ", a.history.size(0), " and ", a.B());
  if (a.lengths) check_positions("lengths", *a.lengths, a.users(), each);
  if (!a.mask) return;
  RK_TARGET_CHECK(a.mask->dim() == 2 && a.mask->size(0) == a.users() && a.mask->size(1) == a.history.size(1),
                  "mask must be [", each, ", L] = [", a.users(), ", ", a.history.size(1), "], got shape ",
                  shape_of(*a.mask));
  RK_TARGET_CHECK(dtype_of(*a.mask) == ScalarType::Bool, "mask must be bool, true at valid rows, got ",
                  name_of(dtype_of(*a.mask)));
  RK_TARGET_CHECK(a.mask->is_cpu(), "all arguments must be on one device");
}

// Where each user's rows are, and the samples by user: those of user u are sample[first[u] .. first[u + 1]).
struct TargetUsers {
  explicit TargetUsers(const TargetArguments& a) : begin(a.users()), count(a.users()), first(a.users() + 1) {
    const int64_t U = a.users(), L = a.offsets ? 0 : a.history.size(1);
    if (a.offsets) {
      const std::vector<int64_t> offsets = integers_of(*a.offsets);
      RK_TARGET_CHECK(offsets[0] == 0 && offsets[U] == a.history.size(0),
                      "offsets must run from 0 to N = ", a.history.size(0), ", got ", offsets[0], " .. ",
                      offsets[U]);
      for (int64_t u = 0; u < U; ++u) {
        RK_TARGET_CHECK(offsets[u] <= offsets[u + 1], "offsets decrease from ", offsets[u], " to ",
                        offsets[u + 1], " at ", u + 1);
        begin[u] = offsets[u];
        count[u] = offsets[u + 1] - offsets[u];
      }
    } else {
      if (a.lengths) count = integers_of(*a.lengths);
      for (int64_t u = 0; u < U; ++u) {
        begin[u] = u * L;
        if (!a.lengths) count[u] = L;
        RK_TARGET_CHECK(count[u] >= 0 && count[u] <= L, "lengths[", u, "] = ", count[u], " is outside 0 .. ",
                        L, ", the history's positions");
      }
    }
    place_samples(a);
  }

  std::vector<int64_t> begin, count, first, sample;

 private:
  void place_samples(const TargetArguments& a) {
    const int64_t B = a.B(), U = a.users();
    std::vector<int64_t> user(B);
    if (a.history_index) user = integers_of(*a.history_index);
    for (int64_t b = 0; b < B; ++b) {
      if (!a.history_index) user[b] = b;
      RK_TARGET_CHECK(user[b] >= 0 && user[b] < U, "history_index[", b, "] = ", user[b],
                      " is out of range for ", U, " histories");
      ++first[user[b] + 1];
    }
    for (int64_t u = 0; u < U; ++u) first[u + 1] += first[u];
    std::vector<int64_t> next(first.begin(), first.end());
    sample.resize(B);
    for (int64_t b = 0; b < B; ++b) sample[next[user[b]]++] = b;
  }
};

// Samples [first, last) of TargetUsers::sample, of one user.
struct TargetTask {
  int64_t user, first, last;
};

// Calls body(scratch, arena, task) for every task, the arena empty. Short histories are taken several at
// once: for each of them memory of its own would take as long as its attention.
template <class A, class Body>
void for_each_task(const TargetArguments& a, const TargetUsers& users, const std::vector<TargetTask>& tasks,
                   bool backward, const Body& body) {
  const int64_t count = tasks.size(), D = a.D();
  int64_t values = 1;  // that all tasks read
  for (const TargetTask& task : tasks) values += users.count[task.user] * D;
  const int64_t chunk = std::max<int64_t>(1, kTargetChunk * count / values);
  run_tasks((count + chunk - 1) / chunk, (backward ? 3 : 1) * values * a.H(), [&](int64_t c) {
    const int64_t begin = c * chunk, end = std::min(count, begin + chunk);
    int64_t queries = 0;
    for (int64_t t = begin; t < end; ++t) queries = std::max(queries, tasks[t].last - tasks[t].first);
    const int64_t ld = padded<A>(queries * a.H());
    Arena<A> shared, own;
    TargetScratch<A> s{};
    s.rows = shared.take(kBlockRows * padded<A>(D));
    s.weight = shared.take(kBlockRows * ld);
    s.query_columns = shared.take(D * ld);
    if (backward) {
      s.grad = shared.take(kBlockRows * padded<A>(D));
      s.grad_score = shared.take(kBlockRows * ld);
      s.grad_columns = shared.take(D * ld);
    }
    for (int64_t t = begin; t < end; ++t, own.clear()) body(s, own, tasks[t]);
  });
}

// The queries of a task's samples, one behind the other.
template <class A>
class TargetQueries {
 public:
  TargetQueries(const TargetArguments& a, const TargetUsers& users, const TargetTask& task, Arena<A>& arena)
      : arena(arena), H_(a.H()), D_(a.D()), sample_(users.sample.data() + task.first) {
    queries = (task.last - task.first) * H_;
  }
  // [padded_queries(queries), padded(D)], zeros.
  A* zeros() { return arena.take(padded_queries(queries) * padded<A>(D_)); }
  // The same with [., H, D] of all samples.
  A* rows(const std::vector<A>& of_all) {
    A* to = zeros();
    for (int64_t c = 0; c < queries; ++c)
      std::copy_n(of_all.begin() + place(c) * D_, D_, to + c * padded<A>(D_));
    return to;
  }
  // Among all samples' queries the place of query c.
  int64_t place(int64_t c) const { return sample_[c / H_] * H_ + c % H_; }

  Arena<A>& arena;
  int64_t queries;

 private:
  int64_t H_, D_;
  const int64_t* sample_;
};

// What both passes of a task read.
template <class T>
TargetAttention<T> attention_of(const TargetArguments& a, const TargetUsers& users, const Tensor& history,
                                const TargetTask& task, const std::vector<Accumulator<T>>& queries,
                                TargetQueries<Accumulator<T>>& q) {
  TargetAttention<T> k{};
  const int64_t u = task.user;
  k.rows = static_cast<const T*>(history.const_data_ptr());
  k.rows += a.offsets ? users.begin[u] * history.stride(0) : u * history.stride(0);
  k.stride_row = history.stride(a.offsets ? 0 : 1);
  if (a.mask) {
    k.valid = static_cast<const bool*>(a.mask->const_data_ptr()) + u * a.mask->stride(0);
    k.stride_valid = a.mask->stride(1);
  }
  k.D = a.D();
  k.queries = q.queries;
  k.ld_queries = padded<Accumulator<T>>(q.queries);
  k.query = q.rows(queries);
  k.highest = q.arena.take(k.ld_queries);
  k.inverse = q.arena.take(k.ld_queries);
  return k;
}

std::tuple<Tensor, Tensor> target_attention_cpu(const Tensor& query, const Tensor& history,
                                                const OptionalTensor& lengths, const OptionalTensor& mask,
                                                const OptionalTensor& offsets,
                                                const OptionalTensor& history_index) {
  const TargetArguments a{query, history, lengths, mask, offsets, history_index};
  check(a);
  const TargetUsers users(a);
  const int64_t H = a.H(), D = a.D(), most = std::max<int64_t>(1, kTargetQueries / std::max<int64_t>(H, 1));
  const Tensor hu = unit_stride_last(history);
  Tensor out = torch::stable::new_empty(query, {a.B(), H, D});
  Tensor stats = torch::stable::new_empty(query, {a.B(), H, 2}, accumulator_dtype(dtype_of(query)));
  std::vector<TargetTask> tasks;
  for (int64_t u = 0; u < a.users(); ++u)
    for (int64_t i = users.first[u]; i < users.first[u + 1]; i += most)
      tasks.push_back({u, i, std::min(i + most, users.first[u + 1])});
  dispatch_floating(dtype_of(query), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const std::vector<A> queries = values_of<A>(query);
    for_each_task<A>(a, users, tasks, false,
                     [&](const auto& scratch, Arena<A>& arena, const TargetTask& task) {
                       TargetQueries<A> q(a, users, task, arena);
                       TargetAttention<T> k = attention_of<T>(a, users, hu, task, queries, q);
                       k.pooled = q.zeros();
                       RK_DISPATCH_ISA(target_attention<T>, k, {0, users.count[task.user]}, scratch);
                       A* of_scores = static_cast<A*>(stats.mutable_data_ptr());
                       with_values(dtype_of(out), [&](auto* value) {
                         auto* to = static_cast<decltype(value)>(out.mutable_data_ptr());
                         for (int64_t c = 0; c < q.queries; ++c) {
                           const int64_t place = q.place(c);
                           std::copy_n(k.pooled + c * padded<A>(D), D, to + place * D);
                           of_scores[2 * place] = k.highest[c];
                           of_scores[2 * place + 1] = k.inverse[c];
                         }
                       });
                     });
  });
  return {out, stats};
}

// The gradients of one user's samples and of its history.
template <class T, class A = Accumulator<T>>
void backward_of_user(const TargetArguments& a, const TargetUsers& users, const Tensor& history,
                      const TargetTask& task, const TargetScratch<A>& scratch, Arena<A>& arena,
                      const std::vector<A>& queries, const std::vector<A>& grads, const std::vector<A>& outs,
                      const A* stats, std::vector<A>& grad_queries, T* grad_history) {
  const int64_t D = a.D(), ld = padded<A>(D), user = task.user, rows = users.count[user];
  const int64_t all = a.offsets ? rows : history.size(1), H = a.H();
  T* to = grad_history + users.begin[user] * D;
  TargetQueries<A> q(a, users, task, arena);
  const int64_t written = q.queries ? rows : 0;
  std::fill_n(to + written * D, (all - written) * D, T{});
  if (!q.queries || !H) return;
  TargetAttentionBackward<T> k{};
  k.forward = attention_of<T>(a, users, history, task, queries, q);
  k.grad_out = q.rows(grads);
  k.grad_query = q.zeros();
  A* along = arena.take(k.forward.ld_queries);
  for (int64_t c = 0; c < q.queries; ++c) {
    const int64_t place = q.place(c);
    k.forward.highest[c] = stats[2 * place];
    k.forward.inverse[c] = stats[2 * place + 1];
    for (int64_t d = 0; d < D; ++d) along[c] += grads[place * D + d] * outs[place * D + d];
  }
  k.along = along;
  k.grad_history = to;
  RK_DISPATCH_ISA(target_attention_backward<T>, k, {0, rows}, scratch);
  for (int64_t c = 0; c < q.queries; ++c)
    std::copy_n(k.grad_query + c * ld, D, grad_queries.begin() + q.place(c) * D);
}

std::tuple<Tensor, Tensor> target_attention_backward_cpu(const Tensor& grad_out, const Tensor& out,
                                                         const Tensor& stats, const Tensor& query,
                                                         const Tensor& history, const OptionalTensor& lengths,
                                                         const OptionalTensor& mask,
                                                         const OptionalTensor& offsets,
                                                         const OptionalTensor& history_index) {
  const TargetArguments a{query, history, lengths, mask, offsets, history_index};
  check(a);
  const ScalarType dtype = dtype_of(query);
  check_form("target_attention_backward", "grad_out", grad_out, {a.B(), a.H(), a.D()}, dtype);
  check_form("target_attention_backward", "out", out, {a.B(), a.H(), a.D()}, dtype);
  check_form("target_attention_backward", "stats", stats, {a.B(), a.H(), 2}, accumulator_dtype(dtype));
  const TargetUsers users(a);
  const Tensor hu = unit_stride_last(history), su = torch::stable::contiguous(stats);
  Tensor grad_history = new_empty_paged(history, history.sizes()), grad_query;
  std::vector<TargetTask> tasks;
  for (int64_t u = 0; u < a.users(); ++u) tasks.push_back({u, users.first[u], users.first[u + 1]});
  dispatch_floating(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const std::vector<A> queries = values_of<A>(query), grads = values_of<A>(grad_out),
                         outs = values_of<A>(out);
    std::vector<A> grad_queries(queries.size());
    const A* of_scores = static_cast<const A*>(su.const_data_ptr());
    T* to = static_cast<T*>(grad_history.mutable_data_ptr());
    for_each_task<A>(a, users, tasks, true,
                     [&](const auto& scratch, Arena<A>& arena, const TargetTask& task) {
                       backward_of_user<T>(a, users, hu, task, scratch, arena, queries, grads, outs,
                                           of_scores, grad_queries, to);
                     });
    grad_query = gradient_of(query, [&](int64_t i) { return grad_queries[i]; });
  });
  return {grad_query, grad_history};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("target_attention", TORCH_BOX(&rk::target_attention_cpu));
  m.impl("target_attention_backward", TORCH_BOX(&rk::target_attention_backward_cpu));
}
