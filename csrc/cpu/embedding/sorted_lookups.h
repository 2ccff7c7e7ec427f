// Lookups sorted by (table, row), and the sums of their rows' gradients.
#pragma once

#include <memory>

#include "cpu/embedding/backward_args.h"

namespace rk {

// The lookups of all features that have a gradient, sorted by (table, row).
class SortedLookups {
 public:
  explicit SortedLookups(const BackwardArgs& backward);
  SortedLookups(const SortedLookups&) = delete;

  // The rows of each table that were looked up.
  Ints count_rows();
  // Sums every row's gradient and brings the sum to where its table says; fills in first_key, first_grad and
  // D. With `rows` in a table, count_rows must have been called.
  void reduce(std::vector<TableGrad> tables, const std::vector<ScalarType>& dtypes, const Ints& widths) const;

 private:
  // Where a feature's lookups begin in sorted_, and its gradients in grad_rows_: what belongs to a table lies
  // together.
  struct Offsets {
    int64_t lookup, grad;
  };

  void place_lookups(const BackwardArgs& backward);
  void write_keys(const BackwardArgs& backward);
  // Pointers to the gradients of these bags of feature f, and their factors.
  void write_gradients(const Bags& bag, size_t f, const double* weights, int64_t item_bytes, Range range);
  void sort(const Ints& rows);
  int64_t tiles() const;
  int64_t table_of(uint64_t key) const;
  // The number of segments that start before p.
  int64_t segments_before(int64_t p) const;

  Ints first_, first_grad_;  // lookup, and gradient, of each table, and the end of the last's
  std::vector<Offsets> offsets_;
  int shift_ = 0;  // bits of a gradient's number
  std::unique_ptr<uint64_t[]> sorted_;
  std::unique_ptr<const void*[]> grad_rows_;
  std::unique_ptr<double[]> factors_;
  Tensors max_grad_rows_;
  std::vector<uint64_t> first_key_;  // of each table, and the end of the last; a table's last key is no row's
  std::vector<int64_t> segments_before_tile_, segments_before_table_;
  Segments segments_{};
};

}  // namespace rk
