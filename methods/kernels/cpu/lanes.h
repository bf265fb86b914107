// Sixteen numbers of 32 bits at once, in the compiler's own vectors, and bfloat16 to and from them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 16;

float to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float get(uint16_t x) { return to_float(x); }
float get(float x) { return x; }
void put(uint16_t& to, float x) { to = to_bfloat16(x); }
void put(float& to, float x) { to = x; }

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

Floats load_lanes(const float* from) {
  Floats lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

Floats load_lanes(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words bits = __builtin_convertvector(halves, Words) << 16;
  return (Floats)bits;
}

// Without the dispatcher, which takes as long as a norm of a token.
at::Tensor uninitialized(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }

template <typename T>
const T* data(const at::Tensor& tensor) {
  return reinterpret_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace
