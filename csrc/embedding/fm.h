// The arguments of the backward of lookup + FM + linear term, as the CPU and the CUDA implementation take
// them.
#pragma once

#include "embedding/features.h"

namespace rk {

// Whether t is on the device of `like`.
inline bool same_device(const Tensor& t, const Tensor& like) {
  return t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() &&
         t.get_device_index() == like.get_device_index();
}

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

inline std::string dtype_and_device_of(const Tensor& t) {
  return name_of(t.scalar_type()) + " on " + device_of(t);
}

inline Tensor linear_weight_of(const char* op, const Tensor& weight, const Tensor& like, int64_t width) {
  RK_CHECK(weight.numel() == width && weight.scalar_type() == like.scalar_type() && same_device(weight, like),
           op, ": linear_weight must have one value a column of the embeddings, ", width,
           ", and their dtype and device, ", dtype_and_device_of(like), ", got shape ", shape_of(weight),
           " and ", dtype_and_device_of(weight));
  return torch::stable::contiguous(weight);
}

// Raises unless `dense` [B, n] can be appended to the embeddings.
inline void check_dense(const char* op, const Tensor& dense, const Tensor& like, int64_t B) {
  RK_CHECK(dense.dim() == 2 && dense.size(0) == B && dense.scalar_type() == like.scalar_type() &&
               same_device(dense, like),
           op, ": dense must be [B, n] with B = ", B, " like the embeddings, ", dtype_and_device_of(like),
           ", got shape ", shape_of(dense), " and ", dtype_and_device_of(dense));
}

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline int64_t row_stride_of(const OptionalTensor& t) { return t ? t->stride(0) : 0; }

// The gradients [B, F D], [B, 1], [B, 1] of what the forward returned, checked; vectors contiguous, rows of
// matrices with unit stride. Without grad_linear, linear_weight is not needed, and left out.
struct FmBackwardArgs {
  Tensor embeddings;
  OptionalTensor grad_embeddings, grad_fm, grad_linear, linear_weight;
  int64_t B, width, F;

  FmBackwardArgs(const OptionalTensor& grad_embeddings_, const OptionalTensor& grad_fm_,
                 const OptionalTensor& grad_linear_, const Tensor& embeddings_,
                 const OptionalTensor& linear_weight_, int64_t D)
      : embeddings(embeddings_) {
    RK_CHECK_DIM("embedding_fm_backward", embeddings, 2);
    RK_CHECK_FLOATING("embedding_fm_backward", embeddings);
    B = embeddings.size(0), width = embeddings.size(1), F = D > 0 ? width / D : 0;
    RK_CHECK(D >= 0 && F * D == width, "embedding_fm_backward: embeddings must have a multiple of dim = ", D,
             " columns, got ", width);
    embeddings = unit_stride_rows(embeddings);
    grad_embeddings = rows_of(grad_embeddings_, "grad_embeddings", width);
    grad_fm = rows_of(grad_fm_, "grad_fm", 1);
    if (!linear_weight_) return;
    linear_weight = linear_weight_of("embedding_fm_backward", *linear_weight_, embeddings, width);
    grad_linear = rows_of(grad_linear_, "grad_linear", 1);
    if (!grad_linear) linear_weight.reset();
  }

 private:
  OptionalTensor rows_of(const OptionalTensor& t, const char* what, int64_t columns) const {
    if (!t) return t;
    RK_CHECK(t->dim() == 2 && t->size(0) == B && t->size(1) == columns && same_device(*t, embeddings) &&
                 t->scalar_type() == embeddings.scalar_type(),
             "embedding_fm_backward: ", what, " must be [", B, ", ", columns, "] like the embeddings, ",
             dtype_and_device_of(embeddings), ", got shape ", shape_of(*t), " and ", dtype_and_device_of(*t));
    return columns == 1 ? torch::stable::contiguous(*t) : unit_stride_rows(*t);
  }
};

}  // namespace rk
