// The first layer of DIN attention, for one instruction set: M of a sample and its product with the rows.
//
// With AVX512-BF16 (RK_BF16_PAIRS) rows of bfloat16 are multiplied as they are stored, two k at once:
//
//   z_h += h[2k] M[2k, h] + h[2k + 1] M[2k + 1, h]   in float32,
//
// with M formed in float32 and rounded to bfloat16, M~. What that takes goes into c at a mean row, that of
// the sample's first rows,
//
//   z_l = c + (M - M~) h_mean + M~ h_l,   an error of (M - M~) (h_l - h_mean),
//
// so that rows alike are as exact as in float32. A pair is 4 bytes, so this is the product of
// simd/gemm.h over D / 2 words, in half the instructions; rows are neither converted nor copied.
#pragma once

#include "cpu/dense/activation_kernel.h"
#include "cpu/din_attention/rows_kernel.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/operand.h"

namespace rk {
namespace RK_ISA {
namespace din {

// Values i ... of M, whose row belongs to one value of the target, or rows to several.
template <class A>
RK_INLINE typename Traits<A>::vec operand_at(const Din<A>& net, int64_t i, typename Traits<A>::vec target) {
  return Traits<A>::load(net.history_weight + i) + target * Traits<A>::load(net.product_weight + i);
}

// By what the products read the history as.
template <class A>
struct FirstLayer {
  using X = Traits<A>;
  using Row = A;

  template <class T>
  static void form(const Din<A>& net, const DinRows<T>&, int64_t, const int32_t*, const DinScratch<A>& s) {
    const int64_t H = net.layer[0].out, ld = padded<A>(H), tail = tail_width<A>(H),
                  end = (vectors<A>(H) - (tail > 0)) * X::lanes;
    const A* t = s.target;
    for (int64_t d = 0; d < net.D; ++d)
      for (int64_t i = d * ld; i < d * ld + end; i += X::lanes)
        X::store(s.operand + i, operand_at(net, i, splat<A>(t[d])));
    with_tail<A>(tail, [&](auto width) __attribute__((always_inline)) {
      constexpr int kRowsPerVector = X::lanes / decltype(width)::value;
      for (int64_t d = 0, i = net.D * ld; d < net.D; d += kRowsPerVector, i += X::lanes)
        X::store(s.operand + i, operand_at(net, i, spread(t + d, width)));
    });
  }

  template <class T>
  static RK_INLINE Block<const A> rows(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t r0,
                                       int64_t n, int64_t D, const DinScratch<A>& s) {
    return history_rows(rows, b, position, r0, n, D, s);
  }

  static void product(const Din<A>& net, int64_t n, Block<const A> history, const DinScratch<A>& s) {
    const int64_t H = net.layer[0].out, ld = padded<A>(H);
    gemm<A>(n, vectors<A>(H), net.D, {history.p, history.ld, 1}, s.operand, ld, s.layer[0].g, ld, s.bias, 0,
            tail_width<A>(H));
  }
};

#ifdef RK_BF16_PAIRS
// A word, of type float, is a pair of bfloat16, the first in its low half.
struct MultiplyAddPairs {
  using Stored = float;
  static RK_INLINE f32v broadcast(const float* p) {
    int word;
    __builtin_memcpy(&word, p, sizeof word);
    return (f32v)_mm512_set1_epi32(word);
  }
  static RK_INLINE f32v add(f32v sum, f32v a, f32v b) {
    return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

// Rows 2k in parts of `width` lanes, then in the same order rows 2k + 1: for width 16 the rows first and
// second, for 8 and 4 those of 16 / width neighbouring rows each.
template <int width>
struct PairIndex {
  uint16_t of[32];
  constexpr PairIndex() : of() {
    for (int i = 0; i < 16; ++i)
      for (int half = 0; half < 2; ++half)
        of[2 * i + half] = static_cast<uint16_t>((2 * (i / width) + half) * width + i % width);
  }
};
// Rounds rows of M, interleaves them and adds what the rounding took, times the mean row's values, to `lost`.
template <int width>
RK_INLINE f32v pairs_of(f32v first, f32v second, f32v mean_first, f32v mean_second, f32v& lost, Int<width>) {
  static constexpr PairIndex<width> index;
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  lost += (first - widen((u16v)_mm512_castsi512_si256(both), bf16())) * mean_first +
          (second - widen((u16v)_mm512_extracti64x4_epi64(both, 1), bf16())) * mean_second;
  return (f32v)_mm512_permutexvar_epi16(_mm512_loadu_si512(index.of), both);
}

template <>
struct FirstLayer<bf16> {
  using A = float;
  using X = Traits<float>;
  using Row = bf16;

  // Rows averaged into the mean row that compensates for rounding M. Only the first 16: all rows of a sample
  // longer than a block would be fetched from memory a second time.
  static constexpr int64_t kMeanRows = 16;

  // Few rows and short ones stay in float32: in a sum of few terms that cancel, M's rounding shows in each
  // (docs/performance/din_attention.md).
  static bool serves(int64_t D, int64_t rows) { return D >= 32 && rows >= 16; }

  static int64_t words(int64_t D) { return (D + 1) / 2; }

  static void form(const Din<A>& net, const DinRows<bf16>& rows, int64_t b, const int32_t* position,
                   const DinScratch<A>& s) {
    const int64_t D = net.D, H = net.layer[0].out, ld = padded<A>(H), tail = tail_width<A>(H),
                  end = (vectors<A>(H) - (tail > 0)) * X::lanes;
    A* mean = s.out;
    mean_row(rows, b, position, D, mean);
    const A* t = s.target;
    A* to = s.operand;
    for (int64_t d = 0; d < D; d += 2, to += ld)
      for (int64_t j = 0; j < end; j += X::lanes) {
        const f32v first = operand_at(net, d * ld + j, splat<A>(t[d]));
        const f32v second = d + 1 < D ? operand_at(net, (d + 1) * ld + j, splat<A>(t[d + 1])) : f32v{};
        f32v lost = X::load(s.bias + j);
        X::store(to + j, pairs_of(first, second, splat<A>(mean[d]), splat<A>(mean[d + 1]), lost, Int<16>()));
        X::store(s.bias + j, lost);
      }
    with_tail<A>(tail, [&](auto width) __attribute__((always_inline)) {
      constexpr int kRowsPerVector = X::lanes / decltype(width)::value;
      f32v lost{};
      for (int64_t d = 0, i = D * ld; d < D; d += 2 * kRowsPerVector, i += 2 * X::lanes, to += X::lanes) {
        const bool two = d + kRowsPerVector < D;
        const int64_t d2 = two ? d + kRowsPerVector : d;
        const f32v first = operand_at(net, i, spread(t + d, width));
        const f32v second = two ? operand_at(net, i + X::lanes, spread(t + d2, width)) : f32v{};
        X::store(to, pairs_of(first, second, spread(mean + d, width), spread(mean + d2, width), lost, width));
      }
      X::store(s.bias + end, X::load(s.bias + end) + sum_parts(lost, width));
    });
  }

  // With zeros up to whole vectors.
  static void mean_row(const DinRows<bf16>& rows, int64_t b, const int32_t* position, int64_t D, A* mean) {
    const int64_t n = rows.count[b] < kMeanRows ? rows.count[b] : kMeanRows;
    const bf16* base = history_of(rows, b);
    const Tail<bf16> tail(static_cast<int>(D % X::lanes));
    for_each_column_block<bf16>(D, [&](auto block, int64_t d) {
      constexpr int kVecs = decltype(block)::vecs;
      f32v sum[kVecs] = {};
      for (int64_t r = 0; r < n; ++r) {
        const bf16* row = base + (position ? position[r] : r) * rows.stride_hl + d;
#  pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[v] += block.load(row, v, tail);
      }
      for (int v = 0; v < kVecs; ++v) X::store(mean + d + v * X::lanes, sum[v] * (1.f / n));
    });
  }

  // In place, or copied with zeros up to whole vectors: see history_rows.
  static Block<const bf16> rows(const DinRows<bf16>& rows, int64_t b, const int32_t* position, int64_t r0,
                                int64_t n, int64_t D, const DinScratch<A>& s) {
    const bf16* base = history_of(rows, b);
    const int64_t whole = D / X::lanes * X::lanes, ld = padded<bf16>(D);
    bf16* copy = reinterpret_cast<bf16*>(s.history) + (rows.user ? r0 * ld : 0);
    if (!position && rows.stride_hl == D && D == whole &&
        D * static_cast<int64_t>(sizeof(bf16)) <= kDinInPlaceBytes)
      return {base + r0 * D, D};
    const __mmask16 rest = static_cast<__mmask16>((1u << (D - whole)) - 1);
    for (int64_t r = 0; s.fresh && r < n; ++r) {
      const bf16* from = base + (position ? position[r0 + r] : r0 + r) * rows.stride_hl;
      bf16* to = copy + r * ld;
      for (int64_t d = 0; d < whole; d += X::lanes) store_vector(to + d, load_vector<u16v>(from + d));
      if (rest) store_vector(to + whole, (u16v)_mm256_maskz_loadu_epi16(rest, from + whole));
    }
    return {copy, ld};
  }
  static void product(const Din<A>& net, int64_t n, Block<const bf16> history, const DinScratch<A>& s) {
    const int64_t H = net.layer[0].out, ld = padded<A>(H);
    gemm<A, MultiplyAddPairs>(n, vectors<A>(H), words(net.D),
                              {reinterpret_cast<const float*>(history.p), history.ld / 2, 1}, s.operand, ld,
                              s.layer[0].g, ld, s.bias, 0, tail_width<A>(H));
  }
};
#endif

}  // namespace din
}  // namespace RK_ISA
}  // namespace rk
