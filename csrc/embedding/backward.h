// The gradients and tables of a backward of lookups, as the CPU and the CUDA implementation take them.
#pragma once

#include <algorithm>

#include "embedding/features.h"

#define RK_CHECK_BACKWARD(condition, ...) RK_CHECK(condition, "embedding_bag_backward: ", __VA_ARGS__)

namespace rk {

// Of all tables of a backward together.
constexpr int64_t kMostRows = int64_t(1) << 60;

// The rows of the tables that an optimizer is to step on.
inline Ints rows_of(const Tensors& weights) {
  Ints rows;
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table("embedding_bag_update", weights[t], t);
    rows.push_back(weights[t].size(0));
  }
  return rows;
}

// The gradients of a backward's outputs, checked against its lookups and tables, and what they say of the
// tables.
struct OutGrads {
  const Tensor& some;                   // one of them
  std::vector<const Tensor*> of_table;  // one of each table, null where there is none
  Ints widths;                          // of each table, 0 where there is no gradient
  bool need_values = false;             // whether a gradient depends on the tables' values

  // Takes lists that check_lengths and check_bags let pass; feature f has num_bags(f) bags.
  template <class NumBags>
  OutGrads(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
           const FeatureArgs& args, const NumBags& num_bags)
      : some(first_of(grad_outs)), of_table(rows.size(), nullptr), widths(rows.size(), 0) {
    RK_CHECK_BACKWARD(grad_outs.size() == args.size(), "grad_outs must have one entry a feature, ",
                      args.size(), ", got ", grad_outs.size());
    int64_t all_rows = 0;
    for (size_t t = 0; t < rows.size(); ++t) {
      RK_CHECK_BACKWARD(rows[t] >= 0 && rows[t] < kMostRows - all_rows, "rows[", t,
                        "] must be a table's number of rows, got ", rows[t]);
      all_rows += rows[t];
    }
    check_padding(args, [&](size_t t) { return rows[t]; });
    for (size_t f = 0; f < args.size(); ++f)
      if (grad_outs[f]) add(*grad_outs[f], args, f, num_bags(f));
    check_tables(weights, rows);
  }

  // Of each table; that of some gradient where it has none.
  std::vector<ScalarType> dtypes() const {
    std::vector<ScalarType> dtypes;
    for (const Tensor* grad : of_table) dtypes.push_back((grad ? *grad : some).scalar_type());
    return dtypes;
  }

 private:
  static const Tensor& first_of(const OptionalTensors& grad_outs) {
    const auto given =
        std::find_if(grad_outs.begin(), grad_outs.end(), [](const auto& g) { return bool(g); });
    RK_CHECK_BACKWARD(given != grad_outs.end(), "grad_outs has no gradient");
    return **given;
  }

  // Whether the gradient has the leading dimensions of what the feature's lookups gave.
  static bool is_like_result(const Tensor& grad, const FeatureArgs& args, size_t f, int64_t bags) {
    if (args.modes[f] != kNone) return grad.dim() == 2 && grad.size(0) == bags;
    const auto shape = args.indices[f].sizes(), got = grad.sizes();
    return got.size() == shape.size() + 1 && std::equal(shape.begin(), shape.end(), got.begin());
  }

  static std::string shape_of_result(const FeatureArgs& args, size_t f, int64_t bags) {
    if (args.modes[f] != kNone) return "[" + std::to_string(bags) + ", D]";
    const std::string shape = shape_of(args.indices[f]);
    return shape == "[]" ? "[D]" : shape.substr(0, shape.size() - 1) + ", D]";
  }

  void add(const Tensor& grad, const FeatureArgs& args, size_t f, int64_t bags) {
    const ScalarType dtype = grad.scalar_type();
    RK_CHECK_BACKWARD(is_floating(dtype), "grad_outs[", f,
                      "] must be float32, float64, float16 or bfloat16, got ", name_of(dtype));
    RK_CHECK_BACKWARD(is_like_result(grad, args, f, bags), "grad_outs[", f, "] must be ",
                      shape_of_result(args, f, bags), " like the result, got shape ", shape_of(grad));
    const int64_t t = args.tables[f], D = grad.size(grad.dim() - 1);
    RK_CHECK_BACKWARD(!of_table[t] || (D == widths[t] && of_table[t]->scalar_type() == dtype), "grad_outs[",
                      f, "] must have the width and the dtype of the others of its table, ", widths[t],
                      " and ", name_of(of_table[t]->scalar_type()), ", got shape ", shape_of(grad), " and ",
                      name_of(dtype));
    of_table[t] = &grad;
    widths[t] = D;
    const bool has_factors = args.has_factors(f);
    if (has_factors) check_factor_dtype(args, f, dtype);
    need_values |= args.modes[f] == kMax || (has_factors && args.per_sample_weights[f].numel() > 0);
  }

  void check_tables(const Tensors& weights, const Ints& rows) const {
    RK_CHECK_BACKWARD(weights.size() == rows.size() || (weights.empty() && !need_values),
                      "weights must have one entry a table, ", rows.size(), ", got ", weights.size());
    for (size_t t = 0; t < weights.size(); ++t) {
      const Tensor &w = weights[t], *grad = of_table[t];
      check_table("embedding_bag_backward", w, t);
      RK_CHECK_BACKWARD(w.size(0) == rows[t] &&
                            (!grad || (w.size(1) == widths[t] && w.scalar_type() == grad->scalar_type())),
                        "weights[", t, "] must have ", rows[t], " rows",
                        grad ? " of the gradient's width and dtype, " + std::to_string(widths[t]) + " and " +
                                   name_of(grad->scalar_type())
                             : "",
                        ", got shape ", shape_of(w), " and ", name_of(w.scalar_type()));
    }
  }
};

}  // namespace rk
