// Input checks. Every message names the op, the argument, what was expected and what was given, and is raised
// before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.size(d);
  s << ']';
  return s.str();
}

// As Python prints it.
inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

}  // namespace rk

// Unlike STD_TORCH_CHECK it says nothing of the file it stands in: the message is for who called the op.
#define RK_CHECK(condition, ...)             \
  do {                                       \
    if (!(condition)) rk::fail(__VA_ARGS__); \
  } while (false)

#define RK_CHECK_DIM(op, t, n)                                                                       \
  RK_CHECK((t).dim() == (n), op ": " #t " must have " #n " dimensions, got ", (t).dim(), " (shape ", \
           rk::shape_of(t), ")")

#define RK_CHECK_CPU(op, t) RK_CHECK((t).is_cpu(), op ": " #t " must be on the CPU like the other arguments")

#define RK_CHECK_FLOATING(op, t)                                                                        \
  do {                                                                                                  \
    const auto rk_dtype = (t).scalar_type();                                                            \
    RK_CHECK(rk_dtype == rk::ScalarType::Float || rk_dtype == rk::ScalarType::Double ||                 \
                 rk_dtype == rk::ScalarType::Half || rk_dtype == rk::ScalarType::BFloat16,              \
             op ": " #t " must be float32, float64, float16 or bfloat16, got ", rk::name_of(rk_dtype)); \
  } while (false)

#define RK_CHECK_SAME_DTYPE(op, t, u)                                                             \
  RK_CHECK((t).scalar_type() == (u).scalar_type(), op ": " #t " must have the dtype of " #u ", ", \
           rk::name_of((u).scalar_type()), ", got ", rk::name_of((t).scalar_type()))

#define RK_CHECK_SIZE(op, t, d, n)                                                                       \
  RK_CHECK((t).size(d) == (n), op ": " #t ".size(" #d ") must be " #n " = ", (n), ", got ", (t).size(d), \
           " (shape ", rk::shape_of(t), ")")
