// The arguments of the embedding op and its backward, as the CPU and the CUDA implementation take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "check.h"

#define RK_CHECK_BAG(condition, ...) RK_CHECK(condition, "embedding_bag: ", __VA_ARGS__)

namespace rk {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// A str[] argument. Strings stay torch's until a message needs one: torch's own conversion copies them all at
// every call, and loses the copies.
class Names {
 public:
  explicit Names(StableListHandle list) : list_(list) {}
  Names(Names&& other) noexcept : list_(std::exchange(other.list_, nullptr)) {}
  ~Names() {
    if (!list_) return;
    for (size_t i = 0, n = size(); i < n; ++i) torch_delete_string(handle(i));
    torch_delete_list(list_);
  }

  size_t size() const {
    size_t n = 0;
    torch_list_size(list_, &n);
    return n;
  }

  std::string operator[](size_t i) const {
    size_t length = 0;
    const char* data = nullptr;
    torch_string_length(handle(i), &length);
    torch_string_c_str(handle(i), &data);
    return std::string(data, length);
  }

 private:
  StringHandle handle(size_t i) const {
    StableIValue value = 0;
    torch_list_get_item(list_, i, &value);
    return torch::stable::detail::to<StringHandle>(value);
  }

  StableListHandle list_;
};

// What the op and its backward share; the backward has no names.
struct FeatureArgs {
  const Tensors &indices, &offsets, &per_sample_weights;
  const Ints &tables, &modes, &padding_idx, &frozen_rows;
  const Names* names;

  size_t size() const { return indices.size(); }
  std::string name(size_t f) const { return names ? (*names)[f] : "indices[" + std::to_string(f) + "]"; }
  bool has_factors(size_t f) const {
    return !per_sample_weights.empty() &&
           !(per_sample_weights[f].dim() == 1 && per_sample_weights[f].size(0) == 0);
  }
};

// t, or a contiguous copy of it if it is not a matrix with elements side by side.
inline Tensor unit_stride_rows(const Tensor& t) {
  return t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1) ? t : torch::stable::contiguous(t);
}

inline void check_lengths(const FeatureArgs& args, size_t num_tables) {
  const size_t n = args.size();
  RK_CHECK_BAG(n > 0 && num_tables > 0, "weights and indices must not be empty lists");
  const auto one_each = [&](const char* what, size_t size, bool optional) {
    RK_CHECK_BAG(size == n || (optional && size == 0), what, " must have one entry a feature, ", n, ", got ",
                 size);
  };
  one_each("offsets", args.offsets.size(), true);
  one_each("per_sample_weights", args.per_sample_weights.size(), true);
  one_each("tables", args.tables.size(), false);
  one_each("modes", args.modes.size(), false);
  one_each("padding_idx", args.padding_idx.size(), false);
  if (args.names) one_each("names", args.names->size(), false);
  RK_CHECK_BAG(args.frozen_rows.size() == num_tables, "frozen_rows must have one entry a table, ", num_tables,
               ", got ", args.frozen_rows.size());
  for (size_t f = 0; f < n; ++f)
    RK_CHECK_BAG(args.tables[f] >= 0 && args.tables[f] < static_cast<int64_t>(num_tables), args.name(f),
                 " has table ", args.tables[f], " of ", num_tables);
}

}  // namespace rk

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<rk::Names> {
  static rk::Names call(StableIValue value, uint64_t, bool) { return rk::Names(to<StableListHandle>(value)); }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
