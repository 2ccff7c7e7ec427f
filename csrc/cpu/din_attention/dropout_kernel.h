// Dropout behind the activations of DIN's attention MLP, for one instruction set.
//
// Which units fall is a function of the seed and of where they are (reference.py: dropout_factor), so that
// the backward, and each pass for a normalization's sums, draws them again instead of reading a mask: unit h
// of the row at position l of sample b in layer i takes word l % 4 of Philox4x32-10 with the counter
// (h, l / 4, b, i) and is dropped where the word's upper 24 bits are below the threshold. A vector of units
// gives the words of four rows in forty products of 32 bits a lane.
#pragma once

#include "cpu/dense/params.h"
#include "cpu/din_attention/params.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/philox.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

RK_INLINE void store_factors(float* to, int64_t, u32v words, const DinDropout<float>& drop) {
  store_vector(to, (i32v)(words >> 8) < drop.threshold ? f32v{} : f32v{} + drop.scale);
}
RK_INLINE void store_factors(double* to, int64_t units, u32v words, const DinDropout<double>& drop) {
  for (int64_t i = 0; i < kFloats && i < units; ++i)
    to[i] = static_cast<int32_t>(words[i] >> 8) < drop.threshold ? 0. : drop.scale;
}

// The factors of n rows behind layer i, which begin at position r0 of sample b (or are those listed in
// `position`), into s.factor.
template <class A>
static void draw_factors(const DinDropout<A>& drop, const LayerParams<A>& f, int64_t i, int64_t b,
                         const int32_t* position, int64_t r0, int64_t n, LayerScratch<A> s) {
  const int64_t ld = padded<A>(f.out);
  u32v lane;
  for (int j = 0; j < kFloats; ++j) lane[j] = j;
  for (int64_t r = 0, end; r < n; r = end) {
    const auto place = [&](int64_t row) { return position ? position[r0 + row] : r0 + row; };
    const int64_t group = place(r) / 4;
    for (end = r + 1; end < n && place(end) / 4 == group;) ++end;
    for (int64_t h = 0; h < f.out; h += kFloats) {
      u32v words[4] = {lane + static_cast<uint32_t>(h), u32v{} + static_cast<uint32_t>(group),
                       u32v{} + static_cast<uint32_t>(b), u32v{} + static_cast<uint32_t>(i)};
      philox(words, drop.seed);
      for (int64_t row = r; row < end; ++row)
        store_factors(s.factor + row * ld + h, f.out - h, words[place(row) % 4], drop);
    }
  }
}

// x times the factors of n rows.
template <class A>
static void multiply_factors(const LayerParams<A>& f, int64_t n, LayerScratch<A> s, A* x) {
  using X = Traits<A>;
  const int64_t end = n * padded<A>(f.out);
  for (int64_t j = 0; j < end; j += X::lanes) X::store(x + j, X::load(x + j) * X::load(s.factor + j));
}

}  // namespace RK_ISA
}  // namespace rk
