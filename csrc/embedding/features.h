// The arguments of the embedding op and its backward, as the CPU and the CUDA implementation take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "embedding/params.h"
#include "stable/check.h"

#define RK_CHECK_BAG(condition, ...) RK_CHECK(condition, "embedding_bag: ", __VA_ARGS__)

namespace rk {

// A str argument: the features' names, one a line, or nothing. It stays torch's until a message needs a name.
class Names {
 public:
  explicit Names(StringHandle text) : text_(text) {}
  Names(Names&& other) noexcept : text_(std::exchange(other.text_, nullptr)) {}
  ~Names() {
    if (text_) torch_delete_string(text_);
  }

  // The name of feature f, empty if it has none.
  std::string operator[](size_t f) const {
    size_t length = 0;
    const char* data = nullptr;
    torch_string_length(text_, &length);
    torch_string_c_str(text_, &data);
    const std::string text(data, length);
    size_t begin = 0;
    for (; f > 0 && begin != std::string::npos; --f) {
      begin = text.find('\n', begin);
      if (begin != std::string::npos) ++begin;
    }
    return begin == std::string::npos ? "" : text.substr(begin, text.find('\n', begin) - begin);
  }

 private:
  StringHandle text_;
};

// Numbers of a feature in the list `known`: those of Known.
constexpr size_t kKnown = 3;

// Lists of one entry a feature (frozen_rows: a table) that the op and its backward share; the backward has no
// names.
struct FeatureArgs {
  const Tensors &indices, &offsets, &per_sample_weights;
  const Ints &tables, &modes, &padding_idx, &frozen_rows, &known;
  const Names* names;

  size_t size() const { return indices.size(); }
  std::string name(size_t f) const {
    const std::string given = names ? (*names)[f] : "";
    return given.empty() ? "indices[" + std::to_string(f) + "]" : given;
  }
  // What becomes of ids that are no rows: three numbers a feature, or nothing where they are errors of all.
  Known known_of(size_t f) const {
    if (known.empty()) return {Unknown::error, 0, -1};
    return {static_cast<Unknown>(known[kKnown * f]), known[kKnown * f + 1], known[kKnown * f + 2]};
  }
  bool has_factors(size_t f) const {
    return !per_sample_weights.empty() &&
           !(per_sample_weights[f].dim() == 1 && per_sample_weights[f].size(0) == 0);
  }
};

// The modes by their number: ops/embedding_bag.py, MODES.
constexpr const char* kModeNames[] = {"none", "sum", "mean", "max"};
constexpr int64_t kModes = 4;

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
  RK_CHECK_BAG(args.frozen_rows.size() == num_tables, "frozen_rows must have one entry a table, ", num_tables,
               ", got ", args.frozen_rows.size());
  RK_CHECK_BAG(args.known.empty() || args.known.size() == kKnown * n, "known must have ", kKnown,
               " entries a feature, ", kKnown * n, ", or none, got ", args.known.size());
  for (size_t f = 0; f < n; ++f) {
    const Known known = args.known_of(f);
    const int64_t unknown = static_cast<int64_t>(known.unknown);
    RK_CHECK_BAG(unknown == 0 || ((unknown == 1 || unknown == 2) && known.size > 0 &&
                                  known.padding_idx >= -1 && known.padding_idx < known.size),
                 args.name(f), " has unknown ids of kind ", unknown, ", which must be 0, 1 or 2, in ",
                 known.size, " rows but ", known.padding_idx);
    RK_CHECK_BAG(args.tables[f] >= 0 && args.tables[f] < static_cast<int64_t>(num_tables), args.name(f),
                 " has table ", args.tables[f], " of ", num_tables);
    RK_CHECK_BAG(args.modes[f] >= 0 && args.modes[f] < kModes, args.name(f), " has unknown mode ",
                 args.modes[f]);
  }
}

// Whether feature f is jagged, its bags given by offsets. Raises for ids that are neither that nor [B, L],
// and for offsets that nothing would read.
inline bool check_bags(const FeatureArgs& args, size_t f) {
  const Tensor& ids = args.indices[f];
  const bool pooled = args.modes[f] != kNone, jagged = pooled && ids.dim() == 1 && !args.offsets.empty();
  const auto is_vector = [](const Tensor& t) { return t.dim() == 1; };
  // Ids without a bag would be dropped unseen.
  RK_CHECK_BAG(!pooled || ids.dim() == 2 ||
                   (jagged && is_vector(args.offsets[f]) && (args.offsets[f].size(0) || ids.numel() == 0)),
               args.name(f), " must be [B, L], or [N] beside offsets [B], got shape ", shape_of(ids),
               jagged ? " beside offsets " + shape_of(args.offsets[f]) : "");
  RK_CHECK_BAG(jagged || args.offsets.empty() || (is_vector(args.offsets[f]) && args.offsets[f].size(0) == 0),
               args.name(f), " of shape ", shape_of(ids), " and mode ", kModeNames[args.modes[f]],
               " takes no offsets, got shape ", shape_of(args.offsets[f]));
  return jagged;
}

// How many bags feature f has, which check_bags let pass.
inline int64_t count_bags(const FeatureArgs& args, size_t f, bool jagged) {
  const Tensor& ids = args.indices[f];
  return jagged ? args.offsets[f].size(0) : args.modes[f] != kNone ? ids.size(0) : ids.numel();
}

// Raises unless `t`, the ids of feature f or what `of` says of them, is int32 or int64 -> whether it is
// int64.
inline bool check_integers(const FeatureArgs& args, size_t f, const char* of, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  RK_CHECK_BAG(dtype == ScalarType::Long || dtype == ScalarType::Int, of, args.name(f),
               " must be int32 or int64, got ", name_of(dtype));
  return dtype == ScalarType::Long;
}

// Raises unless the per-sample weights of feature f, which it has, are one a lookup in a mode that takes
// them.
inline void check_factors(const FeatureArgs& args, size_t f) {
  const int64_t mode = args.modes[f];
  const auto shape = args.indices[f].sizes(), got = args.per_sample_weights[f].sizes();
  RK_CHECK_BAG(
      (mode == kSum || mode == kMean) && std::equal(shape.begin(), shape.end(), got.begin(), got.end()),
      "per_sample_weights of ", args.name(f), " must have its shape ", shape_of(args.indices[f]),
      " and mode sum or mean, got ", shape_of(args.per_sample_weights[f]), " and ", kModeNames[mode]);
}

// Raises unless they have the dtype of their table.
inline void check_factor_dtype(const FeatureArgs& args, size_t f, ScalarType dtype) {
  const ScalarType got = args.per_sample_weights[f].scalar_type();
  RK_CHECK_BAG(got == dtype, "per_sample_weights of ", args.name(f), " must have the dtype of its table, ",
               name_of(dtype), ", got ", name_of(got));
}

// Raises unless padding indices and frozen rows are -1 or rows of their tables; table t has rows(t).
template <class Rows>
void check_padding(const FeatureArgs& args, const Rows& rows) {
  const auto is_row = [&](int64_t i, size_t t) { return i >= -1 && i < static_cast<int64_t>(rows(t)); };
  for (size_t f = 0; f < args.size(); ++f)
    RK_CHECK_BAG(is_row(args.padding_idx[f], args.tables[f]), "padding_idx of ", args.name(f),
                 " must be -1 or a row of its table with ", rows(args.tables[f]), " rows, got ",
                 args.padding_idx[f]);
  for (size_t t = 0; t < args.frozen_rows.size(); ++t)
    RK_CHECK_BAG(is_row(args.frozen_rows[t], t), "frozen_rows[", t,
                 "] must be -1 or a row of its table with ", rows(t), " rows, got ", args.frozen_rows[t]);
}

// The error of lookup p of feature f: its id is outside a table with R rows.
inline std::string out_of_range(const FeatureArgs& args, size_t f, int64_t p, int64_t id, int64_t R) {
  std::string index;
  for (int64_t d = args.indices[f].dim() - 1; d >= 0; --d) {
    const int64_t size = args.indices[f].size(d);
    index = std::to_string(p % size) + (index.empty() ? "" : ", ") + index;
    p /= size;
  }
  return "embedding_bag: " + args.name(f) + "[" + index + "] = " + std::to_string(id) +
         " is out of range for a table with " + std::to_string(R) + " rows";
}

// Raises unless a table is a matrix of a floating-point dtype that there are kernels for.
inline void check_table(const char* op, const Tensor& w, size_t t) {
  RK_CHECK(w.dim() == 2, op, ": weights[", t, "] must be [R, D], got shape ", shape_of(w));
  RK_CHECK(is_floating(w.scalar_type()), op, ": weights[", t,
           "] must be float32, float64, float16 or bfloat16, got ", name_of(w.scalar_type()));
}

}  // namespace rk

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<rk::Names> {
  static rk::Names call(StableIValue value, uint64_t, bool) { return rk::Names(to<StringHandle>(value)); }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
