// The op's lists of tensors, checked and turned into one `Bags` a feature.
#pragma once

#include <memory>
#include <vector>

#include "cpu/embedding/params.h"
#include "cpu/tuning.h"
#include "embedding/features.h"

namespace rk {

struct Features {
  std::vector<Bags> bags;  // the fields of the table and `out` are the caller's to fill
  Tensors keepalive;       // what the pointers in `bags` point into
  std::vector<std::vector<int64_t>> starts;
  std::vector<std::unique_ptr<int64_t[]>> rows;  // of features whose unknown ids have some

  // Raises for lists of a wrong length and for features that contradict themselves.
  Features(const FeatureArgs& args, size_t num_tables);
  // Raises for the first id of feature f outside its table, if there is one.
  void check_range(const FeatureArgs& args, size_t f) const;

 private:
  // Ids that need not be rows become rows, before anything reads them.
  void find_rows(const FeatureArgs& args);
};

// Bags [b0, b1) of feature f.
struct BagTask {
  size_t f;
  int64_t b0, b1;
};
// Elements that looking these bags up reads.
inline int64_t lookup_work(const Bags& bags) {
  return bags.B ? (bags.N + bags.B) * (bags.D + kLookupOverhead) : 0;
}
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

// Whether every id of bags [b0, b1) is inside its table.
bool ids_in_range(const Bags& bags, int64_t b0, int64_t b1);

}  // namespace rk
