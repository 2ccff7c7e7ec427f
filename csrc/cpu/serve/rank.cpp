// The scores of one user's candidates: the user's part once, then tiles of candidates on all threads. The
// mathematics are in the kernels' headers.
#include <pthread.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "cpu/runtime/isa.h"
#include "cpu/serve/request.h"
#include "cpu/serve/user.h"
#include "cpu/tuning.h"

namespace rk {
namespace {

// OpenMP's threads do not survive a fork: the child computes on the thread that calls.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// A tile of candidates, and a thread's memory for it.
struct Tile {
  int64_t first, n, lanes;  // candidates [first, first + n)
  float *x, *target, *sums, *squares, *logit, *score;
};

class Block {
 public:
  Block(const RankRequest& request, const RankUser& user, KeptMemory& memory, int64_t tiles)
      : request_(request), plan_(request.plan), user_(user), tile_(RK_DISPATCH_ISA(rank_tile)) {
    memory.restart();
    int64_t widest = 1, rows = 1, target = 1;
    for (const RankLayer& l : plan_.layers) widest = std::max(widest, 4 * l.groups());
    for (const FrozenTable& t : plan_.tables) rows = std::max(rows, t.D);
    rows = std::max(rows, plan_.fm_width);
    int64_t operand = 1, scores = 1, pooled = 1;
    for (size_t i = 0; i < plan_.units.size(); ++i) {
      const RankUnit& u = plan_.units[i];
      for (const RankLayer& l : u.layers) widest = std::max(widest, 4 * l.groups());
      operand = std::max(operand, u.layers[0].groups() * rank_width(u.D) * 4);
      scores = std::max(scores, user.attentions[i].L * tile_);
      target = std::max(target, u.D * tile_);
      pooled = std::max(pooled, rank_width(u.D) * tile_);
    }
    for (float*& h : hidden_) h = memory.take(widest * tile_);
    stride_rows_ = (rows + 15) / 16 * 16;
    rows_ = memory.take(tile_ * stride_rows_);
    columns_ = memory.take(rows * tile_);
    std::fill_n(rows_, tile_ * stride_rows_, 0.f);
    for (int64_t*& ids : ids_) ids = memory.take_rows(tile_);
    operand_ = memory.take(operand);
    for (int64_t i = 0; i <= tiles; ++i) {  // one more for half a vector
      Tile t{};
      t.x = memory.take(plan_.width * tile_);
      t.target = memory.take(target);
      t.sums = memory.take(plan_.fm_width * tile_);
      for (float** p : {&t.squares, &t.logit, &t.score}) *p = memory.take(tile_);
      tiles_.push_back(t);
      attended_.push_back({0, t.target, memory.take(scores), memory.take(pooled)});
    }
  }

  // out [C] of the candidates in these lanes; whether their ids are in the tables.
  bool run(int64_t begin, int64_t end, float* out) {
    const int64_t n = divide(begin, end);
    for (int64_t i = 0; i < n; ++i)
      if (!look_up(tiles_[i])) return false;
    for (size_t u = 0; u < plan_.units.size(); ++u) attend(u, n);
    for (int64_t i = 0; i < n; ++i) {
      const Tile& t = tiles_[i];
      const float* score = run_layers(t);
      float* to = t.n % (tile_ / kRankVecs) ? t.squares : out + t.first;  // whole vectors
      RK_DISPATCH_ISA(rank_scores, {score, t.logit, plan_.fm_width ? t.sums : nullptr, t.squares,
                                    plan_.fm_width, plan_.sigmoid, to, t.lanes});
      if (to != out + t.first) std::memcpy(out + t.first, to, t.n * sizeof(float));
    }
    return true;
  }

 private:
  // Tiles of these lanes; returns how many: whole vectors first, then the half that is left.
  int64_t divide(int64_t begin, int64_t end) {
    const int64_t vector = tile_ / kRankVecs, vectors = (end - begin) / vector;
    const int64_t n = (vectors + kRankVecs - 1) / kRankVecs;
    for (int64_t i = 0; i <= n; ++i) {
      Tile& t = tiles_[i];
      t.first = begin + (i < n ? vectors * i / n : vectors) * vector;
      t.lanes = (i < n ? begin + vectors * (i + 1) / n * vector : end) - t.first;
      t.n = std::min(request_.C - t.first, t.lanes);
    }
    return tiles_[n].lanes ? n + 1 : n;
  }

  // Fills x, and what the FM and the linear term have of it. Rows of the next field are on their way while
  // those of this one are copied.
  bool look_up(Tile& t) {
    for (int64_t d = 0; d < plan_.fm_width; ++d) std::fill_n(t.sums + d * tile_, tile_, user_.sums[d]);
    std::fill_n(t.squares, tile_, user_.squares);
    std::fill_n(t.logit, tile_, user_.logit + plan_.constant);
    for (size_t i = 0; i < user_.lookups.size(); ++i) {
      const RankLookup &l = *user_.lookups[i],
                       *next = i + 1 < user_.lookups.size() ? user_.lookups[i + 1] : nullptr;
      if (i == 0 && !fetch(l, t, ids_[0])) return false;
      if (next && !fetch(*next, t, ids_[(i + 1) % 2])) return false;
      if (l.mode == kNone)
        RK_DISPATCH_ISA(frozen_rows, {request_.table(l), ids_[i % 2], t.n, rows_, stride_rows_, false});
      else if (!pool(l, t, ids_[i % 2]))
        return false;
      const int64_t D = request_.table(l).D;
      float* columns = l.column >= 0 ? t.x + l.column * tile_ : columns_;
      RK_DISPATCH_ISA(rank_columns, {rows_, stride_rows_, D, columns, t.lanes});
      if (l.fm || l.weight)
        RK_DISPATCH_ISA(rank_field,
                        {columns, D, l.weight, l.fm ? t.sums : nullptr, t.squares, t.logit, t.lanes});
    }
    for (const RankDense* d : user_.dense) {
      const float* from = request_.inputs[d->input].values() + t.first * d->width;
      float* columns = d->column >= 0 ? t.x + d->column * tile_ : columns_;
      for (int64_t k = 0; k < d->width; ++k) {
        float* column = d->column >= 0 ? columns + k * tile_ : columns;
        for (int64_t j = 0; j < t.n; ++j) column[j] = from[j * d->width + k];
        std::fill(column + t.n, column + tile_, 0.f);
        if (d->weight)
          RK_DISPATCH_ISA(rank_field, {column, 1, d->weight + k, nullptr, nullptr, t.logit, t.lanes});
      }
      if (d->field) add_numbers_field(*d, from, t);
    }
    return true;
  }

  // One number a candidate times the vector that makes it a field of the FM.
  void add_numbers_field(const RankDense& d, const float* from, Tile& t) {
    std::fill_n(columns_, plan_.fm_width * tile_, 0.f);
    for (int64_t k = 0; k < plan_.fm_width; ++k)
      for (int64_t j = 0; j < t.n; ++j) columns_[k * tile_ + j] = d.field[k] * from[j];
    RK_DISPATCH_ISA(rank_field, {columns_, plan_.fm_width, nullptr, t.sums, t.squares, t.logit, t.lanes});
  }

  bool fetch(const RankLookup& l, const Tile& t, int64_t* ids) const {
    if (l.mode != kNone) return true;
    if (!request_.rows(l, t.first, t.n, ids)) return false;
    const FrozenTable& table = request_.table(l);
    for (int64_t i = 0; i < t.n; ++i)
      for (int64_t byte = 0; byte < table.row_bytes; byte += kCacheLine)
        __builtin_prefetch(table.data + ids[i] * table.row_bytes + byte);
    return true;
  }

  bool pool(const RankLookup& l, const Tile& t, int64_t* ids) {
    for (int64_t i = 0; i < t.n; ++i)
      if (!pool_rows(request_, l, (t.first + i) * request_.of(l).width, ids, tile_, rows_ + i * stride_rows_))
        return false;
    return true;
  }

  void attend(size_t unit, int64_t n) {
    const RankUnit& u = plan_.units[unit];
    for (int64_t i = 0; i < n; ++i) {
      Tile& t = tiles_[i];
      float* target = t.target;
      for (const int64_t part : u.targets) {
        const RankLookup& l = plan_.lookups[part];
        const int64_t D = request_.table(l).D;
        if (request_.of(l).user)
          for (int64_t d = 0; d < D; ++d) std::fill_n(target + d * tile_, tile_, user_.x[l.column + d]);
        else
          std::memcpy(target, t.x + l.column * tile_, D * tile_ * sizeof(float));
        target += D * tile_;
      }
      attended_[i].lanes = t.lanes;
    }
    RK_DISPATCH_ISA(rank_attention, user_.attentions[unit],
                    {attended_.data(), n, operand_, {hidden_[0], hidden_[1]}});
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(tiles_[i].x + u.column * tile_, attended_[i].pooled, u.D * tile_ * sizeof(float));
  }

  // The MLP's output without its bias's part in `constant`, or null where there is no MLP.
  const float* run_layers(const Tile& t) {
    if (plan_.layers.empty()) return nullptr;
    const float* x = t.x;
    for (size_t i = 0; i < plan_.layers.size(); ++i) {
      const RankLayer& l = plan_.layers[i];
      float* y = hidden_[i % 2];
      const RankRun whole{0, l.in};
      const RankRun* runs = i == 0 ? user_.runs.data() : &whole;
      const int64_t n = i == 0 ? static_cast<int64_t>(user_.runs.size()) : 1;
      RK_DISPATCH_ISA(rank_product, {l.weight, l.groups(), l.in, runs, n, x, y,
                                     i == 0 ? user_.first_bias : l.bias, t.lanes});
      const bool last = i + 1 == plan_.layers.size();
      RK_DISPATCH_ISA(rank_activation, {l, y, last ? t.score : nullptr, t.lanes});
      x = y;
    }
    return t.score;
  }

  const RankRequest& request_;
  const RankPlan& plan_;
  const RankUser& user_;
  int64_t tile_, stride_rows_;
  float *hidden_[2], *rows_, *columns_, *operand_;
  int64_t* ids_[2];
  std::vector<Tile> tiles_;
  std::vector<RankTile> attended_;
};

Tensor rank_cpu(const Tensors& inputs, const Ints& sides, const Tensors& tables, const Tensor& weights,
                const Tensor& plan_, const Names& names, int64_t candidates) {
  thread_local KeptMemory of_user;
  const RankPlan plan(plan_, weights, tables);
  const RankRequest request(plan, inputs, sides, names, candidates);
  const RankUser user(request, of_user);
  Tensor out = torch::stable::new_empty(weights, {candidates});
  float* scores = static_cast<float*>(out.mutable_data_ptr());
  if (!user.in_range) request.check_ids();
  if (!candidates) return out;
  const double work = user.work * candidates;
  int64_t threads = forked || work < kRankSerialWork ? 1 : torch::stable::get_num_threads();
  const int64_t step = RK_DISPATCH_ISA(rank_step), tile = RK_DISPATCH_ISA(rank_tile);
  const int64_t steps = (candidates + step - 1) / step, lanes = steps * step;
  threads = std::min(threads, steps);
  const int64_t tiles = plan.units.empty() ? 1 : kRankTiles, vector = tile / kRankVecs;
  const auto blocks_of = [&](int64_t most) {  // lanes
    const int64_t n = (lanes + most - 1) / most;
    return (n + threads - 1) / threads * threads;
  };
  int64_t blocks = blocks_of(tiles * tile + vector - step);
  if (blocks > threads && lanes / vector > tiles * kRankVecs * blocks) blocks = blocks_of(tiles * tile);
  // A thread's only block may end in half a vector; of several only the last one does.
  const int64_t unit = blocks == threads ? step : vector;
  const auto begin_of = [&](int64_t b) { return b == blocks ? lanes : lanes / unit * b / blocks * unit; };
  std::atomic<int64_t> next{0};
  std::atomic<bool> in_range{true};
  const auto work_on = [&](int64_t, int64_t) {
    thread_local KeptMemory memory;
    Block block(request, user, memory, tiles);
    for (int64_t b; in_range && (b = next++) < blocks;)
      if (!block.run(begin_of(b), begin_of(b + 1), scores)) in_range = false;
  };
  if (threads == 1)
    work_on(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work_on);
  if (!in_range) request.check_ids();
  return out;
}

Tensor frozen_rows_cpu(const Tensor& stored, int64_t bits, int64_t width, const Tensor& ids_,
                       const Names& name) {
  const FrozenTable table = frozen_table(stored, "table", bits, width);
  RK_CHECK(ids_.is_cpu() && (dtype_of(ids_) == ScalarType::Long || dtype_of(ids_) == ScalarType::Int),
           "rank: ", name[0], " must be int32 or int64 ids on cpu, got ", name_of(dtype_of(ids_)));
  const Tensor ids = torch::stable::contiguous(ids_);
  const bool wide = dtype_of(ids) == ScalarType::Long;
  const int64_t n = ids.numel();
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end()), rows(n);
  shape.push_back(width);
  for (int64_t p = 0; p < n; ++p) {
    rows[p] = wide ? static_cast<const int64_t*>(ids.const_data_ptr())[p]
                   : static_cast<const int32_t*>(ids.const_data_ptr())[p];
    RK_CHECK(rows[p] >= 0 && rows[p] < table.R, "rank: ", name[0], "[",
             ids.dim() > 1 ? std::to_string(p / ids.size(1)) + ", " : "", ids.dim() > 1 ? p % ids.size(1) : p,
             "] = ", rows[p], " is out of range for a table with ", table.R, " rows");
  }
  Tensor out = torch::stable::new_empty(stored, shape, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(
      0, n, kLookupTaskWork / (width + kLookupOverhead) + 1, [&](int64_t p0, int64_t p1) {
        constexpr int64_t kAhead = 16;
        for (int64_t p = p0; p < p1; p += kAhead) {
          for (int64_t q = p + kAhead; q < std::min(p1, p + 2 * kAhead); ++q)
            for (int64_t byte = 0; byte < table.row_bytes; byte += kCacheLine)
              __builtin_prefetch(table.data + rows[q] * table.row_bytes + byte);
          RK_DISPATCH_ISA(frozen_rows,
                          {table, &rows[p], std::min(kAhead, p1 - p), to + p * width, width, false});
        }
      });
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("rank", TORCH_BOX(&rk::rank_cpu));
  m.impl("frozen_rows", TORCH_BOX(&rk::frozen_rows_cpu));
}
