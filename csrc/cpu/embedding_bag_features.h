// The op's lists of tensors, checked and turned into one `Bags` a feature.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "embedding_bag_args.h"

namespace rk {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// A str[] argument. Its strings are copied only when an error needs one.
class Names {
 public:
  explicit Names(StableListHandle list) : list_(list) {}
  Names(Names&& other) noexcept : list_(std::exchange(other.list_, nullptr)) {}
  ~Names();
  size_t size() const;
  std::string operator[](size_t i) const;

 private:
  StableListHandle list_;
};

// The arguments that the op and its backward share; the backward has no names.
struct FeatureArgs {
  const Tensors &indices, &offsets, &per_sample_weights;
  const Ints &tables, &modes, &padding_idx, &frozen_rows;
  const Names* names;

  bool has_factors(size_t f) const;
  std::string name(size_t f) const;
};

struct Features {
  std::vector<Bags> bags;  // the fields of the table and `out` are the caller's to fill
  Tensors kept;            // what the pointers in `bags` point into
  std::vector<std::vector<int64_t>> starts;

  // Raises on lists of another length than the features' or the tables' and on what does not fit in a
  // feature.
  Features(const FeatureArgs& args, size_t num_tables);
  // Raises unless the per-sample weights of feature f have its table's dtype.
  void check_factors(const FeatureArgs& args, size_t f, ScalarType dtype) const;
  // Raises for the first id of feature f outside its table, if there is one.
  void check_range(const FeatureArgs& args, size_t f) const;
};

// Bags [b0, b1) of feature f.
struct BagTask {
  size_t f;
  int64_t b0, b1;
};
// The bags of all features, cut into tasks of about the same work.
struct BagTasks {
  std::vector<BagTask> tasks;
  int64_t work = 0;  // elements read by all of them
  explicit BagTasks(const Features& features);
};

// Calls body with the ids as what they are.
template <class Body>
auto dispatch_ids(const Bags& bags, const Body& body) {
  return bags.wide_ids ? body(static_cast<const int64_t*>(bags.ids))
                       : body(static_cast<const int32_t*>(bags.ids));
}

// t, or a contiguous copy of it if its rows are not.
inline Tensor unit_stride_rows(const Tensor& t) {
  return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1) ? t : torch::stable::contiguous(t);
}

}  // namespace rk

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<rk::Names> {
  static rk::Names call(StableIValue value, uint64_t, bool) { return rk::Names(to<StableListHandle>(value)); }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
