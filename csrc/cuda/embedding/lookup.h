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
  // Calls launch(T*, device, batch, blocks, report) for all features, as many of dtype T at a time as go with
  // a launch. item_of(f): what of feature f does, from features[f].
  template <class ItemOf, class Launch>
  void launch_features(const FeatureArgs& args, const ItemOf& item_of, const Launch& launch) const;

  Tensors tables;  // with unit strides along their rows
  std::vector<Bags> features;
  Tensors outs;       // of each feature, or with `concat` the one of all
  int64_t width = 0;  // of all features side by side

 private:
  Tensors kept_, rows_;
};

// RANKKERNELS_CHECK_IDS around each launch. In any other mode than "ignore" `finish` waits for the device.
class RangeReport {
 public:
  RangeReport(const Device& device, const Tensor& like);
  Report* start();  // where the launch reports to; null: nowhere
  // `features`: all; `launched`: those of the launch's items.
  void finish(const FeatureArgs& args, const std::vector<Bags>& features,
              const std::vector<size_t>& launched);

 private:
  const Device& device_;
  Tensor found_;
};

template <class ItemOf, class Launch>
void Forward::launch_features(const FeatureArgs& args, const ItemOf& item_of, const Launch& launch) const {
  using Item = decltype(item_of(0));
  const Device device(tables[0]);
  RangeReport report(device, tables[0]);
  for (const ScalarType dtype : kFloating)
    dispatch_floating(dtype, [&](auto* type) {
      std::vector<size_t> launched;
      const auto run = [&](const Batch<Item>& batch, int64_t blocks) {
        launch(type, device, batch, blocks, report.start());
        report.finish(args, features, launched);
        launched.clear();
      };
      Batches<Item, decltype(run)> batches(run);
      for (size_t f = 0; f < args.size(); ++f) {
        if (table(args, f).scalar_type() != dtype || features[f].B == 0 || features[f].D == 0) continue;
        const Item item = item_of(f);
        batches.add(item, blocks_for(item.B, item.log2_lanes));
        launched.push_back(f);
      }
      batches.flush();
    });
}

}  // namespace cuda
}  // namespace rk
