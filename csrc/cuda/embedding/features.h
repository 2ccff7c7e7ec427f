// The arguments of the embedding op and its backward, turned into the kernels' `Bags`.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/common/batches.h"
#include "cuda/common/launch.h"
#include "cuda/embedding/lookup.cuh"
#include "embedding/features.h"

namespace rk {
namespace cuda {

// The fields of feature f that do not depend on its table; `like` is the table, or in the backward the
// gradient: what is not on its device or has another dtype is an error. `keepalive` gets the copies that
// pointers point into.
inline Bags bags_of(const FeatureArgs& args, size_t f, const Tensor& like, Tensors& keepalive) {
  const auto check_integers = [&](const Tensor& t, const std::string& what) {
    const auto dtype = t.scalar_type();
    RK_CHECK_BAG(dtype == ScalarType::Long || dtype == ScalarType::Int, what, " must be int32 or int64, got ",
                 dtype);
    RK_CHECK_BAG(on_device(t) && t.get_device_index() == like.get_device_index(), what,
                 " must be on the device of its table, ", like.get_device_index(), ", got ",
                 t.get_device_index());
    keepalive.push_back(torch::stable::contiguous(t));
    return keepalive.back().const_data_ptr();
  };
  const Tensor& ids = args.indices[f];
  Bags bags{};
  bags.mode = static_cast<uint8_t>(args.modes[f]);
  const bool pooled = bags.mode != kNone, jagged = check_bags(args, f);
  bags.ids = check_integers(ids, args.name(f));
  bags.wide_ids = ids.scalar_type() == ScalarType::Long;
  bags.padding_idx = pooled ? args.padding_idx[f] : -1;
  if (jagged) {
    bags.offsets = check_integers(args.offsets[f], "offsets of " + args.name(f));
    bags.wide_offsets = args.offsets[f].scalar_type() == ScalarType::Long;
    bags.B = args.offsets[f].size(0);
    bags.L = ids.numel();
  } else {
    bags.B = pooled ? ids.size(0) : ids.numel();
    bags.L = pooled ? ids.size(1) : 1;
  }
  if (args.has_factors(f)) {
    const Tensor& factors = args.per_sample_weights[f];
    const auto shape = ids.sizes(), got = factors.sizes();
    RK_CHECK_BAG((bags.mode == kSum || bags.mode == kMean) &&
                     std::equal(shape.begin(), shape.end(), got.begin(), got.end()),
                 "per_sample_weights of ", args.name(f), " must have its shape ", shape_of(ids),
                 " and mode sum or mean, got ", shape_of(factors), " and ", kModeNames[bags.mode]);
    RK_CHECK_BAG(factors.scalar_type() == like.scalar_type() && on_device(factors) &&
                     factors.get_device_index() == like.get_device_index(),
                 "per_sample_weights of ", args.name(f), " must be like its table, ", like.scalar_type(),
                 " on device ", like.get_device_index(), ", got ", factors.scalar_type(), " on device ",
                 factors.get_device_index());
    keepalive.push_back(torch::stable::contiguous(factors));
    bags.per_sample_weights = keepalive.back().const_data_ptr();
  }
  return bags;
}

inline int64_t ids_of(const Bags& bags) { return bags.B == 0 ? 0 : bags.offsets ? bags.L : bags.B * bags.L; }

}  // namespace cuda
}  // namespace rk
