// The embedding op's forward: threads and registration. The kernels and their mathematics are in
// lookup_kernel.h.
#include "cpu/embedding/lookup.h"

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"

namespace rk {

ForwardArgs::ForwardArgs(const Tensors& weights, const FeatureArgs& args, bool concat, int64_t extra_columns)
    : args(args), features(args, weights.size()) {
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table("embedding_bag", weights[t], t);
    RK_CHECK_BAG(weights[t].is_cpu(), "weights[", t, "] must be on cpu like the others");
    tables.push_back(unit_stride_rows(weights[t]));
  }
  check_padding(args, [&](size_t t) { return tables[t].size(0); });
  int64_t width = extra_columns;
  for (size_t f = 0; f < args.size(); ++f) {
    const Tensor& w = tables[args.tables[f]];
    Bags& bag = features.bags[f];
    bag.weight = w.const_data_ptr();
    bag.R = w.size(0);
    bag.D = w.size(1);
    bag.stride_wr = w.stride(0);
    bag.item_bytes = w.element_size();
    if (args.has_factors(f)) check_factor_dtype(args, f, dtype(f));
    width += bag.D;
    RK_CHECK_BAG(!concat || (dtype(f) == dtype(0) && bag.B == features.bags[0].B &&
                             (bag.mode != kNone || args.indices[f].dim() == 1)),
                 "with concat, features must give [B, D] of one B and one dtype, but ", args.name(f),
                 " of shape ", shape_of(args.indices[f]), " differs from ", args.name(0));
  }
  if (concat) {
    outs.push_back(new_empty_paged(tables[args.tables[0]], {features.bags[0].B, width}));
    char* out = static_cast<char*>(outs[0].mutable_data_ptr());
    for (Bags& bag : features.bags) {
      bag.out = out;
      bag.stride_ob = width;
      out += bag.D * outs[0].element_size();
    }
    return;
  }
  for (size_t f = 0; f < args.size(); ++f) {
    Bags& bag = features.bags[f];
    std::vector<int64_t> shape{bag.B};
    if (bag.mode == kNone) shape.assign(args.indices[f].sizes().begin(), args.indices[f].sizes().end());
    shape.push_back(bag.D);
    outs.push_back(new_empty_paged(tables[args.tables[f]], shape));
    bag.out = outs[f].mutable_data_ptr();
    bag.stride_ob = bag.D;
  }
}

bool ForwardArgs::look_up(size_t f, int64_t b0, int64_t b1) const {
  const Bags& bag = features.bags[f];
  if (bag.are_rows()) return RK_DISPATCH_ISA(embedding_rows, bag, {b0, b1});
  bool in_range = true;
  dispatch_floating(dtype(f), [&](auto* type) {
    in_range = RK_DISPATCH_ISA(embedding_bags<std::remove_pointer_t<decltype(type)>>, bag, {b0, b1});
  });
  return in_range;
}

void ForwardArgs::check_range() const {
  for (size_t f = 0; f < args.size(); ++f) features.check_range(args, f);
}

static Tensors embedding_bag_cpu(const Tensors& weights, const Tensors& indices, const Tensors& offsets,
                                 const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                                 const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                                 const Names& names, bool concat,
                                 bool /* sparse: how the backward is to be */) {
  const ForwardArgs forward(
      weights, {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, &names},
      concat);
  forward.for_each_part([&](size_t f, int64_t b0, int64_t b1) { return forward.look_up(f, b0, b1); });
  return forward.outs;
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) { m.impl("embedding_bag", TORCH_BOX(&rk::embedding_bag_cpu)); }
