#include "cpu/serve/request.h"

namespace rk {

#define RK_RANK_CHECK(condition, ...) RK_CHECK(condition, "rank: ", __VA_ARGS__)

std::string RankRequest::name(int64_t input) const {
  const std::string given = names_[input];
  return given.empty() ? "inputs[" + std::to_string(input) + "]" : given;
}

// The texts are those of ops/rank.py.
RankRequest::RankRequest(const RankPlan& plan, const Tensors& given, const Ints& sides, const Names& names,
                         int64_t candidates)
    : plan(plan), C(candidates), names_(names) {
  RK_RANK_CHECK(static_cast<int64_t>(given.size()) == plan.inputs && sides.size() == given.size(),
                "inputs and sides must have ", plan.inputs, " entries, got ", given.size(), " and ",
                sides.size());
  RK_RANK_CHECK(C >= 0, "candidates must not be negative, got ", C);
  for (size_t i = 0; i < given.size(); ++i) {
    RK_RANK_CHECK(given[i].is_cpu(), name(i), " must be on cpu");
    RankInput in{given[i].is_contiguous() ? given[i] : torch::stable::contiguous(given[i]), nullptr, false,
                 sides[i] != 0, 0};
    in.data = in.keepalive.const_data_ptr();
    in.wide = dtype_of(in.keepalive) == ScalarType::Long;
    in.width = in.user ? in.keepalive.numel() : in.keepalive.dim() > 1 ? in.keepalive.size(1) : 1;
    inputs.push_back(std::move(in));
  }
  check_shapes(given);
}

void RankRequest::check_shapes(const Tensors& given) {
  const auto shape = [&](const char* what, int64_t i, bool rows, int64_t width) {
    const Tensor& t = given[i];
    const bool fits = inputs[i].user
                          ? (width < 0 ? t.dim() <= 2 && (t.dim() < 2 || t.size(0) == 1) : t.numel() == width)
                      : rows ? t.dim() == 2 && t.size(0) == C
                             : (t.dim() == 1 || t.dim() == 2) && t.size(0) == C && inputs[i].width == width;
    RK_RANK_CHECK(fits, name(i), " must be ", what,
                  inputs[i].user
                      ? (width < 0 ? " [L] of the user" : " of the user")
                      : (rows ? " [C, L] of the candidates, C = " : " [C] of the candidates, C = "),
                  inputs[i].user ? std::string() : std::to_string(C), ", got shape ", shape_of(t));
  };
  const auto ids = [&](int64_t i) {
    const ScalarType dtype = dtype_of(given[i]);
    RK_RANK_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, name(i),
                  " must be int32 or int64 ids, got ", name_of(dtype));
  };
  for (const RankLookup& l : plan.lookups) {
    const bool sequence = l.mode != kNone || l.history;
    ids(l.input);
    RK_RANK_CHECK(!l.history || inputs[l.input].user, name(l.input),
                  " is a history, which must be the user's");
    shape("ids", l.input, sequence, sequence ? -1 : 1);
  }
  for (const RankDense& d : plan.dense) {
    RK_RANK_CHECK(dtype_of(given[d.input]) == ScalarType::Float, name(d.input), " must be float32, got ",
                  name_of(dtype_of(given[d.input])));
    shape("numbers", d.input, false, d.width);
  }
  for (const RankUnit& u : plan.units) {
    for (const int64_t h : u.histories)
      RK_RANK_CHECK(of(plan.lookups[h]).width == of(plan.lookups[u.histories[0]]).width,
                    "histories of one attention must have one length, got ", of(plan.lookups[h]).width,
                    " and ", of(plan.lookups[u.histories[0]]).width);
    if (u.length < 0) continue;
    ids(u.length);
    RK_RANK_CHECK(inputs[u.length].user, name(u.length), " is a history's length, which must be the user's");
    shape("a number", u.length, false, 1);
  }
}

int64_t RankRequest::row(const RankLookup& l, int64_t id) const {
  if (l.known.unknown != Unknown::error) return l.known.row_of(id);
  return id >= 0 && id < table(l).R ? id : -1;
}

bool RankRequest::rows(const RankLookup& l, int64_t first, int64_t n, int64_t* rows) const {
  const RankInput& in = of(l);
  int64_t worst = 0;
  for (int64_t p = 0; p < n; ++p) {
    rows[p] = row(l, in.id(first + p));
    worst |= rows[p];
  }
  return worst >= 0;
}

void RankRequest::check_ids() const {
  for (const RankLookup& l : plan.lookups) {
    const RankInput& in = of(l);
    const int64_t n = in.keepalive.numel();
    for (int64_t p = 0; p < n; ++p) {
      const int64_t id = in.id(p), R = table(l).R;
      if (row(l, id) >= 0 && row(l, id) < R) continue;
      const int64_t width = in.keepalive.dim() > 1 ? in.width : 0;
      fail("rank: ", name(l.input), "[", width ? std::to_string(p / width) + ", " : "",
           std::to_string(width ? p % width : p), "] = ", id, " is out of range for a table with ", R,
           " rows");
    }
  }
}

}  // namespace rk
