// What a request has of the user alone: once, whatever the number of candidates.
#pragma once

#include <vector>

#include "cpu/serve/request.h"

namespace rk {

using RankRuns = std::vector<RankRun>;

// Rows of a bag, which begins at `first` of the ids, summed or averaged -> out; `rows` has room for `room` of
// them. Whether the ids are in the table.
bool pool_rows(const RankRequest& request, const RankLookup& l, int64_t first, int64_t* rows, int64_t room,
               float* out);

struct RankUser {
  // Rows of the tables as the MLP's inputs [width], where they are the user's; the FM's sums and squares; the
  // linear term.
  float *x, *sums, squares = 0, logit = 0;
  const float* first_bias = nullptr;       // of the MLP, with the user's part of its product
  RankRuns runs;                           // the candidates' inputs of the first layer
  std::vector<const RankLookup*> lookups;  // the candidates'
  std::vector<const RankDense*> dense;
  std::vector<RankAttention> attentions;
  double work = 0;  // multiply-adds a candidate
  bool in_range = true;

  RankUser(const RankRequest& request, KeptMemory& memory);

 private:
  void add_field(const RankLookup& l, const float* row, int64_t D);
  void add_to_fm(int64_t d, float x) {
    sums[d] += x;
    squares += x * x;
  }
  void split_inputs(const RankPlan& plan, RankRuns of_user, RankRuns of_candidates, KeptMemory& memory);
  bool add_history(const RankRequest& request, const RankUnit& u, KeptMemory& memory);
};

}  // namespace rk
