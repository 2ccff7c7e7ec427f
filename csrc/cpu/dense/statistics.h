// Mean and variance of a batch's columns, from those of its parts.
#pragma once

#include <vector>

#include "cpu/dense/params.h"

namespace rk {

// Of all rows: each unit's mean and sum of squared deviations from it, joined in the parts' order.
struct MergedStats {
  MergedStats(const std::vector<ColumnStats>& parts, int64_t H) : mean(H), deviation(H) {
    for (const ColumnStats& part : parts) {
      if (part.count == 0) continue;
      const double total = count + part.count, share = part.count / total;
      for (int64_t h = 0; h < H; ++h) {
        const double delta = part.mean[h] - mean[h];
        mean[h] += delta * share;
        deviation[h] += part.deviation[h] + delta * delta * count * share;
      }
      count = total;
    }
  }
  double count = 0;
  std::vector<double> mean, deviation;
};

}  // namespace rk
