// The embedding op's forward on a GPU: checks, launches, registration. The kernel and its mathematics are in
// lookup.cuh.
//
// Ids are never followed out of their table. Whether such an id is also said is RANKKERNELS_CHECK_IDS, read
// once: "ignore" (the default) says nothing and never waits for the device, so that a CUDA graph captures the
// op; "warn" and "fatal" wait for each launch, and print or raise the first one, with its feature, position
// and value.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/common/driver.h"
#include "cuda/embedding/known_rows.h"
#include "cuda/embedding/lookup.h"

namespace rk {
namespace cuda {

enum class CheckIds { kIgnore, kWarn, kFatal };

static CheckIds check_ids() {
  static const CheckIds mode = [] {
    const char* value = std::getenv("RANKKERNELS_CHECK_IDS");
    if (!value || !*value || !std::strcmp(value, "ignore")) return CheckIds::kIgnore;
    if (!std::strcmp(value, "warn")) return CheckIds::kWarn;
    RK_CHECK(!std::strcmp(value, "fatal"), "RANKKERNELS_CHECK_IDS must be ignore, warn or fatal, got ",
             value);
    return CheckIds::kFatal;
  }();
  return mode;
}

static int64_t read_int(const Device& device, const void* p, bool wide, int64_t i) {
  return wide ? device.read(static_cast<const int64_t*>(p) + i)
              : device.read(static_cast<const int32_t*>(p) + i);
}

// What a report of feature f is about.
static std::string message(const Device& device, const FeatureArgs& args, size_t f, const Bags& bags,
                           Report report) {
  const int64_t position = report & ((Report(1) << kPositionBits) - 1);
  if ((report >> kPositionBits) % 2 == kBadOffset) {
    std::ostringstream s;
    s << "embedding_bag: offsets of " << args.name(f) << " must start at 0, not decrease and not exceed "
      << bags.L << ", the number of ids: offsets[" << position
      << "] = " << read_int(device, bags.offsets, bags.wide_offsets, position);
    if (position + 1 < bags.B)
      s << " is before " << read_int(device, bags.offsets, bags.wide_offsets, position + 1);
    return s.str();
  }
  return out_of_range(args, f, position, read_int(device, bags.ids, bags.wide_ids, position), bags.R);
}

RangeReport::RangeReport(const Device& device, const Tensor& like) : device_(device) {
  if (check_ids() != CheckIds::kIgnore) found_ = torch::stable::new_empty(like, {1}, ScalarType::Long);
}

Report* RangeReport::start() {
  if (check_ids() == CheckIds::kIgnore) return nullptr;
  torch::stable::fill_(found_, -1);
  return static_cast<Report*>(found_.mutable_data_ptr());
}

void RangeReport::finish(const FeatureArgs& args, const std::vector<Bags>& features,
                         const std::vector<size_t>& launched) {
  if (check_ids() == CheckIds::kIgnore) return;
  const Report found = device_.read(static_cast<const Report*>(found_.const_data_ptr()));
  if (found == ~Report(0)) return;
  const size_t f = launched[found >> kPositionBits >> 1];
  const std::string text = message(device_, args, f, features[f], found);
  RK_CHECK(check_ids() == CheckIds::kWarn, text);
  std::fprintf(stderr, "%s\n", text.c_str());
}

Forward::Forward(const Tensors& weights, const FeatureArgs& args, bool concat) {
  const size_t n = args.size();
  check_lengths(args, weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor& w = weights[t];
    check_table("embedding_bag", w, t);
    RK_CHECK_BAG(on_device(w), "weights[", t, "] must be on a GPU like the others");
    RK_CHECK_BAG(on_device_of(w, weights[0]), "weights[", t, "] must be on the device of the others, ",
                 weights[0].get_device_index(), ", got ", w.get_device_index());
    tables.push_back(unit_stride_rows(w));
  }
  check_padding(args, [&](size_t t) { return weights[t].size(0); });
  features.resize(n);
  for (size_t f = 0; f < n; ++f) {
    const Tensor& w = table(args, f);
    Bags& bags = features[f] = bags_of(args, f, w, kept_);
    bags.weight = w.const_data_ptr();
    bags.stride_wr = w.stride(0);
    bags.R = w.size(0);
    bags.D = checked_int32(w.size(1), "the width of a table");
    width += bags.D;
    RK_CHECK_BAG(!concat || (w.scalar_type() == table(args, 0).scalar_type() && bags.B == features[0].B &&
                             (args.modes[f] != kNone || args.indices[f].dim() == 1)),
                 "with concat, features must give [B, D] of one B and one dtype, but ", args.name(f),
                 " of shape ", shape_of(args.indices[f]), " differs from ", args.name(0));
  }

  rows_ = find_rows(args);
  for (size_t f = 0; f < n; ++f) use_rows(args, f, rows_, features[f]);

  if (concat) outs.push_back(torch::stable::new_empty(table(args, 0), {features[0].B, width}));
  int64_t column = 0;
  for (size_t f = 0; f < n; ++f) {
    const Tensor& w = table(args, f);
    Bags& bags = features[f];
    bool out_aligned = true;
    if (concat) {
      bags.out = static_cast<char*>(outs[0].mutable_data_ptr()) + column * w.element_size();
      bags.stride_ob = checked_int32(width, "the sum of the widths");
      out_aligned = column * w.element_size() % 16 == 0 && rows_aligned(outs[0]);
      column += bags.D;
    } else {
      std::vector<int64_t> shape{bags.B};
      if (bags.mode == kNone) shape.assign(args.indices[f].sizes().begin(), args.indices[f].sizes().end());
      shape.push_back(bags.D);
      outs.push_back(torch::stable::new_empty(w, shape));
      bags.out = outs[f].mutable_data_ptr();
      bags.stride_ob = bags.D;
      out_aligned = reinterpret_cast<uintptr_t>(bags.out) % 16 == 0;
    }
    const int64_t pack = 16 / w.element_size();
    bags.packed = bags.D % pack == 0 && rows_aligned(w) && out_aligned;
    bags.log2_lanes = log2_lanes(bags.packed ? bags.D / pack : bags.D);
  }
}

static Tensors embedding_bag_cuda(const Tensors& weights, const Tensors& indices, const Tensors& offsets,
                                  const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
                                  const Ints& padding_idx, const Ints& frozen_rows, const Ints& known,
                                  const Names& names, bool concat, bool /* sparse: the backward's */) {
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   &names};
  Forward forward(weights, args, concat);
  forward.launch_features(
      args, [&](size_t f) { return forward.features[f]; },
      [](auto* type, const Device& device, const Batch<Bags>& batch, int64_t blocks, Report* report) {
        device.launch(embedding_bag<std::remove_pointer_t<decltype(type)>>, blocks, 0, batch, report);
      });
  return std::move(forward.outs);
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  if (rk::cuda::refusal() != rk::cuda::Refusal::none) return;
  m.impl("embedding_bag", TORCH_BOX(&rk::cuda::embedding_bag_cuda));
}
