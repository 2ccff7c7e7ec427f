// The embedding op's forward: threads and registration. The kernels and their mathematics are in
// embedding_bag.h.
#include "dispatch.h"
#include "embedding_bag_features.h"
#include "memory.h"
#include "parallel.h"

namespace rk {

RK_DECLARE_ISA(template <class I> bool embedding_ids_fit(const Bags&, const I*, int64_t, int64_t))
RK_DECLARE_ISA(template <class I> void embedding_rows(const Bags&, const I*, int64_t, int64_t, int64_t))
RK_DECLARE_ISA(template <class T, class I> void embedding_bags(const Bags&, const I*, int64_t, int64_t))

static Tensors embedding_bag_cpu(const Tensors& weights, const Tensors& indices, const Tensors& offsets,
                                 const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                                 const Ints& padding_idx, const Ints& frozen_rows, const Names& names,
                                 bool concat, bool /* sparse: how the backward is to be */) {
  const FeatureArgs args{indices, offsets,     per_sample_weights, tables,
                         modes,   padding_idx, frozen_rows,        &names};
  Features features(args, weights.size());
  Tensors tables_kept;
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor& w = weights[t];
    RK_CHECK(w.dim() == 2, "embedding_bag: weights[", t, "] must be [R, D], got shape ", shape_of(w));
    const auto type = w.scalar_type();
    RK_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                 type == ScalarType::BFloat16,
             "embedding_bag: weights[", t, "] must be floating-point, got ", name_of(type));
    RK_CHECK(w.is_cpu(), "embedding_bag: weights[", t, "] must be on cpu like the others");
    tables_kept.push_back(unit_stride_rows(w));
  }
  std::vector<ScalarType> dtypes;
  int64_t width = 0;
  for (size_t f = 0; f < indices.size(); ++f) {
    const Tensor& w = tables_kept[tables[f]];
    Bags& bag = features.bags[f];
    bag.weight = w.const_data_ptr();
    bag.R = w.size(0);
    bag.D = w.size(1);
    bag.stride_wr = w.stride(0);
    dtypes.push_back(w.scalar_type());
    features.check_factors(args, f, dtypes[f]);
    width += bag.D;
    RK_CHECK(!concat || (dtypes[f] == dtypes[0] && bag.B == features.bags[0].B &&
                         (modes[f] != kNone || indices[f].dim() == 1)),
             "embedding_bag: with concat, features must give [B, D] of one B and one dtype, but ",
             args.name(f), " of shape ", shape_of(indices[f]), " differs from ", args.name(0));
  }

  Tensors outs;
  if (concat) {
    outs.push_back(new_empty_paged(tables_kept[tables[0]], {features.bags[0].B, width}));
    char* out = static_cast<char*>(outs[0].mutable_data_ptr());
    for (Bags& bag : features.bags) {
      bag.out = out;
      bag.stride_ob = width;
      out += bag.D * outs[0].element_size();
    }
  } else {
    for (size_t f = 0; f < indices.size(); ++f) {
      Bags& bag = features.bags[f];
      std::vector<int64_t> shape{bag.B};
      if (bag.mode == kNone) shape.assign(indices[f].sizes().begin(), indices[f].sizes().end());
      shape.push_back(bag.D);
      outs.push_back(new_empty_paged(tables_kept[tables[f]], shape));
      bag.out = outs[f].mutable_data_ptr();
      bag.stride_ob = bag.D;
    }
  }

  const BagTasks plan(features);
  std::atomic<bool> fit{true};
  run_tasks(plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bag = features.bags[f];
    dispatch_ids(bag, [&, f = f, b0 = b0, b1 = b1](const auto* ids) {
      if (!RK_DISPATCH_ISA(embedding_ids_fit, bag, ids, bag.begin(b0), bag.begin(b1))) {
        fit = false;
      } else if (bag.L == 1 && !bag.per_sample_weights && bag.padding_idx < 0) {  // every bag is one row
        RK_DISPATCH_ISA(embedding_rows, bag, ids, tables_kept[tables[f]].element_size(), b0, b1);
      } else {
        dispatch_floating(dtypes[f], [&](auto* type) {
          RK_DISPATCH_ISA(embedding_bags<std::remove_pointer_t<decltype(type)>>, bag, ids, b0, b1);
        });
      }
    });
  });
  if (!fit)
    for (size_t f = 0; f < indices.size(); ++f) features.check_range(args, f);
  return outs;
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) { m.impl("embedding_bag", TORCH_BOX(&rk::embedding_bag_cpu)); }
