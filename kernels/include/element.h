#pragma once
// The element types of the CPU kernels: how each is read, rounded and accumulated.
// float, double and BFloat16 are branch-free on purpose, so that loops over them vectorise without intrinsics.

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>

#include "multiversion.h"

namespace fastprompt {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename T>
struct Element {  // float, double
  using Acc = T;
  FASTPROMPT_INLINE static Acc load(T value) { return value; }
  FASTPROMPT_INLINE static T store(Acc value) { return value; }
};

template <>
struct Element<BFloat16> {
  using Acc = float;
  FASTPROMPT_INLINE static Acc load(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
  FASTPROMPT_INLINE static BFloat16 store(Acc value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7fc0u : nearest_even)};
  }
};

// One value at a time; runs of halves go through half.h.
template <>
struct Element<Half> {
  using Acc = float;
  static Acc load(Half value) { return c10::detail::fp16_ieee_to_fp32_value(value.bits); }
  static Half store(Acc value) { return {c10::detail::fp16_ieee_from_fp32_value(value)}; }
};

template <typename T>
using Acc = typename Element<T>::Acc;

/// Calls `f` with a value of the C++ type behind `dtype`; returns false for any other dtype.
template <typename F>
bool with_element_type(torch::headeronly::ScalarType dtype, F&& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      f(float{});
      return true;
    case torch::headeronly::ScalarType::Double:
      f(double{});
      return true;
    case torch::headeronly::ScalarType::BFloat16:
      f(BFloat16{});
      return true;
    case torch::headeronly::ScalarType::Half:
      f(Half{});
      return true;
    default:
      return false;
  }
}

}  // namespace fastprompt
