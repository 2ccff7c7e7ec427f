// What the library assumes of a machine, in one place: caches, the cost of waking a thread, distances of
// prefetches. Chosen on AMD Zen 3 (32 KiB L1, 512 KiB L2, 32 MiB L3) and Zen 5 (48 KiB, 1 MiB, 32 MiB) by the
// benchmark named beside each; experiments are in docs/performance. Plain constants, for kernels and the code
// that calls them.
#pragma once

#include <stdint.h>

namespace rk {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = 2 << 20;

// ---- threads (bench_ops.py, bench_scaling.py)

// Below this many elements read, about 50 us, work stays on one thread. A second one breaks even at half of
// it, but if its core is busy we would wait milliseconds for it.
constexpr int64_t kSerialWork = 131072;
// Elements, or multiply-adds, of a chunk that is worth a thread of torch's pool: 10 us, 20 us and 40 us.
constexpr int64_t kFmChunk = 32768, kNormChunk = 16384;
constexpr double kDinChunkFlops = 1e6;
// Multiply-adds that stand for what DIN does beside its GEMMs, a row and a sample; its chunks at most.
constexpr double kDinRowFlops = 64, kDinSampleFlops = 256;
constexpr int64_t kDinChunks = 128;
// Chunks of samples, each with its part of the gradients of an interaction's parameters, and values of all
// parts (bench_interactions.py).
constexpr int64_t kMostChunks = 32, kFewestChunks = 8, kSumsValues = 1 << 21;
// Lookups in tasks no shorter than the threads' balance needs: what a task prefetches beyond its end comes to
// another core's cache, and nobody has prefetched its own first rows.
constexpr int64_t kLookupTaskWork = 16384, kTasksPerThread = 8;
// A lookup costs as much as reading so many elements more.
constexpr int64_t kLookupOverhead = 16;
// Tiles of sorted lookups that a thread takes in a row, for the same reason.
constexpr int64_t kTilesPerTask = 8;
// Rows of a sparse gradient a task steps on.
constexpr int64_t kSparseStepRows = 256;
// Rows of a table a task catches up, of those that are idle.
constexpr int64_t kFlushRows = 8192;
// Bytes a task zeroes.
constexpr int64_t kZeroBytes = 1 << 20;
// From so many lookups on a table is sorted by all threads, before that as one task beside other tables.
constexpr int64_t kSortedByAll = kSerialWork / 4;

// ---- blocks that stay in a cache

// L1: rows of B in a GEMM; of three AVX-512 vectors 24 KiB (bench_din_attention.py).
constexpr int64_t kGemmDepth = 128;
// L1: rows of a panel of DeepFM's weights (bench_serving.py).
constexpr int64_t kMlpDepth = 144;
// L2: samples of DeepFM's block, with their weights (bench_serving.py).
constexpr int64_t kMlpRows = 64;
// L2: tiles of candidates that share what is formed for a row of a history; multiply-adds below which a
// request stays on one thread (bench_rank.py).
constexpr int64_t kRankTiles = 4;
constexpr double kRankSerialWork = 1e6;
// L1, mostly: rows of a sample's history. 128 took 5 to 8 % longer with 100 rows a sample
// (bench_din_attention.py).
constexpr int64_t kBlockRows = 64;
// Targets of DIN that become operands together: a GEMM of fewer rows is bound by the bandwidth of its
// weights.
constexpr int64_t kDinTargets = 8;
// Rows of DIN's history wider than this, in bytes, are copied: beside their GEMM that costs little, reads
// ahead where it would wait for eight rows at once, and spreads the rows over the sets of the caches.
constexpr int64_t kDinInPlaceBytes = 256;
// L1: samples that go through a recurrence together, rows of its GEMM (bench_ops.py); and sums of gradients
// at most, each of the weights' size.
constexpr int64_t kAugruRows = 32, kAugruSums = 16;
// L2: samples that go through a cross layer of experts together, rows of its GEMMs; and samples of a chunk
// that has its own sums of the weights' gradients, at least (bench_interactions.py).
constexpr int64_t kMixtureRows = 64, kMixtureChunk = 128;
// L1: queries of a task of the target attention, which reads its history once for them (bench_ops.py).
constexpr int64_t kTargetQueries = 64;
// L2: values of histories that a thread takes at once, of short ones several, which use its memory in turn
// (bench_ops.py).
constexpr int64_t kTargetChunk = 16384;
// L1: bytes of one of three arrays of accumulators of a block in a normalization, of so many rows at least
// (bench_ops.py).
constexpr int64_t kNormBlockBytes = 12288, kNormMinRows = 16;
// L2, an eighth: bytes of embeddings that are looked up and then combined, of so many samples
// (bench_embedding_bag.py).
constexpr int64_t kFmBlockBytes = 1 << 17, kFmMinSamples = 16, kFmMaxSamples = 1024;
// L1: samples of a panel in the gradient of a weight; L3: samples between two sums, read by all tasks; and
// rows of a task, many, because each copies the panel, and few enough for two tasks a panel with 256 units
// (bench_ops.py).
constexpr int64_t kWeightGradPanelSamples = 128, kWeightGradSamples = 4096, kWeightGradRows = 132;
// L1: lookups whose rows are summed and then stepped on, and accumulators of their sums (bench_steps.py).
constexpr int64_t kMostLookups = 128, kFewestLookups = 16, kChunkValues = 2048;
// Fewer with the FM's gradient, where each lookup prefetches three lines and not one or two
// (docs/performance/embedding.md).
constexpr int64_t kMostFmLookups = 32;
// L1: idle rows that are caught up together, and their values in one of three arrays (bench_steps.py).
constexpr int64_t kMostIdle = 64, kFewestIdle = 8, kIdleValues = 1024;
// L1: lookups whose rows are caught up and then pooled (bench_embedding_bag.py).
constexpr int64_t kIdleLookups = 40;
// Digits of a radix sort's pass: counters of two blocks of keys stay in L1 (bench_embedding_bag.py).
constexpr int kMaxDigit = 12;
constexpr int64_t kSortBlockPair = 16384, kFewKeys = 64;
// Floats of memory that a thread's arena takes at once, in bytes.
constexpr int64_t kArenaBytes = 65536;
// Half of L3: outputs at least this large are stored non-temporally, as little of them or of what was read
// for them would be left for their reader. Ordinary stores are better below 7 MB
// (docs/performance/embedding.md).
constexpr int64_t kNonTemporalMinBytes = 16 << 20;

// ---- distances of prefetches (docs/performance/embedding.md)

// Bytes ahead in x for FM's first read: the sums of a sample keep too few loads in flight, and the hardware's
// prefetch stops at each page.
constexpr int64_t kFmAheadBytes = 5120;
// Lookups ahead: for the array of gradient pointers; for rows so wide that no chunk of them is prefetched,
// into L1 and L2. Farther ones gain nothing: a core has so many misses in flight.
constexpr int64_t kPointerAhead = 64, kNearWide = 3, kFarWide = 10;
// Lookups ahead: for a row's last step.
constexpr int64_t kIdleAhead = 32;

}  // namespace rk
