// The decode kernel behind a C interface, so that it needs neither torch's headers nor its ABI.

#ifdef __CUDACC__
#include "hardware.cuh"
#else
#include "emulation.hpp"
#endif

#include "w4a16_decode.cuh"

namespace {

using namespace slimbench;

template <typename T>
int run(const Shape& shape, int device, int warps, const void* x, const void* words, const void* scales, const void* offsets, void* y,
        void* stream) {
  const auto kernel = offsets ? decode<T, true> : decode<T, false>;
  const unsigned tiles = (shape.outputs + kTile - 1) / kTile, bytes = offsets ? shared_bytes<true>(warps) : shared_bytes<false>(warps);
  return start(kernel, device, tiles, 32 * warps, bytes, stream, shape, static_cast<const uint16_t*>(x), static_cast<const uint4*>(words),
               static_cast<const uint16_t*>(scales), static_cast<const uint16_t*>(offsets), static_cast<uint16_t*>(y));
}

}  // namespace

extern "C" {

// x [rows, 32 · units] and y [rows, outputs] in float16, or bfloat16; 1 to 8 rows, 1 to 16 warps; other tensors in the layout of
// methods/kernels/triton/layout.py, all aligned to 16 bytes. One group, or groups of a power of two of units. `offsets` may be null.
// Returns an error of the CUDA runtime, 0 for none.
int slimbench_w4a16_decode(const void* x, const void* words, const void* scales, const void* offsets, void* y, int rows, int outputs,
                           int units, int groups, int bfloat16, int warps, int device, void* stream) {
  int shift = 0;
  while (groups << shift < units) ++shift;
  const Shape shape{rows, outputs, units, groups, shift};
  const auto runner = bfloat16 ? run<BFloat> : run<Half>;
  return runner(shape, device, warps, x, words, scales, offsets, y, stream);
}

const char* slimbench_describe(int error) { return describe(error); }
}
