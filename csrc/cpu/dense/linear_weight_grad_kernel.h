// The gradient of a linear layer's weight, for one instruction set.
//
// Forward y = x W^T + b with x [N, K], W [M, K]. Backward dW = dy^T x, dy [N, M]: a sum of N outer products,
// whose operands lie in memory as a register tile wants them. A library that computes A B^T has to transpose
// both first (11 MiB for [4096, 256] and [4096, 429], half as long as the product).
//
// A tile of kTileRows x kTileVecs vectors of dW stays in registers over kBlock samples; the panel of x that
// its columns need is copied to L1, dy is read where it is. Flops 2 N M K; bytes 4 (N K +
// N M ceil(K / panel)) out of L2. The sum over n runs in order, whatever the threads.
#pragma once

#include "cpu/dense/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace weight_grad {

constexpr int kTileRows = 6, kTileVecs = RK_VECTOR_BYTES == 64 ? 4 : 2, kPanel = kTileVecs * kFloats;
constexpr int64_t kBlock = kWeightGradPanelSamples;

// sums [kRows, kPanel] += dy^T panel over n samples.
template <int kRows>
RK_INLINE void tile(const float* dy, int64_t stride_dyn, const float* panel, int64_t n, float* sums) {
  f32v s[kRows][kTileVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) s[r][v] = load_vector<f32v>(sums + r * kPanel + v * kFloats);
  for (int64_t i = 0; i < n; ++i) {
    f32v x[kTileVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) x[v] = load_vector<f32v>(panel + i * kPanel + v * kFloats);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const f32v d = splat<float>(dy[i * stride_dyn + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) s[r][v] += d * x[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) store_vector(sums + r * kPanel + v * kFloats, s[r][v]);
}

}  // namespace weight_grad

int64_t linear_weight_grad_panel() { return weight_grad::kPanel; }
int64_t linear_weight_grad_memory(int64_t rows) { return (weight_grad::kBlock + rows) * weight_grad::kPanel; }

void linear_weight_grad(LinearWeightGrad a, Range rows, float* memory) {
  using namespace weight_grad;
  const int64_t left = a.K - a.first_column, columns = left < kPanel ? left : kPanel;
  float *panel = memory, *sums = memory + kBlock * kPanel;
  for (int64_t n0 = a.samples.begin; n0 < a.samples.end; n0 += kBlock) {
    const int64_t n = a.samples.end - n0 < kBlock ? a.samples.end - n0 : kBlock;
    for (int64_t i = 0; i < n; ++i)
      __builtin_memcpy(panel + i * kPanel, a.x + (n0 + i) * a.stride_x + a.first_column,
                       columns * sizeof(float));
    const float* d = a.grad_out + n0 * a.stride_grad;
    int64_t m = rows.begin;
    const auto tiles = [&](auto number) __attribute__((always_inline)) {
      constexpr int kRows = decltype(number)::value;
      for (; m + kRows <= rows.end; m += kRows)
        tile<kRows>(d + m, a.stride_grad, panel, n, sums + (m - rows.begin) * kPanel);
    };
    tiles(Int<kTileRows>());
    tiles(Int<4>());
    tiles(Int<2>());
    tiles(Int<1>());
  }
  for (int64_t m = rows.begin; m < rows.end; ++m)
    for (int64_t k = 0; k < columns; ++k) {
      float& out = a.grad_weight[m * a.K + a.first_column + k];
      out = (a.add ? out : 0.f) + sums[(m - rows.begin) * kPanel + k];
    }
}

}  // namespace RK_ISA
}  // namespace rk
