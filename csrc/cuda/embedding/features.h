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

inline bool on_device_of(const Tensor& t, const Tensor& like) {
  return on_device(t) && t.get_device_index() == like.get_device_index();
}

// The fields of feature f that do not depend on its table; `like` is the table, or in the backward the
// gradient: what is not on its device or has another dtype is an error. `keepalive` gets the copies that
// pointers point into.
inline Bags bags_of(const FeatureArgs& args, size_t f, const Tensor& like, Tensors& keepalive) {
  const auto data_of = [&](const char* of, const Tensor& t) {
    RK_CHECK_BAG(on_device_of(t, like), of, args.name(f), " must be on the device of its table, ",
                 like.get_device_index(), ", got ", t.get_device_index());
    keepalive.push_back(torch::stable::contiguous(t));
    return keepalive.back().const_data_ptr();
  };
  const Tensor& ids = args.indices[f];
  Bags bags{};
  bags.mode = static_cast<uint8_t>(args.modes[f]);
  const bool pooled = bags.mode != kNone, jagged = check_bags(args, f);
  bags.wide_ids = check_integers(args, f, "", ids);
  bags.ids = data_of("", ids);
  bags.padding_idx = pooled ? args.padding_idx[f] : -1;
  bags.B = count_bags(args, f, jagged);
  if (jagged) {
    bags.wide_offsets = check_integers(args, f, "offsets of ", args.offsets[f]);
    bags.offsets = data_of("offsets of ", args.offsets[f]);
    bags.L = ids.numel();
  } else {
    bags.L = pooled ? ids.size(1) : 1;
  }
  if (args.has_factors(f)) {
    check_factors(args, f);
    check_factor_dtype(args, f, like.scalar_type());
    bags.per_sample_weights = data_of("per_sample_weights of ", args.per_sample_weights[f]);
  }
  return bags;
}

inline int64_t ids_of(const Bags& bags) { return bags.B == 0 ? 0 : bags.offsets ? bags.L : bags.B * bags.L; }

}  // namespace cuda
}  // namespace rk
