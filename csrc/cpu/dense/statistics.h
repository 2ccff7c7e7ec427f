// Mean and variance of a batch's columns, from those of its parts.
#pragma once

#include <string>
#include <vector>

#include "cpu/dense/params.h"
#include "cpu/runtime/ranks.h"

namespace rk {

// Of all rows: each unit's mean and sum of squared deviations from it, joined in the parts' order.
struct MergedStats {
  MergedStats(const std::vector<ColumnStats>& parts, int64_t H) : mean(H), deviation(H) {
    for (const ColumnStats& part : parts) {
      if (part.count == 0) continue;
      const double before = count, total = before + part.count, share = part.count / total;
      for (int64_t h = 0; h < H; ++h) {
        const double delta = part.mean[h] - mean[h];
        mean[h] += delta * share;
        deviation[h] += part.deviation[h] + delta * delta * before * share;
      }
      count = total;
    }
  }
  double count = 0;
  std::vector<double> mean, deviation;
};

// Of the rows of all processes of a group, joined in the order of the ranks.
inline MergedStats joined(const std::string& group, const MergedStats& own, const Tensor& like) {
  std::vector<double> message{own.count};
  message.insert(message.end(), own.mean.begin(), own.mean.end());
  message.insert(message.end(), own.deviation.begin(), own.deviation.end());
  std::vector<double> every = gather(group, message, like);
  const size_t H = own.mean.size();
  std::vector<ColumnStats> ranks;
  for (size_t i = 0; i < every.size(); i += message.size())
    ranks.push_back({every[i], every.data() + i + 1, every.data() + i + 1 + H});
  return MergedStats(ranks, H);
}

}  // namespace rk
