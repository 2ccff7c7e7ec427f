// The arguments of DIN attention: their checks, before anything is written, and where each sample's rows are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/din_attention/folded_network.h"

namespace rk {

struct DinArguments {
  const Tensor &history, &target;
  const OptionalTensor &lengths, &mask, &offsets, &history_index;
  const std::vector<Tensor>&params, &running_stats;
  DinConfig config;

  int64_t B() const { return target.size(0); }
  // Histories in a batch that has them: as many as samples, or with history_index any number.
  int64_t histories() const {
    return !history_index ? B() : offsets ? offsets->numel() - 1 : history.size(0);
  }
  int64_t D() const { return target.size(1); }
  bool has_running_stats() const { return running_stats.size() > 1; }
  bool batch_statistics() const { return config.training && config.norms() * layers() > 0; }
  // Whether these are of the rows of several processes.
  bool joint() const { return batch_statistics() && !config.group.empty(); }
  int64_t layers() const { return (static_cast<int64_t>(params.size()) - 2) / config.params_per_layer(); }
  int64_t width(int64_t layer) const { return params[layer * config.params_per_layer()].size(0); }
};

#define RK_DIN_CHECK(condition, ...) RK_CHECK(condition, "din_attention: ", __VA_ARGS__)

// Ranks, sizes and dtypes; the texts are those of ops/din_attention.py.
inline void check_history(const DinArguments& a) {
  const Tensor &history = a.history, &target = a.target;
  std::string given;
  for (const auto& [name, t] :
       {std::pair("lengths", &a.lengths), std::pair("mask", &a.mask), std::pair("offsets", &a.offsets)})
    if (*t) given += (given.empty() ? "" : " and ") + std::string(name);
  RK_DIN_CHECK(given.find(' ') == std::string::npos, "give one of lengths, mask and offsets, got ", given);
  RK_DIN_CHECK(target.dim() == 2, "target must be [B, D], got shape ", shape_of(target));
  const bool jagged = a.offsets.has_value();
  const std::string n = a.history_index ? "U" : "B";
  RK_DIN_CHECK(history.dim() == (jagged ? 2 : 3), "history must be ",
               jagged ? "[N, D] beside offsets" : "[" + n + ", L, D]", ", got shape ", shape_of(history));
  RK_DIN_CHECK(history.size(history.dim() - 1) == a.D(), "history and target must have one width D, got ",
               history.size(history.dim() - 1), " and ", a.D());
  RK_CHECK_FLOATING("din_attention", history);
  RK_DIN_CHECK(dtype_of(history) == dtype_of(target), "history and target must have one dtype, got ",
               name_of(dtype_of(history)), " and ", name_of(dtype_of(target)));
  RK_DIN_CHECK(target.is_cpu() && history.is_cpu(), "all arguments must be on one device");
  const auto check_integers = [](const Tensor& t, const char* name) {
    RK_DIN_CHECK(dtype_of(t) == ScalarType::Int || dtype_of(t) == ScalarType::Long, name,
                 " must be int32 or int64, got ", name_of(dtype_of(t)));
    RK_DIN_CHECK(t.is_cpu(), "all arguments must be on one device");
  };
  if (a.history_index) {
    RK_DIN_CHECK(a.history_index->dim() == 1 && a.history_index->size(0) == a.B(),
                 "history_index must be [B] = [", a.B(), "], got shape ", shape_of(*a.history_index));
    check_integers(*a.history_index, "history_index");
  }
  if (jagged) {
    RK_DIN_CHECK(
        a.offsets->dim() == 1 && (a.history_index ? a.offsets->size(0) > 0 : a.offsets->size(0) == a.B() + 1),
        "offsets must be [", n, " + 1]", a.history_index ? "" : " = [" + std::to_string(a.B() + 1) + "]",
        ", got shape ", shape_of(*a.offsets));
    check_integers(*a.offsets, "offsets");
    return;
  }
  const int64_t U = a.histories();
  RK_DIN_CHECK(history.size(0) == U, "history and target must have one batch size B, got ", history.size(0),
               " and ", a.B());
  if (a.lengths) {
    RK_DIN_CHECK(a.lengths->dim() == 1 && a.lengths->size(0) == U, "lengths must be [", n, "] = [", U,
                 "], got shape ", shape_of(*a.lengths));
    check_integers(*a.lengths, "lengths");
  }
  if (a.mask) {
    RK_DIN_CHECK(a.mask->dim() == 2 && a.mask->size(0) == U && a.mask->size(1) == history.size(1),
                 "mask must be [", n, ", L] = [", U, ", ", history.size(1), "], got shape ",
                 shape_of(*a.mask));
    RK_DIN_CHECK(dtype_of(*a.mask) == ScalarType::Bool, "mask must be bool, true at valid rows, got ",
                 name_of(dtype_of(*a.mask)));
    RK_DIN_CHECK(a.mask->is_cpu(), "all arguments must be on one device");
  }
}

inline void check_valid_rows(double valid) {
  RK_DIN_CHECK(valid != 1, "training needs more than one valid row to take statistics of, got ", valid);
}

inline void check_params(const DinArguments& a) {
  const DinConfig& config = a.config;
  const int64_t per_layer = config.params_per_layer(), n = static_cast<int64_t>(a.params.size());
  RK_DIN_CHECK(n >= 2 && (n - 2) % per_layer == 0, "params must be ", per_layer,
               " tensors a hidden layer and 2 of the output layer, got ", n);
  const auto check_list = [](const std::vector<Tensor>& list, const char* name) {
    for (size_t i = 0; i < list.size(); ++i) {
      RK_DIN_CHECK(is_floating(dtype_of(list[i])), name, "[", i,
                   "] must be float32, float64, float16 or bfloat16, got ", name_of(dtype_of(list[i])));
      RK_DIN_CHECK(list[i].is_cpu(), "all arguments must be on one device");
    }
  };
  check_list(a.params, "params");
  check_list(a.running_stats, "running_stats");
  const int64_t stats = 2 * config.norms();
  const int64_t given = a.running_stats.size();
  const bool none = given == 0 || (given == 1 && a.running_stats[0].numel() == 0);
  RK_DIN_CHECK((none && (config.training || !config.norms())) || given == stats * a.layers(),
               "running_stats must hold 2 tensors for each of ", config.norms() * a.layers(), " norms, got ",
               a.running_stats.size());
  const bool has_slope =
      config.activation == ActivationName::prelu || config.activation == ActivationName::dice;
  int64_t width = 4 * a.D();
  for (int64_t i = 0; i < a.layers(); ++i) {
    const Tensor* layer = &a.params[i * per_layer];
    RK_DIN_CHECK(layer->dim() == 2 && layer->size(1) == width, "the weight of hidden layer ", i,
                 " must be [H, ", width, "], got shape ", shape_of(*layer));
    width = layer->size(0);
    for (int64_t j = 1; j < per_layer; ++j) {
      const bool slope = has_slope && j == per_layer - 1;
      RK_DIN_CHECK(layer[j].dim() == 1 && (layer[j].size(0) == width || (slope && layer[j].size(0) == 1)),
                   "hidden layer ", i, " needs vectors of ", width, " values",
                   slope ? ", its slope may have one" : "", ", got ", shape_of(layer[j]));
    }
    if (none) continue;
    for (int64_t j = i * stats; j < (i + 1) * stats; ++j)
      RK_DIN_CHECK(a.running_stats[j].dim() == 1 && a.running_stats[j].size(0) == width, "running_stats[", j,
                   "] must be [", width, "], got ", shape_of(a.running_stats[j]));
  }
  const Tensor &weight = a.params[n - 2], &bias = a.params[n - 1];
  RK_DIN_CHECK(weight.dim() == 2 && weight.size(0) == 1 && weight.size(1) == width && bias.numel() == 1,
               "the output layer must be [1, ", width, "] with a bias [1], got ", shape_of(weight), " and ",
               shape_of(bias));
}

// Of the schema, checked but for what only values say.
inline DinArguments arguments(const Tensor& history, const Tensor& target, const OptionalTensor& lengths,
                              const OptionalTensor& mask, const OptionalTensor& offsets,
                              const OptionalTensor& history_index, const std::vector<Tensor>& params,
                              const std::vector<Tensor>& running_stats, int64_t activation, bool batch_norm,
                              bool use_softmax, bool count_padding, bool return_scores, bool training,
                              double norm_eps, double dice_eps, double dropout, const OptionalTensor& seed,
                              const std::string& group) {
  check_activation("din_attention", static_cast<ActivationName>(activation));
  RK_DIN_CHECK(dropout >= 0 && dropout <= 1, "dropout must be a probability, got ", dropout);
  RK_DIN_CHECK(dropout == 0 || (seed && seed->numel() == 1 && dtype_of(*seed) == ScalarType::Long),
               "dropout needs a seed of one int64, got ",
               seed ? shape_of(*seed) + " " + name_of(dtype_of(*seed)) : "none");
  RK_DIN_CHECK(!seed || seed->is_cpu(), "all arguments must be on one device");
  const uint64_t seed_value = dropout > 0 ? *static_cast<const uint64_t*>(seed->const_data_ptr()) : 0;
  const DinArguments a{history,
                       target,
                       lengths,
                       mask,
                       offsets,
                       history_index,
                       params,
                       running_stats,
                       {static_cast<ActivationName>(activation), batch_norm, use_softmax, count_padding,
                        return_scores, training, norm_eps, dice_eps, dropout, seed_value, group}};
  check_history(a);
  check_params(a);
  if (a.layers() > 0 && batch_norm) check_epsilon("din_attention", "norm_eps", norm_eps, training);
  if (a.layers() > 0 && a.config.activation >= ActivationName::dice)
    check_epsilon("din_attention", "dice_eps", dice_eps, training && a.config.dice_norm());
  return a;
}

}  // namespace rk
