// What the decode kernel asks of a card from compute capability 8.0 on. `emulation.hpp` gives the same names to a host compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace slimbench {

// Two numbers of 16 bits in a register, the first in the lower half. `magic` is the pattern of a power of two whose last place is 1,
// in both halves: with an integer below 16 in its last bits it is that power plus the integer. `bias` is the power plus 8.
struct Half {
  static constexpr uint32_t magic = 0x64006400, bias = 0x64086408, ones = 0x3c003c00;

  static __device__ __forceinline__ float widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ __forceinline__ uint16_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }

  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
  }

  // sums [16 rows, 8] += a [16 rows, 16] · b [16, 8], of which each lane of the warp holds its fragment.
  static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct BFloat {
  static constexpr uint32_t magic = 0x43004300, bias = 0x43084308, ones = 0x3f803f80;

  static __device__ __forceinline__ float widen(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
  static __device__ __forceinline__ uint16_t narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

  // a - b as a · 1 + (-b): cards of 8.0 have no subtraction of bfloat16.
  static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(a), "r"(ones), "r"(b ^ 0x80008000));
    return difference;
  }

  static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// (word & mask) | fill in one instruction.
__device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t fill) {
  uint32_t joined;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(joined) : "r"(word), "r"(mask), "r"(fill));
  return joined;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ uint4 shared[];
  return reinterpret_cast<unsigned char*>(shared);
}

// Copies go on while the thread works; a thread sees its own as soon as it has waited for them. Where `there` is false, nothing is
// read and the bytes become zeros.
// What is read once goes past the first-level cache, and the second level is asked for the whole line.
__device__ __forceinline__ void copy_once(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}

template <int Bytes>
__device__ __forceinline__ void copy(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "n"(Bytes),
               "r"(there ? Bytes : 0)
               : "memory");
}

// Ends a batch of copies.
__device__ __forceinline__ void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Open` batches are under way.
template <int Open>
__device__ __forceinline__ void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

// Starts a kernel with `bytes` of shared memory; the error that cudaLaunchKernel would give, 0 for none.
template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), int device, unsigned blocks, unsigned threads, unsigned bytes, void* stream,
          Arguments... arguments) {
  constexpr unsigned unasked = 48 * 1024;  // more of it must be asked for
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  if (bytes > unasked) {
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  }
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  return cudaGetLastError();
}

inline const char* describe(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace slimbench
