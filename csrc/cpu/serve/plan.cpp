#include "cpu/serve/plan.h"

#include <algorithm>

#include "cpu/simd/operand.h"

namespace rk {

#define RK_RANK_CHECK(condition, ...) RK_CHECK(condition, "rank: ", __VA_ARGS__)

class RankPlan::Reader {
 public:
  Reader(const Tensor& plan, const Tensor& weights) : weights_(weights.numel()) {
    RK_RANK_CHECK(
        plan.is_cpu() && dtype_of(plan) == ScalarType::Long && plan.dim() == 1 && plan.is_contiguous(),
        "plan must be a vector of torch.int64 on cpu, got ", shape_of(plan));
    RK_RANK_CHECK(weights.is_cpu() && dtype_of(weights) == ScalarType::Float && weights.dim() == 1 &&
                      weights.is_contiguous(),
                  "weights must be a vector of torch.float32 on cpu, got ", shape_of(weights));
    at_ = static_cast<const int64_t*>(plan.const_data_ptr());
    end_ = at_ + plan.numel();
    data_ = static_cast<const float*>(weights.const_data_ptr());
  }
  int64_t next() {
    RK_RANK_CHECK(at_ < end_, "plan ends early");
    return *at_++;
  }
  int64_t next(int64_t low, int64_t high) {
    const int64_t value = next();
    RK_RANK_CHECK(value >= low && value <= high, "plan has ", value, " where ", low, " .. ", high,
                  " is meant");
    return value;
  }
  // So many floats at the next number's place; null for -1.
  const float* floats(int64_t size) {
    const int64_t place = next(-1, weights_);
    RK_RANK_CHECK(place < 0 || size <= weights_ - place, "plan reads ", size, " weights at ", place, " of ",
                  weights_);
    return place < 0 ? nullptr : data_ + place;
  }
  const float* needed(int64_t size) {
    const float* p = floats(size);
    RK_RANK_CHECK(p, "plan lacks weights");
    return p;
  }
  void done() const { RK_RANK_CHECK(at_ == end_, "plan has ", end_ - at_, " numbers too many"); }

 private:
  const int64_t *at_, *end_;
  const float* data_;
  int64_t weights_;
};

// Of places and ids, and of widths, whose products then fit, too.
constexpr int64_t kMost = int64_t(1) << 40, kWidest = 1 << 20;

FrozenTable frozen_table(const Tensor& t, const std::string& name, int64_t bits, int64_t D) {
  RK_RANK_CHECK((bits == 4 || bits == 8 || bits == 16 || bits == 32) && D > 0,
                "a table has 4, 8, 16 or 32 bits, got ", bits, " and a width of ", D);
  const ScalarType dtype = bits == 32   ? ScalarType::Float
                           : bits == 16 ? ScalarType::BFloat16
                                        : ScalarType::Byte;
  const int64_t width = bits == 8 ? 8 + D : bits == 4 ? 8 + (D + 1) / 2 : D;
  RK_RANK_CHECK(t.is_cpu() && t.dim() == 2 && t.size(1) == width && dtype_of(t) == dtype && t.is_contiguous(),
                name, " must be ", name_of(dtype), " [R, ", width, "] on cpu, got ", name_of(dtype_of(t)),
                " ", shape_of(t));
  return {static_cast<const char*>(t.const_data_ptr()), t.size(0), D, width * (bits < 16 ? 1 : bits / 8),
          bits};
}

std::vector<RankLayer> RankPlan::read_layers(Reader& r, bool first_is_attention) {
  std::vector<RankLayer> layers(r.next(1, 100));
  for (size_t i = 0; i < layers.size(); ++i) {
    RankLayer& l = layers[i];
    l.in = r.next(0, kWidest);
    l.out = r.next(1, kWidest);
    RK_RANK_CHECK(i == 0 || l.in == layers[i - 1].out, "plan has a layer of ", l.in, " inputs behind ",
                  layers[i - 1].out, " units");
    const int64_t units = 4 * l.groups();
    l.weight = i == 0 && first_is_attention ? r.floats(0) : r.needed(units * l.in);
    l.bias = r.needed(i == 0 && first_is_attention ? padded<float>(l.out) : units);
    l.activation = static_cast<Activation>(r.next(0, static_cast<int64_t>(Activation::dice_batch_norm)));
    const bool slope = l.activation != Activation::relu && l.activation != Activation::sigmoid;
    const bool norm = l.activation == Activation::dice_batch_norm;
    l.alpha = slope ? r.needed(l.out) : r.floats(0);
    l.v_scale = norm ? r.needed(l.out) : r.floats(0);
    l.v_shift = norm ? r.needed(l.out) : r.floats(0);
    l.epsilon = *r.needed(1);
    const bool last = i + 1 == layers.size();
    l.score_weight = last ? r.needed(l.out) : r.floats(0);
    l.score_bias = *r.needed(1);
  }
  return layers;
}

int64_t RankPlan::column(Reader& r, int64_t n) const {
  const int64_t first = r.next(-1, width);
  RK_RANK_CHECK(first < 0 || n <= width - first, "plan has columns beyond ", width);
  return first;
}

void RankPlan::read_unit(Reader& r) {
  const int64_t num_lookups = static_cast<int64_t>(lookups.size());
  RankUnit u{};
  for (int64_t parts = r.next(1, num_lookups); parts > 0; --parts) {
    u.histories.push_back(r.next(0, num_lookups - 1));
    u.targets.push_back(r.next(0, num_lookups - 1));
    const RankLookup &h = lookups[u.histories.back()], &t = lookups[u.targets.back()];
    RK_RANK_CHECK(h.history && !t.history && t.column >= 0 && tables[h.table].D == tables[t.table].D,
                  "plan has a history that does not fit its target");
    u.D += tables[h.table].D;
  }
  u.column = column(r, u.D);
  u.length = r.next(-1, inputs - 1);
  u.masked = r.next(0, 1);
  u.use_softmax = r.next(0, 1);
  u.count_padding = r.next(0, 1);
  u.layers = read_layers(r, true);
  const int64_t H = u.layers[0].out, packed = u.layers[0].groups() * rank_width(u.D) * 4;
  RK_RANK_CHECK(u.layers[0].in == u.D && u.column >= 0, "plan has an attention of another width");
  u.history_weight = r.needed(u.D * padded<float>(H));
  u.target_weight = r.needed(packed);
  u.product_weight = r.needed(packed);
  units.push_back(u);
}

RankPlan::RankPlan(const Tensor& plan, const Tensor& weights, const Tensors& given) {
  Reader r(plan, weights);
  inputs = r.next(1, kMost);
  width = r.next(0, kWidest);
  fm_width = r.next(0, kWidest);
  sigmoid = r.next(0, 1);
  constant = *r.needed(1);
  const int64_t num_tables = r.next(0, kMost);
  RK_RANK_CHECK(num_tables == static_cast<int64_t>(given.size()), "plan has ", num_tables, " tables, got ",
                given.size());
  for (const Tensor& t : given) {
    const int64_t bits = r.next(4, 32), D = r.next(1, kWidest);
    tables.push_back(frozen_table(t, "tables[" + std::to_string(tables.size()) + "]", bits, D));
  }
  for (int64_t n = r.next(0, kMost); n > 0; --n) {
    RankLookup l{};
    l.input = r.next(0, inputs - 1);
    l.table = r.next(0, num_tables - 1);
    const int64_t D = tables[l.table].D, R = tables[l.table].R;
    l.mode = r.next(kNone, kMean);
    l.padding_idx = r.next(-1, kMost);
    l.known.unknown = static_cast<Unknown>(r.next(0, 2));
    l.known.size = r.next(l.known.unknown != Unknown::error, R);
    l.known.padding_idx = r.next(-1, R - 1);
    l.column = column(r, D);
    l.weight = r.floats(D);
    l.fm = r.next(0, 1);
    l.history = r.next(0, 1);
    RK_RANK_CHECK(!l.fm || D == fm_width, "plan has an FM of ", fm_width, " and a field of ", D);
    lookups.push_back(l);
  }
  for (int64_t n = r.next(0, kMost); n > 0; --n) {
    RankDense d{};
    d.input = r.next(0, inputs - 1);
    d.width = r.next(1, kWidest);
    d.column = column(r, d.width);
    d.weight = r.floats(d.width);
    d.field = r.floats(fm_width);
    RK_RANK_CHECK(!d.field || (d.width == 1 && fm_width > 0), "plan has an FM of ", fm_width,
                  " and a field of ", d.width, " numbers");
    dense.push_back(d);
  }
  for (int64_t n = r.next(0, kMost); n > 0; --n) read_unit(r);
  if (r.next(0, 1)) {
    layers = read_layers(r, false);
    RK_RANK_CHECK(layers[0].in == width, "plan has an MLP of another width");
  }
  r.done();
}

}  // namespace rk
