// The names of `hardware.cuh` for a host compiler: the kernel runs on a CPU, a thread for each lane, one block after the other.
// Slow, and for tests alone: it shows that indices, fragments and arithmetic are right, not that a card agrees or is fast.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};

inline thread_local Index threadIdx, blockIdx, blockDim;

namespace slimbench {

// Lanes meet twice in a product: when all fragments are there, and when all have been read.
struct Warp {
  std::barrier<> meet{32};
  uint32_t a[32][4], b[32][2];
};

inline thread_local Warp* warp;
inline std::unique_ptr<std::barrier<>> block;

template <typename T>
void multiply_fragments(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(warp->a[lane], a, sizeof a);
  warp->b[lane][0] = b0, warp->b[lane][1] = b1;
  warp->meet.arrive_and_wait();
  const auto half = [](uint32_t pair, unsigned k) { return T::widen(uint16_t(pair >> k % 2 * 16)); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned owner = k % 8 / 2;
      sums[i] += half(warp->a[row % 8 * 4 + owner][k / 8 * 2 + row / 8], k) * half(warp->b[column * 4 + owner][k / 8], k);
    }
  }
  warp->meet.arrive_and_wait();
}

template <typename T>
struct Pairs {
  static uint32_t subtract(uint32_t a, uint32_t b) {
    const auto part = [&](int shift) { return uint32_t(T::narrow(T::widen(uint16_t(a >> shift)) - T::widen(uint16_t(b >> shift)))); };
    return part(0) | part(16) << 16;
  }
  static void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_fragments<T>(sums, a, b0, b1); }
};

struct Half : Pairs<Half> {
  static constexpr uint32_t magic = 0x64006400, bias = 0x64086408, ones = 0x3c003c00;

  static float widen(uint16_t x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                                      : std::ldexp(float(mantissa), -24);
    return x >> 15 ? -size : size;
  }

  static uint16_t narrow(float x) {
    const uint16_t sign = std::signbit(x) << 15;
    if (std::isnan(x)) return 0x7fff;
    if (x == 0) return sign;
    if (std::fabs(x) >= 65520.f) return sign | 0x7c00;
    int exponent;
    std::frexp(x, &exponent);
    const int last = std::max(exponent - 11, -24);  // the power of two of the last place
    const auto places = uint32_t(std::nearbyint(std::ldexp(std::fabs(x), -last)));
    return sign | uint16_t(last == -24 ? places : (uint32_t(last + 24) << 10) + places);
  }
};

struct BFloat : Pairs<BFloat> {
  static constexpr uint32_t magic = 0x43004300, bias = 0x43084308, ones = 0x3f803f80;

  static float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  static uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

inline uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t fill) { return (word & mask) | fill; }

inline std::vector<uint4> pool;

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(pool.data()); }

template <int Bytes>
void copy(void* to, const void* from, bool there) {
  if (there) {
    std::memcpy(to, from, Bytes);
  } else {
    std::memset(to, 0, Bytes);
  }
}

inline void copy_once(void* to, const void* from, bool there) { copy<16>(to, from, there); }

inline void end_batch() {}

template <int Open>
void wait_for_batches() {}

template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), int, unsigned blocks, unsigned threads, unsigned bytes, void*, Arguments... arguments) {
  for (unsigned b = 0; b < blocks; ++b) {
    block = std::make_unique<std::barrier<>>(threads);
    pool.assign(bytes / sizeof(uint4), uint4{~0u, ~0u, ~0u, ~0u});
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
    std::vector<std::jthread> lanes;
    for (unsigned t = 0; t < threads; ++t) {
      lanes.emplace_back([=, w = warps[t / 32].get()] {
        threadIdx = {t}, blockIdx = {b}, blockDim = {threads};
        warp = w;
        kernel(arguments...);
      });
    }
  }
  return 0;
}

inline const char* describe(int) { return "no error"; }

}  // namespace slimbench

inline void __syncthreads() { slimbench::block->arrive_and_wait(); }
