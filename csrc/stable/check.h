// Input checks. Every message names the op, the argument, what was expected and what was given, and is raised
// before anything is written.
#pragma once

#include <cctype>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "stable/tensor.h"

namespace rk {

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

// Whether it is one of the dtypes that the kernels are compiled for.
inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
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
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexHalf:
      return "torch.complex32";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default: {
      std::string name = torch::headeronly::toString(dtype);
      for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      return "torch." + name;
    }
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

#define RK_CHECK_FLOATING(op, t)             \
  RK_CHECK(rk::is_floating(rk::dtype_of(t)), \
           op ": " #t " must be float32, float64, float16 or bfloat16, got ", rk::name_of(rk::dtype_of(t)))

namespace rk {

// Raises unless t is a tensor of this form; the text is that of ops/_checks.py's check_form.
inline void check_form(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                       ScalarType dtype) {
  bool fits = t.is_cpu() && dtype_of(t) == dtype && t.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = t.size(d) == shape[d];
  if (fits) return;
  std::ostringstream wanted;
  for (const int64_t& size : shape) wanted << (&size == shape.data() ? "" : ", ") << size;
  fail(op, ": ", name, " must be ", name_of(dtype), " [", wanted.str(), "] on cpu, got ",
       name_of(dtype_of(t)), ' ', shape_of(t), " on ", t.is_cpu() ? "cpu" : "another device");
}

}  // namespace rk
