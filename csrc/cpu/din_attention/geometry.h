// Where the rows of each sample's history are in DIN attention.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/din_attention/checks.h"
#include "cpu/runtime/values.h"

namespace rk {

// Where the rows of each sample are (see DinRows), with lengths, offsets and history_index checked against
// the history.
struct DinGeometry {
  std::vector<int64_t> first, count, pooled;
  // Of samples that share histories: see DinRows; and where each one's rows begin among all samples' in the
  // batch's order, as the scores are returned.
  std::vector<int64_t> sample, user, user_place, score_place;
  int64_t valid = 0, longest = 0;
  Tensor mask;

  bool shared() const { return !user_place.empty(); }
  const int64_t* place() const { return shared() ? user_place.data() : first.data(); }
};

// From where the rows of each history are to where those of each sample are, in the histories' order.
inline DinGeometry geometry_of_samples(const DinArguments& a, DinGeometry of_users) {
  const int64_t B = a.B(), U = a.histories();
  const std::vector<int64_t> index = integers_of(*a.history_index);
  std::vector<int64_t> next(U + 1);
  for (int64_t b = 0; b < B; ++b) {
    RK_DIN_CHECK(index[b] >= 0 && index[b] < U, "history_index[", b, "] = ", index[b],
                 " is out of range for ", U, " histories");
    ++next[index[b] + 1];
  }
  for (int64_t u = 0; u < U; ++u) next[u + 1] += next[u];
  DinGeometry g;
  g.mask = std::move(of_users.mask);
  g.sample.resize(B);
  for (int64_t b = 0; b < B; ++b) g.sample[next[index[b]]++] = b;
  const auto places = [&](int64_t u) { return of_users.first[u + 1] - of_users.first[u]; };
  std::vector<int64_t> score_place(B + 1);
  for (int64_t b = 0; b < B; ++b) score_place[b + 1] = score_place[b] + places(index[b]);
  g.first.reserve(B + 1);
  g.first.push_back(0);
  for (const int64_t b : g.sample) {
    const int64_t u = index[b];
    g.user.push_back(u);
    g.user_place.push_back(of_users.first[u]);
    g.score_place.push_back(score_place[b]);
    g.first.push_back(g.first.back() + places(u));
    g.count.push_back(of_users.count[u]);
    if (!of_users.pooled.empty()) g.pooled.push_back(of_users.pooled[u]);
  }
  return g;
}

inline DinGeometry geometry_of(const DinArguments& a) {
  DinGeometry g;
  const int64_t B = a.histories();
  g.count.resize(B);
  if (a.offsets) {
    g.first = integers_of(*a.offsets);
    const int64_t N = a.history.size(0);
    RK_DIN_CHECK(g.first[0] == 0 && g.first[B] == N, "offsets must run from 0 to N = ", N, ", got ",
                 g.first[0], " .. ", g.first[B]);
    for (int64_t b = 0; b < B; ++b) {
      g.count[b] = g.first[b + 1] - g.first[b];
      RK_DIN_CHECK(g.first[b] <= g.first[b + 1], "offsets decrease from ", g.first[b], " to ", g.first[b + 1],
                   " at ", b + 1);
    }
  } else {
    const int64_t L = a.history.size(1);
    g.first.resize(B + 1);
    for (int64_t b = 0; b <= B; ++b) g.first[b] = b * L;
    if (a.lengths) {
      g.count = integers_of(*a.lengths);
      for (int64_t b = 0; b < B; ++b)
        RK_DIN_CHECK(g.count[b] >= 0 && g.count[b] <= L, "lengths[", b, "] = ", g.count[b],
                     " is outside 0 .. ", L, ", the history's positions");
    } else if (a.mask) {
      g.mask = torch::stable::contiguous(*a.mask);
      const uint8_t* mask = static_cast<const uint8_t*>(g.mask.const_data_ptr());
      for (int64_t b = 0; b < B; ++b) g.count[b] = L - std::count(mask + b * L, mask + (b + 1) * L, 0);
    } else {
      std::fill(g.count.begin(), g.count.end(), L);
    }
  }
  // Padding that counts is computed: for the batch statistics, and where a softmax has nothing else.
  const bool all = a.batch_statistics();
  if (a.config.count_padding && (a.lengths || a.mask) && (all || a.config.use_softmax)) {
    g.pooled = g.count;
    for (int64_t& n : g.count)
      if (all || n == 0) n = a.history.size(1);
  }
  if (a.history_index) g = geometry_of_samples(a, std::move(g));
  for (const int64_t n : g.count) {
    g.valid += n;
    g.longest = std::max(g.longest, n);
  }
  if (a.batch_statistics() && !a.joint()) check_valid_rows(g.valid);
  return g;
}

// Calls body(row, place) for the rows computed of sample b, both from 0: what belongs to a row is stored side
// by side, samples with gaps apart; their place is that in the history.
template <class Body>
void for_each_row(const DinGeometry& g, int64_t b, const Body& body) {
  const bool gaps = g.mask.defined() && g.count[b] < g.first[b + 1] - g.first[b];
  const uint8_t* mask = gaps ? static_cast<const uint8_t*>(g.mask.const_data_ptr()) + g.place()[b] : nullptr;
  for (int64_t row = 0, place = 0; row < g.count[b]; ++place)
    if (!mask || mask[place]) body(row++, place);
}

}  // namespace rk
