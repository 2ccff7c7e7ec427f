// What a frozen model does, read from the integers that rankkernels/serve/_plan.py writes: the order of the
// fields is that of its `encode`. Every place in the weights is checked once, here.
#pragma once

#include <string>
#include <vector>

#include "cpu/serve/params.h"
#include "embedding/features.h"

namespace rk {

// Raises unless t has so many bits a value and is D wide.
FrozenTable frozen_table(const Tensor& t, const std::string& name, int64_t bits, int64_t D);

// Rows of a table that an input's ids look up. `column`: of the MLP's inputs, `weight`: of the linear term;
// -1 and null where it has no part in them.
struct RankLookup {
  int64_t input, table, mode, padding_idx;
  Known known;  // its size is 0 where unknown ids are an error
  int64_t column;
  const float* weight;
  bool fm, history;
};
// Numbers of an input; `field` [fm_width] times one number is a field of the FM, null where it is none.
struct RankDense {
  int64_t input, width, column;
  const float *weight, *field;
};
// The lookups of history and target side by side, D wide together. Rows of the first history's padding_idx
// are left out with `masked`, those from the number in input `length` on with length >= 0.
struct RankUnit {
  std::vector<int64_t> histories, targets;
  int64_t D, column, length;
  bool masked, use_softmax, count_padding;
  const float *history_weight, *target_weight, *product_weight;
  std::vector<RankLayer> layers;
};

struct RankPlan {
  int64_t inputs, width, fm_width;
  bool sigmoid;
  float constant;
  std::vector<FrozenTable> tables;
  std::vector<RankLookup> lookups;
  std::vector<RankDense> dense;
  std::vector<RankUnit> units;
  std::vector<RankLayer> layers;

  RankPlan(const Tensor& plan, const Tensor& weights, const Tensors& tables);

 private:
  class Reader;
  // The first of n columns of the MLP's inputs, or -1.
  int64_t column(Reader& r, int64_t n) const;
  void read_unit(Reader& r);
  static std::vector<RankLayer> read_layers(Reader& r, bool first_is_attention);
};

}  // namespace rk
