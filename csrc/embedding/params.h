// What the schemas give by number, for the kernels of both devices.
#pragma once

#include <stdint.h>

// A plain header has to say itself what devices run, too.
#if defined(__CUDACC__) || defined(__HIPCC__)
#  define RK_BOTH __host__ __device__ __forceinline__
#else
#  define RK_BOTH __attribute__((always_inline)) inline
#endif

namespace rk {

// ops/embedding_bag.py: MODES
enum EmbeddingMode : uint8_t { kNone = 0, kSum = 1, kMean = 2, kMax = 3 };

// ops/_features.py: UNKNOWN. What becomes of an id that is no row of its table.
enum class Unknown : int64_t { error = 0, row = 1, hash = 2 };

// Ids 0 .. size - 1 are rows of a table, all others the last of these, or
//
//   n = size - 1 with a padding_idx, else size
//   m = 2^64 / phi id mod 2^64, signed;  r = (m ^ (m >> 32)) mod n
//
// and r, or r + 1 from padding_idx on: reference.py, known_rows.
struct Known {
  Unknown unknown;
  int64_t size, padding_idx;  // -1: none

  RK_BOTH int64_t row_of(int64_t id) const {
    if (static_cast<uint64_t>(id) < static_cast<uint64_t>(size)) return id;
    if (unknown == Unknown::error) return id;
    if (unknown == Unknown::row) return size - 1;
    const int64_t mixed = static_cast<int64_t>(static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u);
    const bool pads = padding_idx >= 0;
    const int64_t n = size - pads > 1 ? size - pads : 1, remainder = (mixed ^ (mixed >> 32)) % n;
    const int64_t row = remainder < 0 ? remainder + n : remainder;
    return row + (pads && row >= padding_idx);
  }
};

// ops/_rules.py: OPTIMIZERS
enum Optimizer : int64_t {
  kSGD = 0,
  kAdagrad = 1,
  kRowWiseAdagrad = 2,
  kAdam = 3,
  kAdamW = 4,
  kFTRL = 5,
  kRowWiseAdam = 6,
  kRowWiseRMSprop = 7
};

// What an optimizer keeps of a table, tensors [R, D] before those [R], and how many settings it has of its
// own, which follow those that all have (ops/_rules.py: RULES).
struct Rule {
  int elementwise, row_wise, settings;
};
constexpr Rule kRules[] = {{0, 0, 0}, {1, 0, 0}, {0, 1, 0}, {2, 0, 0},
                           {2, 0, 0}, {2, 0, 4}, {1, 1, 0}, {0, 2, 2}};

}  // namespace rk
