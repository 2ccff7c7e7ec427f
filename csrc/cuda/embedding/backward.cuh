// Embedding lookups of many features, backward: the same bits run after run, no atomics.
//
// Lookup p of bag b gives its row the gradient
//
//   sum, none: a_p grad_out[b]      mean: a_p / n grad_out[b]
//   max: g_p[d] = grad_out[b, d] for the first p where weight[i_p, d] is the bag's maximum or NaN, 0
//   elsewhere
//
// and the row's gradient is the sum over all lookups of it, those of padding_idx, of the frozen row and
// outside the table left out. The gradient of a_p is (1 or 1/n) <grad_out[b], weight[i_p]>.
//
//   1. embedding_lookups     a key (the row, numbered over all tables) and a source (gradient row, factor) a
//   lookup
//   2. torch's stable sort   of the keys
//   3. embedding_reduce      each group adds up the runs of equal keys in a tile of kTile sorted lookups
//   4. embedding_join        adds up the parts of runs that cross tiles
//
// Bytes: the source 16, its sort 2 * 12 a pass, the gradient row once a lookup, each table's gradient twice
// (zeros, then its touched rows). A hot row's run is spread over its tiles, and its parts over the groups of
// a warp.
#pragma once

#include "cuda/embedding/lookup.cuh"

namespace rk {
namespace cuda {

// One feature in the backward; `out` is grad_out.
struct BagGrads : Bags {
  void* grad;            // embedding_max_grad_rows: [N, D]; embedding_factor_grad: [N]
  int64_t first_lookup;  // of the feature, among all
  int64_t first_key;     // of its table
  int64_t frozen_row;    // -1: none
  bool a_row_a_lookup;   // lookup p takes row p of grad, not its bag's of grad_out
};

struct Source {
  const void* grad_row;
  double factor;
};

// What the launches of step 1 write, and the sort's results.
struct Lookups {
  void* keys;
  bool wide;  // keys are int64, not int32
  int64_t n;
  int64_t skipped;  // the key, after all others, of a lookup that gives no gradient
  Source* sources;
  const int64_t* order;  // sorted position -> lookup
  const int64_t* ranks;  // of the run at a sorted position, from 1; or null
  bool at_starts;        // a run's sum goes where it starts; else, without ranks, to a dense gradient

  __device__ int64_t key(int64_t p) const { return read_int(keys, wide, p); }
  __device__ bool starts_run(int64_t p) const {
    return key(p) != skipped && (p == 0 || key(p - 1) != key(p));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_lookups(const Batch<BagGrads> batch, Lookups lookups) {
  const BagGrads& bags = batch.items[find(batch, &Bags::first_block, static_cast<int32_t>(blockIdx.x))];
  const Group group{bags.log2_lanes};
  const int64_t b = int64_t(blockIdx.x - bags.first_block) * group.per_block() + group.index();
  if (b >= bags.B) return;
  const Span ids = span(bags, b);
  const T* factors = static_cast<const T*>(bags.per_sample_weights);
  double scale = 1;
  if (bags.mode == kMean) {
    int count = 0;
    for (int64_t p = ids.begin + group.lane(); p < ids.end; p += group.lanes())
      count += bags.keeps(bags.id(p));
    count = group.sum(count);
    scale = 1. / (count > 1 ? count : 1);
  }
  const T* rows = static_cast<const T*>(bags.a_row_a_lookup ? bags.grad : bags.out);
  for (int64_t p = ids.begin + group.lane(); p < ids.end; p += group.lanes()) {
    const int64_t id = bags.id(p), i = bags.first_lookup + p;
    const bool skip = !bags.keeps(id) || id == bags.frozen_row;
    const int64_t key = skip ? lookups.skipped : bags.first_key + id;
    if (lookups.wide)
      static_cast<int64_t*>(lookups.keys)[i] = key;
    else
      static_cast<int32_t*>(lookups.keys)[i] = static_cast<int32_t>(key);
    const T* row = rows + (bags.a_row_a_lookup ? p * bags.D : b * bags.stride_ob);
    lookups.sources[i] = {row, factors ? scale * widen(factors[p]) : scale};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) embedding_max_grad_rows(const Batch<BagGrads> batch) {
  using A = accumulate_t<T>;
  const BagGrads& bags = batch.items[find(batch, &Bags::first_block, static_cast<int32_t>(blockIdx.x))];
  const Group group{bags.log2_lanes};
  const int64_t b = int64_t(blockIdx.x - bags.first_block) * group.per_block() + group.index();
  if (b >= bags.B) return;
  const Span ids = span(bags, b);
  const T* weight = static_cast<const T*>(bags.weight);
  for (int d = group.lane(); d < bags.D; d += group.lanes()) {
    A largest = -A(INFINITY);
    int64_t first = -1;  // the lookup that attains it
    for (int64_t p = ids.begin; p < ids.end; ++p) {
      const int64_t id = bags.id(p);
      if (!bags.keeps(id)) continue;
      const A x = widen(weight[id * bags.stride_wr + d]);
      if (first >= 0 && !(x > largest || (x != x && largest == largest))) continue;
      largest = x;
      first = p;
    }
    const T grad_out = static_cast<const T*>(bags.out)[b * bags.stride_ob + d];
    T* grad = static_cast<T*>(bags.grad) + d;
    for (int64_t p = ids.begin; p < ids.end; ++p)
      if (p == first)
        grad[p * bags.D] = grad_out;
      else
        narrow(grad[p * bags.D], A(0));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) embedding_factor_grad(const Batch<BagGrads> batch) {
  using A = accumulate_t<T>;
  const BagGrads& bags = batch.items[find(batch, &Bags::first_block, static_cast<int32_t>(blockIdx.x))];
  const Group group{bags.log2_lanes};
  const int64_t b = int64_t(blockIdx.x - bags.first_block) * group.per_block() + group.index();
  if (b >= bags.B) return;
  const Span ids = span(bags, b);
  const T *weight = static_cast<const T*>(bags.weight),
          *grad_out = static_cast<const T*>(bags.out) + b * bags.stride_ob;
  int64_t count = 0;
  for (int64_t p = ids.begin; p < ids.end; ++p) count += bags.keeps(bags.id(p));
  const A scale = bags.mode == kMean && count > 1 ? A(1) / A(count) : A(1);
  for (int64_t p = ids.begin; p < ids.end; ++p) {
    const int64_t id = bags.id(p);
    A dot = 0;
    if (bags.keeps(id))
      for (int d = group.lane(); d < bags.D; d += group.lanes())
        dot += widen(grad_out[d]) * widen(weight[id * bags.stride_wr + d]);
    dot = group.sum(dot);
    if (group.lane() == 0) narrow(static_cast<T*>(bags.grad)[p], scale * dot);
  }
}

// A buffer to be zeroed, 16 bytes a thread.
struct Zeros {
  void* begin;
  int64_t bytes;
  int32_t first_block;
};
constexpr int kZerosPerThread = 4;

__global__ void __launch_bounds__(kThreads, kMinBlocks) zero(const Batch<Zeros> batch) {
  const Zeros& zeros = batch.items[find(batch, &Zeros::first_block, static_cast<int32_t>(blockIdx.x))];
  char* begin = static_cast<char*>(zeros.begin);
  const int64_t block = blockIdx.x - zeros.first_block;
  RK_UNROLL
  for (int k = 0; k < kZerosPerThread; ++k) {
    const int64_t byte = ((block * kZerosPerThread + k) * kThreads + threadIdx.x) * 16;
    if (byte + 16 <= zeros.bytes)
      *reinterpret_cast<Pack<int32_t, 4>*>(begin + byte) = Pack<int32_t, 4>{};
    else
      for (int64_t i = byte; i < zeros.bytes; ++i) begin[i] = 0;
  }
}

// A table in steps 3 and 4: its row r has the key first_key + r.
struct TableGrad {
  void* sums;     // rows `stride` apart: of a run, or of the table
  int64_t* rows;  // of the table, by rank
  int64_t first_key, R;
  int64_t first_rank;
  int32_t D, stride;
  bool packed;

  // Where the run goes that has sorted position p, unless that is where it starts.
  __device__ int64_t row(const Lookups& lookups, int64_t p) const {
    return lookups.ranks ? lookups.ranks[p] - 1 - first_rank : lookups.key(p) - first_key;
  }
};

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_run_starts(const Lookups lookups, int32_t* starts) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p < lookups.n) starts[p] = lookups.starts_run(p);
}

// For each table, one a thread, the number of runs up to its end.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_last_ranks(const Batch<TableGrad> batch, const Lookups lookups, int64_t* last_ranks) {
  const int t = threadIdx.x;
  if (t >= batch.n) return;
  const int64_t end = batch.items[t].first_key + batch.items[t].R;
  int64_t low = 0, high = lookups.n;  // the first lookup at or after the end
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (lookups.key(middle) < end)
      low = middle + 1;
    else
      high = middle;
  }
  last_ranks[t] = low > 0 ? lookups.ranks[low - 1] : 0;
}

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_run_rows(const Batch<TableGrad> batch, const Lookups lookups) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= lookups.n || !lookups.starts_run(p)) return;
  const int64_t key = lookups.key(p);
  const TableGrad& table = batch.items[find(batch, &TableGrad::first_key, key)];
  const int64_t row = key - table.first_key;
  if (row >= 0 && row < table.R) table.rows[table.row(lookups, p)] = row;
}

// Lookups that a group adds up. A constant, because the order of the sums follows from it.
constexpr int kTile = 16;

// Of a tile, two rows of `width` accumulators: [0] what its first run adds to a run that began in a tile
// before, [1] the part in this tile of a run that begins here and goes on in the next.
template <class A>
struct Carries {
  A* rows;
  int64_t width;
  __device__ A* row(int64_t tile, int which) const { return rows + (2 * tile + which) * width; }
};

// A lookup of the tile, in shared memory.
template <class A>
struct Staged {
  int64_t row;  // TableGrad::row
  const void* grad_row;
  A factor;
  int32_t table;  // of the launch; -1: none of them, adds nothing
};

// Lookups [begin, end) of a tile, all of one table. `before` and `after`: the run at that end goes on there.
template <class T, int n>
__device__ void add_runs(const TableGrad& table, const Staged<accumulate_t<T>>* tile, int begin, int end,
                         bool before, bool after, bool at_starts, Carries<accumulate_t<T>> carries,
                         int64_t tile_index, Group group) {
  using A = accumulate_t<T>;
  constexpr int kUnroll = 4;
  for (int d = group.lane() * n; d < table.D; d += group.lanes() * n) {
    A acc[n] = {};
    bool first = true;  // the run that is added up is the first
    int start = begin;
    for (int p = begin; p < end; p += kUnroll) {
      Pack<T, n> rows[kUnroll];
      RK_UNROLL
      for (int u = 0; u < kUnroll; ++u)
        if (p + u < end) rows[u] = load<n>(static_cast<const T*>(tile[p + u].grad_row) + d);
      RK_UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        if (p + u >= end) continue;
        const Staged<A>& lookup = tile[p + u];
        RK_UNROLL
        for (int i = 0; i < n; ++i) acc[i] += lookup.factor * widen(rows[u].x[i]);
        const bool last = p + u + 1 == end;
        if (!last && tile[p + u + 1].row == lookup.row) continue;
        if (first && before)
          store<n>(carries.row(tile_index, 0) + d, acc);
        else if (last && after)
          store<n>(carries.row(tile_index, 1) + d, acc);
        else
          store<n>(static_cast<T*>(table.sums) +
                       (at_starts ? tile_index * kTile + start : lookup.row) * table.stride + d,
                   acc);
        first = false;
        start = p + u + 1;
        RK_UNROLL
        for (int i = 0; i < n; ++i) acc[i] = A(0);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_reduce(const Batch<TableGrad> batch, const Lookups lookups, Carries<accumulate_t<T>> carries,
                     int log2_lanes) {
  using A = accumulate_t<T>;
  RK_SHARED(Staged<A>, staged);
  const Group group{log2_lanes};
  const int per_block = group.per_block() * kTile;
  const int64_t first = int64_t(blockIdx.x) * per_block;
  for (int i = threadIdx.x; i < per_block && first + i < lookups.n; i += kThreads) {
    Staged<A> lookup{-1, nullptr, A(0), -1};
    const int64_t key = lookups.key(first + i);
    const int t = find(batch, &TableGrad::first_key, key);
    const TableGrad& table = batch.items[t];
    if (key != lookups.skipped && key >= table.first_key && key < table.first_key + table.R) {
      lookup.row = table.row(lookups, first + i);
      const Source source = lookups.sources[lookups.order[first + i]];
      lookup.grad_row = source.grad_row;
      lookup.factor = A(source.factor);
      lookup.table = t;
    }
    staged[i] = lookup;
  }
  __syncthreads();

  const int64_t p0 = first + group.index() * kTile;
  if (p0 >= lookups.n) return;
  const int size = lookups.n - p0 < kTile ? int(lookups.n - p0) : kTile;
  const Staged<A>* tile = staged + group.index() * kTile;
  const bool before = p0 > 0 && lookups.key(p0 - 1) == lookups.key(p0);
  const bool after = p0 + size < lookups.n && lookups.key(p0 + size) == lookups.key(p0 + size - 1);
  for (int begin = 0, end; begin < size; begin = end) {
    const int t = tile[begin].table;
    for (end = begin + 1; end < size && tile[end].table == t; ++end) {
    }
    if (t < 0) continue;
    const TableGrad& table = batch.items[t];
    const bool goes_before = begin == 0 && before, goes_after = end == size && after;
    if (table.packed)
      add_runs<T, kPack<T>>(table, tile, begin, end, goes_before, goes_after, lookups.at_starts, carries,
                            p0 / kTile, group);
    else
      add_runs<T, 1>(table, tile, begin, end, goes_before, goes_after, lookups.at_starts, carries, p0 / kTile,
                     group);
  }
}

// A warp for each tile in which a run begins that goes on. Its groups take the run's tiles in turn.
template <class T, int n>
__device__ void join_run(const TableGrad& table, int64_t row, int64_t tile, int64_t tiles,
                         Carries<accumulate_t<T>> carries, Group group) {
  using A = accumulate_t<T>;
  const int groups = kLanes >> group.log2_lanes, g = group.index() & (groups - 1);
  for (int d = group.lane() * n; d - group.lane() * n < table.D; d += group.lanes() * n) {
    A acc[n] = {};
    if (d < table.D)
      for (int64_t i = g; i < tiles; i += groups) {
        const Pack<A, n> part = load<n>(carries.row(tile + i, i == 0) + d);
        RK_UNROLL
        for (int k = 0; k < n; ++k) acc[k] += part.x[k];
      }
    for (int offset = group.lanes(); offset < kLanes; offset *= 2) {
      RK_UNROLL
      for (int k = 0; k < n; ++k) acc[k] += shuffle_xor(~0u, acc[k], offset);
    }
    if (g == 0 && d < table.D) store<n>(static_cast<T*>(table.sums) + row * table.stride + d, acc);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_join(const Batch<TableGrad> batch, const Lookups lookups, Carries<accumulate_t<T>> carries,
                   int log2_lanes) {
  const int64_t tile = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes,
                next = (tile + 1) * kTile;
  if (next >= lookups.n) return;
  const int64_t key = lookups.key(next - 1);
  if (key == lookups.skipped || lookups.key(next) != key) return;
  if (tile > 0 && lookups.key(tile * kTile - 1) == key) return;  // began before
  const TableGrad& table = batch.items[find(batch, &TableGrad::first_key, key)];
  if (key < table.first_key || key >= table.first_key + table.R) return;
  // The run's last tile: the last one that starts with its key.
  int64_t low = tile + 1, high = (lookups.n + kTile - 1) / kTile;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (lookups.key(middle * kTile) == key ? low : high) = middle;
  }
  int64_t start = next - 1;
  while (start > tile * kTile && lookups.key(start - 1) == key) --start;
  const int64_t row = lookups.at_starts ? start : table.row(lookups, start);
  if (table.packed)
    join_run<T, kPack<T>>(table, row, tile, low - tile + 1, carries, Group{log2_lanes});
  else
    join_run<T, 1>(table, row, tile, low - tile + 1, carries, Group{log2_lanes});
}

}  // namespace cuda
}  // namespace rk
