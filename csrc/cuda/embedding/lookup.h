// What forwards on lookups share: their checked arguments, their outputs, and the report of what is out of
// range.
#pragma once

#include "cuda/embedding/features.h"

namespace rk {
namespace cuda {

// Checks the arguments of a forward and allocates what it writes.
struct Forward {
  Forward(const Tensors& weights, const FeatureArgs& args, bool concat);
  const Tensor& table(const FeatureArgs& args, size_t f) const { return tables[args.tables[f]]; }

  Tensors tables;  // with unit strides along their rows
  std::vector<Bags> features;
  Tensors outs;       // of each feature, or with `concat` the one of all
  int64_t width = 0;  // of all features side by side

 private:
  Tensors kept_;
};

// RANKKERNELS_CHECK_IDS around each launch. In any other mode than "ignore" `finish` waits for the device.
class RangeReport {
 public:
  RangeReport(const Device& device, const Tensor& like);
  Report* start();  // where the launch reports to; null: nowhere
  // `launched`: the features of the launch's items.
  void finish(const FeatureArgs& args, const Batch<Bags>& batch, const std::vector<size_t>& launched);

 private:
  const Device& device_;
  Tensor found_;
};

}  // namespace cuda
}  // namespace rk
