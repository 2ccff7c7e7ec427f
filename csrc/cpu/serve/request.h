// A request's inputs, checked, and the rows that they look up.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/serve/plan.h"
#include "cpu/tuning.h"

namespace rk {

// Memory that a thread keeps between requests: one piece, as large as the largest has needed. Not zeroed.
class KeptMemory {
 public:
  void restart() {
    if (blocks_.size() > 1) {  // one piece for all of it
      const int64_t all = total_;
      blocks_.clear();
      total_ = 0;
      add(all);
    }
    used_ = 0;
  }
  float* take(int64_t n) {
    n = (n + 15) / 16 * 16;
    if (blocks_.empty() || used_ + n > blocks_.back().size) {
      add(n);
      used_ = 0;
    }
    used_ += n;
    return blocks_.back().p.get() + used_ - n;
  }
  int64_t* take_rows(int64_t n) { return reinterpret_cast<int64_t*>(take(2 * n)); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Piece {
    std::unique_ptr<float, Free> p;
    int64_t size;
  };
  void add(int64_t n) {
    n = std::max(n, kArenaBytes / static_cast<int64_t>(sizeof(float)));
    void* p = std::aligned_alloc(64, static_cast<size_t>(n) * sizeof(float));
    if (!p) throw std::bad_alloc();
    blocks_.push_back({std::unique_ptr<float, Free>(static_cast<float*>(p)), n});
    total_ += n;
  }
  std::vector<Piece> blocks_;
  int64_t used_ = 0, total_ = 0;
};

// One input: what the user has, or every candidate.
struct RankInput {
  Tensor keepalive;
  const void* data;
  bool wide;  // int64, or else int32 or float32
  bool user;
  int64_t width;  // values that the user or a candidate has

  int64_t id(int64_t p) const {
    return wide ? static_cast<const int64_t*>(data)[p] : static_cast<const int32_t*>(data)[p];
  }
  const float* values() const { return static_cast<const float*>(data); }
};

class RankRequest {
 public:
  RankRequest(const RankPlan& plan, const Tensors& inputs, const Ints& sides, const Names& names,
              int64_t candidates);

  const RankPlan& plan;
  int64_t C;
  std::vector<RankInput> inputs;

  const RankInput& of(const RankLookup& l) const { return inputs[l.input]; }
  const FrozenTable& table(const RankLookup& l) const { return plan.tables[l.table]; }

  // The row of an id, or -1: it is outside the table.
  int64_t row(const RankLookup& l, int64_t id) const;
  // Those of ids [first, first + n); whether all are in the table.
  bool rows(const RankLookup& l, int64_t first, int64_t n, int64_t* rows) const;
  // Raises for the first id outside its table.
  void check_ids() const;

 private:
  std::string name(int64_t input) const;
  void check_shapes(const Tensors& given);

  const Names& names_;
};

}  // namespace rk
