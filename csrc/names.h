// A str[] argument of an op.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>
#include <utility>

namespace rk {

// Strings stay torch's until a message needs one: torch's own conversion copies them all at every call, and
// loses the copies.
class NameList {
 public:
  explicit NameList(StableListHandle list) : list_(list) {}
  NameList(NameList&& other) noexcept : list_(std::exchange(other.list_, nullptr)) {}
  ~NameList() {
    if (!list_) return;
    for (size_t i = 0, n = size(); i < n; ++i) torch_delete_string(handle(i));
    torch_delete_list(list_);
  }

  size_t size() const {
    size_t n = 0;
    torch_list_size(list_, &n);
    return n;
  }

  std::string operator[](size_t i) const {
    size_t length = 0;
    const char* data = nullptr;
    torch_string_length(handle(i), &length);
    torch_string_c_str(handle(i), &data);
    return std::string(data, length);
  }

 private:
  StringHandle handle(size_t i) const {
    StableIValue value = 0;
    torch_list_get_item(list_, i, &value);
    return torch::stable::detail::to<StringHandle>(value);
  }

  StableListHandle list_;
};

}  // namespace rk

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<rk::NameList> {
  static rk::NameList call(StableIValue value, uint64_t, bool) {
    return rk::NameList(to<StableListHandle>(value));
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
