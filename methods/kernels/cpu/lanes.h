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

// To 2 units in the last place: 2^n · e^r with |r| below ln 2 / 2, whose polynomial is that of Cephes' expf.
Floats exponential(Floats x) {
  const Floats low = Floats{} - 87.f, high = Floats{} + 88.f;  // below it a weight is 2e-38, and counts as nothing
  x = x < low ? low : x > high ? high : x;
  const Floats shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + next;
  const Words power = (Words)(__builtin_convertvector(n, Ints) + 127) << 23;
  return (y * r * r + r + 1.f) * (Floats)power;
}

// Without the dispatcher, which takes as long as a norm of a token.
at::Tensor uninitialized(at::IntArrayRef sizes, at::ScalarType dtype) { return at::detail::empty_cpu(sizes, dtype); }

template <typename T>
const T* data(const at::Tensor& tensor) {
  return reinterpret_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace
