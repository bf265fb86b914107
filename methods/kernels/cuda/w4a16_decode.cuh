// Up to eight rows of 16-bit inputs times 4-bit weights: y[m, o] = sum_i x[m, i] · ((code[o, i] - 8) · scale + offset).
//
// A token's product is limited by reading the weights, so each byte of them is read once, in whole lines: a warp copies a unit of 32
// inputs of a tile of 32 outputs as 16 bytes a lane (the layout is described in methods/kernels/triton/layout.py), and has the copies
// of several units under way while it works. A lane uses only what it copied itself, so no one waits for others.
//
// The words are tensor core fragments as they lie: a mask, an `or` and a subtraction make two exact 16-bit integers, and the rows of
// inputs are the eight columns of the other operand. So eight rows cost what one does. Integers are multiplied and summed in float32
// within a unit; scales and offsets enter there, in float32 too. The sums of inputs that go with the offsets are one more product,
// with ones.
//
// A block is one tile. Its warps take units in turn, so that they read neighbouring lines, and add their sums up at the end.
#pragma once

#include <cstdint>

namespace slimbench {

constexpr int kTile = 32, kUnit = 32, kMostRows = 8, kMostWarps = 16;
constexpr int kAhead = 4;  // units whose copies a warp has under way

// A group has 2^group_shift units.
struct Shape {
  int rows, outputs, units, groups, group_shift;
};

// What the lanes of a warp copy for one unit: the codes of 8 inputs for rows g + 8 r of the tile, these inputs of row g of x, and the
// scales of the four rows.
template <bool Offsets>
struct Slot {
  uint4 codes[32], inputs[32];
  uint2 scales[32], offsets[Offsets ? 32 : 1];
};

// Bytes of shared memory of a block; its sums fit into them too.
template <bool Offsets>
constexpr unsigned shared_bytes(int warps) {
  return warps * kAhead * sizeof(Slot<Offsets>);
}

// Copies what lane 4 g + t needs of a tile.
template <bool Offsets>
struct Reader {
  const uint4* codes;
  const uint16_t *inputs, *scales, *offsets;
  int lane, units, group_shift;
  bool given;

  __device__ __forceinline__ Reader(const Shape& shape, int tile, int lane, const uint16_t* x, const uint4* words,
                                    const uint16_t* scale, const uint16_t* offset)
      : lane(lane), units(shape.units), group_shift(shape.group_shift), given(lane / 4 < shape.rows) {
    const int64_t step = int64_t(tile) * shape.groups * kTile + lane / 4 * 4;
    codes = words + int64_t(tile) * units * 32 + lane;
    inputs = x + int64_t(lane / 4) * units * kUnit + lane % 4 * 8;
    scales = scale + step;
    offsets = Offsets ? offset + step : nullptr;
  }

  // Zeros beyond the last unit, and for rows that are not there.
  __device__ __forceinline__ void copy_unit(Slot<Offsets>& slot, int unit) const {
    const bool inside = unit < units;
    const int64_t step = int64_t(unit >> group_shift) * kTile;
    copy_once(&slot.codes[lane], codes + int64_t(unit) * 32, inside);
    copy<16>(&slot.inputs[lane], inputs + int64_t(unit) * kUnit, inside && given);
    copy<8>(&slot.scales[lane], scales + step, inside);
    if (Offsets) copy<8>(&slot.offsets[lane], offsets + step, inside);
    end_batch();
  }
};

// The codes of inputs 2 pair and 2 pair + 1 of a word, minus 8.
template <typename T>
__device__ __forceinline__ uint32_t weights(uint32_t word, int pair) {
  return T::subtract(masked_or(word >> 4 * pair, 0x000f000fu, T::magic), T::bias);
}

// Adds a unit to the sums of rows g, g + 8 (sums[0]) and g + 16, g + 24 (sums[1]): columns 2 t and 2 t + 1 of the first row, then
// of the second.
template <typename T, bool Offsets>
__device__ __forceinline__ void add(uint4 codes, uint4 inputs, uint2 scale, uint2 offset, float (&sums)[2][4]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w}, x[4] = {inputs.x, inputs.y, inputs.z, inputs.w};
  const uint32_t scales[2] = {scale.x, scale.y}, offsets[2] = {offset.x, offset.y};
  float totals[4] = {};
  if (Offsets) {
    const uint32_t ones[4] = {T::ones, T::ones, T::ones, T::ones};
    T::multiply(totals, ones, x[0], x[1]);
    T::multiply(totals, ones, x[2], x[3]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float products[4] = {};
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
      const uint32_t a[4] = {weights<T>(words[2 * half], pair), weights<T>(words[2 * half + 1], pair),
                             weights<T>(words[2 * half], pair + 1), weights<T>(words[2 * half + 1], pair + 1)};
      T::multiply(products, a, x[pair], x[pair + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int shift = i / 2 * 16;
      sums[half][i] += products[i] * T::widen(uint16_t(scales[half] >> shift));
      if (Offsets) sums[half][i] += totals[i] * T::widen(uint16_t(offsets[half] >> shift));
    }
  }
}

template <typename T, bool Offsets>
__global__ void __launch_bounds__(32 * kMostWarps, 1) decode(Shape shape, const uint16_t* x, const uint4* words, const uint16_t* scales,
                                                          const uint16_t* offsets, uint16_t* y) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, tile = blockIdx.x;
  const Reader<Offsets> reader(shape, tile, lane, x, words, scales, offsets);
  Slot<Offsets>* slots = reinterpret_cast<Slot<Offsets>*>(shared_memory()) + warp * kAhead;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) reader.copy_unit(slots[i], warp + i * warps);
  float sums[2][4] = {};
  for (int first = warp; first < shape.units; first += kAhead * warps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      wait_for_batches<kAhead - 1>();
      const Slot<Offsets>& slot = slots[i];
      const uint4 codes = slot.codes[lane], inputs = slot.inputs[lane];
      const uint2 scale = slot.scales[lane], offset = slot.offsets[Offsets ? lane : 0];
      reader.copy_unit(slots[i], first + (i + kAhead) * warps);
      add<T, Offsets>(codes, inputs, scale, offset, sums);
    }
  }
  wait_for_batches<0>();
  __syncthreads();
  auto shared = reinterpret_cast<float(*)[8][32]>(shared_memory());
#pragma unroll
  for (int i = 0; i < 8; ++i) shared[warp][i][lane] = sums[i / 4][i % 4];
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * shape.rows; i += blockDim.x) {
    const int output = i % kTile, column = i / kTile, g = output % 8, r = output / 8;
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared[w][r / 2 * 4 + r % 2 * 2 + column % 2][g * 4 + column / 2];
    if (tile * kTile + output < shape.outputs) y[int64_t(column) * shape.outputs + tile * kTile + output] = T::narrow(sum);
  }
}

}  // namespace slimbench
