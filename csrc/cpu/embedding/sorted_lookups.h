// A backward from the op's arguments to sorted lookups and the sums of their rows.
#pragma once

#include <tuple>

#include "cpu/embedding/features.h"
#include "cpu/runtime/radix_sort.h"

namespace rk {

inline Ints rows_of(const Tensors& weights) {
  Ints rows;
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table("embedding_bag_update", weights[t], t);
    rows.push_back(weights[t].size(0));
  }
  return rows;
}

// The arguments of a backward, checked; `bags` have the gradients of the outputs as `out`.
struct BackwardArgs {
  FeatureArgs args;
  Features features;
  Tensors grads;                    // of each feature's output, rows of unit stride
  Tensors tables;                   // rows of unit stride; empty if their values are not needed
  Ints rows, widths;                // of each table
  std::vector<const Tensor*> like;  // a gradient with the dtype of the table, null for one without
  const Tensor& any;                // a gradient

  BackwardArgs(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
               const FeatureArgs& args);
  // The gradients of the per-sample weights.
  Tensors factor_grads() const;
};

// The lookups of all features that have a gradient, sorted by (table, row).
class SortedLookups {
 public:
  explicit SortedLookups(const BackwardArgs& backward);
  SortedLookups(const SortedLookups&) = delete;

  // The rows of each table that were looked up.
  Ints count_rows();
  // Sums every row's gradient and brings the sum to where its table says; first_key, first_grad and D are
  // filled in here.
  // With `rows` in a table, count_rows must have been called.
  void reduce(std::vector<TableGrad> tables, const std::vector<ScalarType>& dtypes, const Ints& widths) const;

 private:
  int64_t tiles() const;
  int64_t table_of(uint64_t key) const;
  // The number of segments that start before p.
  int64_t segments_before(int64_t p) const;

  Ints first_, first_grad_;  // lookup, and gradient, of each table, and the end of the last's
  std::unique_ptr<uint64_t[]> sorted_;
  std::unique_ptr<const void*[]> grad_rows_;
  std::unique_ptr<double[]> factors_;
  Tensors max_grad_rows_;
  std::vector<uint64_t> first_key_;  // of each table, and the end of the last; a table's last key is no row's
  std::vector<int64_t> segments_before_tile_, segments_before_table_;
  Segments segments_;
};

// The rows of each table that were looked up, ascending; their gradients; those of the per-sample weights.
// `fm` has a part for each table, or is empty.
std::tuple<Tensors, Tensors, Tensors> sparse_gradients(const BackwardArgs& backward,
                                                       const std::vector<FmPart>& fm = {});
// An optimizer's step on the rows that were looked up -> the gradients of the per-sample weights.
Tensors update_tables(const BackwardArgs& backward, const Tensors& weights, const Tensors& states,
                      int64_t optimizer, const std::vector<double>& hyper,
                      const std::vector<FmPart>& fm = {});

// Fills with zeros, past the caches if they are many: the dense gradients of 26 tables of 100,000 rows of 16
// floats take 8.2 for 16.3 ms, 6.0 for 10.5 with two threads (Zen 3), where std::memset reads what it is to
// overwrite.
void zero(const Tensors& tensors);

}  // namespace rk
