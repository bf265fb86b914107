// Product of inputs with group-wise quantized weights on a CPU: y[m, o] = sum_i x[m, i] · w[o, i].
//
// Layout. Sixteen rows of the weight form a block, one 32-bit lane of a vector for each row. Codes are split into planes (3 bits into
// 2 and 1, the others are whole). A word of a plane of width W holds 32 / W consecutive inputs of one row: byte t of it holds the
// inputs t, 4 + t, 8 + t, … from its lowest bits upwards. Words are ordered block, group of inputs, plane, inputs, row:
// [blocks, groups, words, 16], so that a block is read from one end to the other.
//
//     w = (q - mid) · scale + offset
//
// With AVX-512 VNNI, bfloat16 inputs become sixteen-bit integers with one step for each group of inputs, x = step · (256 · high + low)
// with high and low of eight bits, and the products with the codes are summed exactly in 32-bit integers. Inputs are so kept to
// 1 / 65,278 of the largest of their group; their bfloat16 rounding is coarser unless they are 128 times smaller than that one.
// Elsewhere, and for float32 inputs, the compiler's own vectors compute in float32 on any processor.
// One expansion of the weights serves up to eight rows of inputs, so that a prompt is limited by arithmetic, a token by memory.
//
// With AMX, which multiplies tiles, more rows take another way: weights are expanded some inputs at a time, each rounded to bfloat16 as a
// dense weight is, and multiplied while a core's first cache holds them. Inputs stay as they are, and sums are of float32. AMD's processors
// multiply pairs of bfloat16 as often as fours of bytes, of which a product takes two: there tiles are multiplied by AVX-512. Of very many
// rows the library's own product is faster: weights are expanded for it, as many outputs at a time as take little memory.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cpu/Utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <type_traits>
#include <vector>

#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SLIMBENCH_VNNI
#endif
#if defined(__AVX512BF16__) && defined(SLIMBENCH_VNNI)
#define SLIMBENCH_TILES
#endif

namespace {

#ifdef __znver5__
constexpr int64_t kAhead = 0, kFarAhead = 64 * kLanes;  // it brings words into the first cache itself, and is slower where they are asked for
#else
constexpr int64_t kAhead = 16 * kLanes;      // words that are asked for before they are needed, into the first cache
constexpr int64_t kFarAhead = 256 * kLanes;  // the same, into the second, which can wait for more of them at once
#endif
constexpr int kMostRows = 8;            // rows of inputs for which one expansion of the weights serves
constexpr int64_t kRowsForThreads = 8;  // rows of inputs from which on they are prepared by all threads
#ifdef __AMX_BF16__
constexpr int64_t kRowsForTiles = 12;   // rows of inputs from which on tiles are worth their expansion
constexpr int64_t kInputsOfTiles = 128;  // inputs for which weights are expanded at once
#else
constexpr int64_t kRowsForTiles = 17;  // sixteen by AVX-512 are slower than as integers: rows are filled up to a pair of tiles
constexpr int64_t kInputsOfTiles = 256;
#endif
constexpr int64_t kRowsOfTiles = 512;   // rows of inputs whose sums are kept at once
constexpr int64_t kRowsForLibrary = 1280;  // rows of inputs from which on the library's product is worth the expansion of whole weights
constexpr int64_t kWeightsForLibrary = 2 << 20;  // weights that are expanded for it at once

// Bits of a field, and the place in the code at which they belong.
struct Plane {
  int width, place;
};

template <int Bits>
struct Code;
template <>
struct Code<2> {
  static constexpr Plane planes[] = {{2, 0}};
};
template <>
struct Code<3> {
  static constexpr Plane planes[] = {{2, 0}, {1, 2}};
};
template <>
struct Code<4> {
  static constexpr Plane planes[] = {{4, 0}};
};
template <>
struct Code<8> {
  static constexpr Plane planes[] = {{8, 0}};
};

// `words` are those of one group of one row, `group` its inputs. `scale_stride` is 0 where all groups of a row share a scale.
struct Shape {
  int64_t rows, inputs, outputs, blocks, groups, group, words, scale_stride;
};

Words load_words(const uint32_t* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

template <typename T>
void store_lanes(T* to, Floats lanes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) put(to[i], lanes[i]);
}

// Field `index` of the four bytes of each word, at its place in the code.
template <Plane P>
Words field(Words words, int index) {
  constexpr uint32_t mask = ((1u << P.width) - 1) << P.place;
  const int shift = P.width * index - P.place;
  return (shift < 0 ? words << -shift : words >> shift) & (mask * 0x01010101u);
}

// Calls `add` with the codes of each four inputs, one code a byte, joined from their planes, where they begin, and which field of a word
// they are. Returns where the next group begins.
template <int Bits, typename Add>
inline const uint32_t* each_field(const uint32_t* codes, int64_t group, Add add) {
  constexpr auto& planes = Code<Bits>::planes;
  constexpr Plane first = planes[0], last = planes[std::size(planes) - 1];
  constexpr int fields = 8 / first.width, ratio = first.width / last.width;  // words of the first plane for one of the last
  const uint32_t* upper = codes + group * first.width / 32 * kLanes;
  for (int64_t i = 0; i < group;) {
    Words above;
    if constexpr (std::size(planes) > 1) {
      above = load_words(upper);
      upper += kLanes;
    }
#pragma GCC unroll 8
    for (int word = 0; word < ratio; ++word, codes += kLanes) {
      const Words words = load_words(codes);
      __builtin_prefetch(codes + kFarAhead, 0, 2);
      if constexpr (kAhead > 0) __builtin_prefetch(codes + kAhead);
#pragma GCC unroll 8
      for (int s = 0; s < fields; ++s, i += 4) {
        Words bytes = field<first>(words, s);
        if constexpr (std::size(planes) > 1) bytes |= field<last>(above, word * fields + s);
        add(bytes, i, s);
      }
    }
  }
  return upper;
}

// The compiler's own vectors: any processor, inputs in float32.
struct Portable {
  static constexpr int64_t blocks = 1;  // of a weight, that are multiplied together

  std::vector<float> values, totals;

  template <typename T>
  Portable(const Shape& shape, const T* x) : values(shape.rows * shape.inputs), totals(shape.rows * shape.groups) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = get(x[i]);
    for (size_t i = 0; i < totals.size(); ++i)
      for (int64_t j = 0; j < shape.group; ++j) totals[i] += values[i * shape.group + j];
  }

  float total(int64_t group) const { return totals[group]; }

  // Adds the products of `Rows` rows of inputs with the codes of one group, less `mid` times the inputs.
  template <int Bits, int Rows>
  const uint32_t* accumulate(const Shape& shape, const uint32_t* codes, int64_t row, int64_t group, Floats (&sums)[Rows]) const {
    constexpr float mid = float(1 << (Bits - 1));
    const float* x[Rows];
    for (int m = 0; m < Rows; ++m) {
      x[m] = values.data() + (row + m) * shape.inputs + group * shape.group;
      sums[m] = Floats{} - mid * totals[(row + m) * shape.groups + group];
    }
    return each_field<Bits>(codes, shape.group, [&](Words bytes, int64_t input, int) {
      for (int t = 0; t < 4; ++t) {
        const Floats weight = __builtin_convertvector((Ints)((bytes >> (8 * t)) & 0xffu), Floats);
        for (int m = 0; m < Rows; ++m) sums[m] += weight * x[m][input + t];
      }
    });
  }
};

#ifdef SLIMBENCH_VNNI

// Integer products: inputs as two bytes with one step for each group.
struct Vnni {
  static constexpr int64_t blocks = 1;
  static constexpr float kLargest = 32639;  // 256 · 127 + 127

  struct Group {
    float step, total;
    int32_t high, low;  // sums of the group's bytes
  };

  std::vector<int8_t> high, low;
  std::vector<Group> groups;

  Vnni(const Shape& shape, const uint16_t* x)
      : high(shape.rows * shape.inputs), low(shape.rows * shape.inputs), groups(shape.rows * shape.groups) {
    const auto prepare_rows = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * shape.groups; i < end * shape.groups; ++i) prepare(x, i, shape.group);
    };
    if (shape.rows < kRowsForThreads)
      prepare_rows(0, shape.rows);
    else
      at::parallel_for(0, shape.rows, 1, prepare_rows);
  }

  void prepare(const uint16_t* x, int64_t index, int64_t size) {
    const uint16_t* from = x + index * size;
    int8_t *h = high.data() + index * size, *l = low.data() + index * size;
    uint16_t largest = 0;
    for (int64_t j = 0; j < size; ++j) largest = std::max<uint16_t>(largest, from[j] & 0x7fff);
    Group& group = groups[index];
    if (largest >= 0x7f80) {  // infinite or NaN: so is every output
      group = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN(), 0, 0};
      return;
    }
    const float top = to_float(largest), inverse = top > 1e-30f ? kLargest / top : 0.f;
    int32_t sum_high = 0, sum_low = 0;
    for (int64_t j = 0; j < size; ++j) {
      const float shifted = to_float(from[j]) * inverse + 12582912.f;  // rounds to the nearest integer in the lowest bits
      int32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      const int32_t value = bits - 0x4b400000, upper = (value + 128) >> 8, lower = value - upper * 256;
      h[j] = int8_t(upper);
      l[j] = int8_t(lower);
      sum_high += upper;
      sum_low += lower;
    }
    const float step = top / kLargest;
    group = {step, step * (256.f * float(sum_high) + float(sum_low)), sum_high, sum_low};
  }

  float total(int64_t group) const { return groups[group].total; }

  template <int Bits, int Rows>
  const uint32_t* accumulate(const Shape& shape, const uint32_t* codes, int64_t row, int64_t group, Floats (&sums)[Rows]) const {
    constexpr int32_t mid = 1 << (Bits - 1);
    const int8_t *h[Rows], *l[Rows];
    // A sum waits for the one before it: with few rows of inputs there are two of each, which go on beside each other.
    constexpr int sums_of_each = Rows <= 4 ? 2 : 1;
    __m512i highs[Rows][sums_of_each] = {}, lows[Rows][sums_of_each] = {};
    for (int m = 0; m < Rows; ++m) {
      const int64_t at = (row + m) * shape.inputs + group * shape.group;
      const Group& facts = groups[(row + m) * shape.groups + group];
      h[m] = high.data() + at;
      l[m] = low.data() + at;
      highs[m][0] = _mm512_set1_epi32(-mid * facts.high);
      lows[m][0] = _mm512_set1_epi32(-mid * facts.low);
    }
    codes = each_field<Bits>(codes, shape.group, [&](Words bytes, int64_t input, int field) {
      const int which = field % sums_of_each;
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        highs[m][which] = _mm512_dpbusd_epi32(highs[m][which], (__m512i)bytes, four(h[m] + input));
        lows[m][which] = _mm512_dpbusd_epi32(lows[m][which], (__m512i)bytes, four(l[m] + input));
      }
    });
    for (int m = 0; m < Rows; ++m) {
      const Floats sum = (Floats)_mm512_fmadd_ps(_mm512_cvtepi32_ps(whole(highs[m])), _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(whole(lows[m])));
      sums[m] = sum * groups[(row + m) * shape.groups + group].step;
    }
    return codes;
  }

  static __m512i whole(const __m512i (&sums)[1]) { return sums[0]; }
  static __m512i whole(const __m512i (&sums)[2]) { return _mm512_add_epi32(sums[0], sums[1]); }

  static __m512i four(const int8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return _mm512_set1_epi32(bytes);
  }
};

#endif

#ifdef SLIMBENCH_TILES

// Two by two tiles at a time: each is of sixteen rows of inputs, or of the weight, by 32 inputs.
struct Tiles {
  static constexpr int64_t blocks = 4, depth = 32, size = kLanes * depth, pair = 2 * kLanes;

  // Rows of inputs: those of `x` itself, and from `copied_from` on a copy, filled up with zeros to a whole pair of tiles. Rows that are
  // a multiple of 4,096 bytes apart would share their places in the first cache: then all are copied, as tiles one behind the other.
  // Without AMX all are: distances that the compiler knows cost no additions between the products.
  const uint16_t* x;
  at::Tensor copy;
#ifdef __AMX_BF16__
  int64_t copied_from, row, step;
#else
  static constexpr int64_t copied_from = 0, row = depth, step = size;
#endif

  Tiles(const Shape& shape, const uint16_t* from) : x(from) {
#ifdef __AMX_BF16__
    const bool collide = shape.inputs % 2048 == 0;
    copied_from = collide ? 0 : shape.rows / pair * pair;
    row = collide ? depth : shape.inputs;
    step = collide ? size : depth;
#endif
    const int64_t filled = (shape.rows + pair - 1) / pair * pair;
    copy = uninitialized({filled - copied_from, shape.inputs}, at::kBFloat16);
    auto* const to = reinterpret_cast<uint16_t*>(copy.mutable_data_ptr());
    at::parallel_for(copied_from, filled, pair, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        for (int64_t i = 0; i < shape.inputs; i += depth) {
          uint16_t* const tile = to + (m - copied_from) / kLanes * kLanes * shape.inputs + m % kLanes * row + i / depth * step;
          if (m < shape.rows)
            std::memcpy(tile, x + m * shape.inputs + i, depth * sizeof *tile);
          else
            std::memset(tile, 0, depth * sizeof *tile);
        }
    });
  }

  const uint16_t* inputs_of(int64_t m, int64_t first, int64_t inputs) const {
    return (m < copied_from ? x + m * inputs : data<uint16_t>(copy) + (m - copied_from) * inputs) + first / depth * step;
  }

  // The code in the lowest byte of each lane.
  template <int Bits>
  static __m512 numbers(__m512i codes) {
    if constexpr (Bits == 8) return _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(0xff)));
    alignas(64) static constexpr float known[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return _mm512_permutexvar_ps(codes, _mm512_load_ps(known));  // looks at the lowest four bits alone
  }

  // A group of a block as tiles: [inputs / 2, 16, 2], so that two inputs of a row of the weight lie beside each other.
  template <int Bits>
  static void expand(int64_t group, const uint32_t* codes, __m512 scale, __m512 offset, uint16_t* to) {
    alignas(64) static constexpr auto beside = [] {
      std::array<uint16_t, 2 * kLanes> found{};
      for (int64_t half = 0; half < 2 * kLanes; ++half) found[half] = uint16_t(half / 2 + half % 2 * kLanes);
      return found;
    }();
    const __m512i order = _mm512_load_si512(beside.data());
    const __m512 zero = _mm512_fnmadd_ps(scale, _mm512_set1_ps(float(1 << (Bits - 1))), offset);  // what code 0 means
    each_field<Bits>(codes, group, [&](Words bytes, int64_t input, int) {
      for (int t = 0; t < 4; t += 2) {
        const __m512 first = _mm512_fmadd_ps(numbers<Bits>(_mm512_srli_epi32((__m512i)bytes, 8 * t)), scale, zero);
        const __m512 second = _mm512_fmadd_ps(numbers<Bits>(_mm512_srli_epi32((__m512i)bytes, 8 * t + 8)), scale, zero);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_store_si512(to + (input + t) * kLanes, _mm512_permutexvar_epi16(order, both));
      }
    });
  }

  // Some groups of a block, one behind the other.
  template <int Bits, typename T>
  static void expand_groups(const Shape& shape, int64_t block, int64_t group, int64_t groups, const uint32_t* codes, const T* scales,
                            const T* offsets, uint16_t* to) {
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t index = block * shape.groups + group + i, at = (shape.scale_stride ? index : block) * kLanes;
      const Floats offset = offsets ? load_lanes(offsets + at) : Floats{};
      expand<Bits>(shape.group, codes + index * shape.words * kLanes, (__m512)load_lanes(scales + at), (__m512)offset,
                   to + i * shape.group * kLanes);
    }
  }

  // A whole block as its rows of a dense weight [outputs, inputs]. `tiles` has room for a group of it.
  template <int Bits, typename T>
  static void expand_rows(const Shape& shape, int64_t block, const uint32_t* codes, const T* scales, const T* offsets, uint16_t* tiles,
                          uint16_t* to) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      expand_groups<Bits>(shape, block, g, 1, codes, scales, offsets, tiles);
      for (int64_t i = 0; i < shape.group; i += depth) transpose(tiles + i * kLanes, to + g * shape.group + i, shape.inputs);
    }
  }

  // A tile's rows of the weight, each with its 32 inputs one behind the other, `stride` apart: words of two inputs change places in fours,
  // then the fours do.
  static void transpose(const uint16_t* tile, uint16_t* to, int64_t stride) {
    __m512i fours[kLanes];
    for (int64_t i = 0; i < kLanes; i += 4) {
      const auto at = [&](int64_t k) { return _mm512_load_si512(tile + (i + k) * pair); };
      const __m512i low = _mm512_unpacklo_epi32(at(0), at(1)), high = _mm512_unpackhi_epi32(at(0), at(1));
      const __m512i next_low = _mm512_unpacklo_epi32(at(2), at(3)), next_high = _mm512_unpackhi_epi32(at(2), at(3));
      fours[i] = _mm512_unpacklo_epi64(low, next_low);  // of rows 0, 4, 8, 12
      fours[i + 1] = _mm512_unpackhi_epi64(low, next_low);
      fours[i + 2] = _mm512_unpacklo_epi64(high, next_high);
      fours[i + 3] = _mm512_unpackhi_epi64(high, next_high);
    }
    for (int64_t r = 0; r < 4; ++r) {
      const __m512i even = _mm512_shuffle_i32x4(fours[r], fours[4 + r], 0x88), odd = _mm512_shuffle_i32x4(fours[r], fours[4 + r], 0xdd);
      const __m512i later_even = _mm512_shuffle_i32x4(fours[8 + r], fours[12 + r], 0x88);
      const __m512i later_odd = _mm512_shuffle_i32x4(fours[8 + r], fours[12 + r], 0xdd);
      _mm512_storeu_si512(to + r * stride, _mm512_shuffle_i32x4(even, later_even, 0x88));
      _mm512_storeu_si512(to + (4 + r) * stride, _mm512_shuffle_i32x4(odd, later_odd, 0x88));
      _mm512_storeu_si512(to + (8 + r) * stride, _mm512_shuffle_i32x4(even, later_even, 0xdd));
      _mm512_storeu_si512(to + (12 + r) * stride, _mm512_shuffle_i32x4(odd, later_odd, 0xdd));
    }
  }

  // Two tiles of inputs by two of weights, `steps` times, added to what `sums` [2, 2, 16, 16] holds, or in its place. What belongs to the
  // second tile lies `next` behind the first.
  void product(const uint16_t* inputs, int64_t next_inputs, const uint16_t* weights, int64_t next_weights, int64_t steps, bool goes_on,
               float* sums) const {
#ifdef __AMX_BF16__
    constexpr int64_t line = 64, tile = kLanes * kLanes;
    const int64_t stride = row * int64_t(sizeof *inputs);
    if (goes_on) {
      _tile_loadd(0, sums, line);
      _tile_loadd(1, sums + tile, line);
      _tile_loadd(2, sums + 2 * tile, line);
      _tile_loadd(3, sums + 3 * tile, line);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; ++k, inputs += step, weights += size) {
      _tile_loadd(4, inputs, stride);
      _tile_loadd(6, weights, line);
      _tile_loadd(7, weights + next_weights, line);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, inputs + next_inputs, stride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + tile, line);
    _tile_stored(2, sums + 2 * tile, line);
    _tile_stored(3, sums + 3 * tile, line);
#else
    constexpr int64_t some = 8;  // rows of inputs whose sums fit into registers
    for (int64_t m = 0; m < pair; m += some) {
      float* const to = sums + (m / kLanes * pair + m % kLanes) * kLanes;
      const uint16_t* const from = inputs + m / kLanes * next_inputs + m % kLanes * row;
      __m512 found[some][2] = {};
      if (goes_on)
        for (int64_t r = 0; r < some; ++r)
          for (int64_t b = 0; b < 2; ++b) found[r][b] = _mm512_load_ps(to + (b * kLanes + r) * kLanes);
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t i = 0; i < depth; i += 2) {
          const uint16_t* const at = weights + k * size + i * kLanes;
          const auto first = (__m512bh)_mm512_load_si512(at), second = (__m512bh)_mm512_load_si512(at + next_weights);
#pragma GCC unroll 8
          for (int64_t r = 0; r < some; ++r) {
            int32_t two;
            std::memcpy(&two, from + r * row + k * step + i, sizeof two);
            const auto both = (__m512bh)_mm512_set1_epi32(two);
            found[r][0] = _mm512_dpbf16_ps(found[r][0], both, first);
            found[r][1] = _mm512_dpbf16_ps(found[r][1], both, second);
          }
        }
      for (int64_t r = 0; r < some; ++r)
        for (int64_t b = 0; b < 2; ++b) _mm512_store_ps(to + (b * kLanes + r) * kLanes, found[r][b]);
    }
#endif
  }

#ifdef __AMX_BF16__
  static constexpr auto name = "tiles / VNNI";
#else
  static constexpr auto name = "tiles by AVX-512 / VNNI";
#endif

  // Whether this process may use tiles, and they are the faster.
  static bool can_be_had() {
#ifdef __AMX_BF16__
    static const bool granted = at::cpu::init_amx();
    return granted;
#elif defined(SLIMBENCH_TILES_ANYWHERE)
    return true;
#else
    return __builtin_cpu_is("amd");
#endif
  }

  static void begin() {
#ifdef __AMX_BF16__
    struct alignas(64) {
      uint8_t palette = 1, unused[15] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
#endif
  }

  static void end() {
#ifdef __AMX_BF16__
    _tile_release();
#endif
  }

  // Some blocks of weights, from `block` on, times all rows of inputs.
  template <int Bits, typename T>
  void multiply(const Shape& shape, int64_t block, const uint32_t* codes, const T* scales, const T* offsets, T* y) const {
    const int64_t here = std::min(blocks, shape.blocks - block), pairs_of_blocks = (here + 1) / 2;
    const int64_t some = std::min(std::max<int64_t>(1, kInputsOfTiles / shape.group), shape.groups);
    const int64_t next_block = some * shape.group * kLanes;
    const int64_t most_pairs = (std::min(kRowsOfTiles, shape.rows) + pair - 1) / pair;
    at::Tensor expanded = uninitialized({blocks * next_block}, at::kBFloat16);
    at::Tensor summed = uninitialized({most_pairs * pairs_of_blocks * pair * pair}, at::kFloat);
    auto* const weights = reinterpret_cast<uint16_t*>(expanded.mutable_data_ptr());
    float* const sums = summed.mutable_data_ptr<float>();
    for (int64_t first = 0; first < shape.rows; first += kRowsOfTiles) {
      const int64_t many = std::min(kRowsOfTiles, shape.rows - first);
      for (int64_t g = 0; g < shape.groups; g += some) {
        const int64_t groups = std::min(some, shape.groups - g);
        for (int64_t b = 0; b < here; ++b)
          expand_groups<Bits>(shape, block + b, g, groups, codes, scales, offsets, weights + b * next_block);
        for (int64_t m = 0; m < many; m += pair)
          for (int64_t b = 0; b < pairs_of_blocks; ++b)
            product(inputs_of(first + m, g * shape.group, shape.inputs), kLanes * shape.inputs, weights + 2 * b * next_block, next_block,
                    groups * shape.group / depth, g > 0, sums + (m * pairs_of_blocks + b * pair) * pair);
      }
      for (int64_t b = 0; b < pairs_of_blocks; ++b) {
        const int64_t begin = (block + 2 * b) * kLanes, count = std::min(pair, shape.outputs - begin);
        const __mmask32 kept = ~__mmask32(0) >> (pair - count);
        for (int64_t m = 0; m < many; ++m) {
          const float* sum = sums + (m / pair * pairs_of_blocks + b) * pair * pair + (m % pair / kLanes * 2 * kLanes + m % kLanes) * kLanes;
          const auto both = _mm512_cvtne2ps_pbh(_mm512_load_ps(sum + kLanes * kLanes), _mm512_load_ps(sum));
          _mm512_mask_storeu_epi16(y + (first + m) * shape.outputs + begin, kept, (__m512i)both);
        }
      }
    }
  }
};

#endif

// One block of weights times `Rows` rows of inputs.
template <int Bits, int Rows, typename Inputs, typename T>
void tile(const Shape& shape, const Inputs& x, int64_t block, int64_t row, const uint32_t* codes, const T* scales, const T* offsets, T* y) {
  Floats result[Rows] = {};
  const uint32_t* at = codes + block * shape.groups * shape.words * kLanes;
  const int64_t first = shape.scale_stride ? block * shape.groups : block;
  for (int64_t g = 0; g < shape.groups; ++g) {
    Floats sums[Rows];
    at = x.template accumulate<Bits, Rows>(shape, at, row, g, sums);
    const int64_t step = (first + g * shape.scale_stride) * kLanes;
    const Floats scale = load_lanes(scales + step);
    for (int m = 0; m < Rows; ++m) result[m] += scale * sums[m];
    if (offsets) {
      const Floats offset = load_lanes(offsets + step);
      for (int m = 0; m < Rows; ++m) result[m] += offset * x.total((row + m) * shape.groups + g);
    }
  }
  const int64_t begin = block * kLanes;
  for (int m = 0; m < Rows; ++m)
    store_lanes(y + (row + m) * shape.outputs + begin, result[m], std::min(kLanes, shape.outputs - begin));
}

// All rows of inputs from `row` on, `Rows` at once as long as there are so many.
template <int Bits, int Rows, typename Inputs, typename T>
void rows_of(const Shape& shape, const Inputs& x, int64_t block, int64_t row, const uint32_t* codes, const T* scales, const T* offsets, T* y) {
  for (; row + Rows <= shape.rows; row += Rows) tile<Bits, Rows>(shape, x, block, row, codes, scales, offsets, y);
  if constexpr (Rows > 1) {
    if (row < shape.rows) rows_of<Bits, Rows / 2>(shape, x, block, row, codes, scales, offsets, y);
  }
}

// Calls `call` with the bits of a code as a constant.
template <typename Call>
void with_bits(int64_t bits, Call call) {
  switch (bits) {
    case 2: return call(std::integral_constant<int, 2>());
    case 3: return call(std::integral_constant<int, 3>());
    case 4: return call(std::integral_constant<int, 4>());
    default: return call(std::integral_constant<int, 8>());
  }
}

// A weight, where its product goes, and the inputs as its groups want them.
template <typename Inputs, typename T>
struct Product {
  Shape shape;
  int64_t bits;
  const uint32_t* codes;
  const T *scales, *offsets;
  T* y;
  const Inputs* x;

  int64_t parts() const { return (shape.blocks + Inputs::blocks - 1) / Inputs::blocks; }

  void part(int64_t index) const {
    with_bits(bits, [&](auto known) {
      constexpr int Bits = known;
      if constexpr (Inputs::blocks == 1)
        rows_of<Bits, kMostRows>(shape, *x, index, 0, codes, scales, offsets, y);
      else
        x->template multiply<Bits>(shape, index * Inputs::blocks, codes, scales, offsets, y);
    });
  }

#ifdef SLIMBENCH_TILES
  // The same of very many rows `of`, to `result`: by the library, some outputs at a time.
  void by_library(const at::Tensor& of, const at::Tensor& result) const {
    const at::NoGradGuard no_gradients;  // as of the products of our own
    const int64_t many = std::max<int64_t>(1, (shape.inputs * shape.outputs + kWeightsForLibrary - 1) / kWeightsForLibrary);
    const int64_t some = (shape.blocks + many - 1) / many;
    const at::Tensor expanded = uninitialized({some * kLanes, shape.inputs}, at::kBFloat16);
    auto* const to = reinterpret_cast<uint16_t*>(expanded.mutable_data_ptr());
    for (int64_t first = 0; first < shape.blocks; first += some) {
      at::parallel_for(0, std::min(some, shape.blocks - first), 1, [&](int64_t begin, int64_t end) {
        const at::Tensor room = uninitialized({shape.group * kLanes}, at::kBFloat16);
        auto* const tiles = reinterpret_cast<uint16_t*>(room.mutable_data_ptr());
        with_bits(bits, [&](auto known) {
          for (int64_t b = begin; b < end; ++b)
            Tiles::expand_rows<known>(shape, first + b, codes, scales, offsets, tiles, to + b * kLanes * shape.inputs);
        });
      });
      const int64_t begin = first * kLanes, count = std::min(some * kLanes, shape.outputs - begin);
      at::Tensor out = result.narrow(1, begin, count);
      at::mm_out(out, of, expanded.narrow(0, 0, count).t());
    }
  }
#endif
};

// All products of the same inputs in one parallel region, so that small weights keep all threads busy.
template <typename Inputs, typename T>
void multiply(const T* x, std::vector<Product<Inputs, T>>& products) {
  std::map<int64_t, Inputs> prepared;
  std::vector<int64_t> ends;
  for (auto& product : products) {
    product.x = &prepared.try_emplace(product.shape.group, product.shape, x).first->second;
    ends.push_back((ends.empty() ? 0 : ends.back()) + product.parts());
  }
  at::parallel_for(0, ends.empty() ? 0 : ends.back(), 1, [&](int64_t begin, int64_t end) {
    if constexpr (Inputs::blocks > 1) Inputs::begin();
    size_t which = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t part = begin; part < end; ++part) {
      while (part >= ends[which]) ++which;
      products[which].part(part - (ends[which] - products[which].parts()));
    }
    if constexpr (Inputs::blocks > 1) Inputs::end();
  });
}

Shape shape_of(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& offsets, int64_t bits,
               int64_t outputs) {
  TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, not ", bits);
  TORCH_CHECK(x.dim() == 2 && codes.dim() == 4 && scales.dim() == 3, "expected x [rows, inputs], codes of 4 and scales of 3 dimensions");
  TORCH_CHECK(x.is_contiguous() && codes.is_contiguous() && scales.is_contiguous(), "tensors must be contiguous");
  TORCH_CHECK(codes.scalar_type() == at::kInt && scales.scalar_type() == x.scalar_type(), "codes are int32, scales of the dtype of x");
  TORCH_CHECK(!offsets || (offsets->sizes() == scales.sizes() && offsets->scalar_type() == x.scalar_type() && offsets->is_contiguous()),
              "offsets must be like scales");
  Shape shape{x.size(0), x.size(1), outputs, codes.size(0), codes.size(1), 0, codes.size(2), scales.size(1) == 1 ? 0 : 1};
  shape.group = shape.words * 32 / bits;
  TORCH_CHECK(shape.group % 32 == 0 && shape.group * shape.groups == shape.inputs, "codes do not fit ", shape.inputs, " inputs");
  TORCH_CHECK(codes.size(3) == kLanes && (outputs + kLanes - 1) / kLanes == shape.blocks, "codes do not fit ", outputs, " outputs");
  TORCH_CHECK(scales.size(0) == shape.blocks && scales.size(2) == kLanes && (scales.size(1) == 1 || scales.size(1) == shape.groups),
              "scales do not fit codes");
  return shape;
}

template <typename Inputs, typename T>
std::vector<at::Tensor> run(const at::Tensor& x, at::TensorList codes, at::TensorList scales,
                            const c10::List<std::optional<at::Tensor>>& offsets, at::IntArrayRef bits, at::IntArrayRef outputs) {
  std::vector<at::Tensor> results;
  std::vector<Product<Inputs, T>> products;
  for (size_t i = 0; i < codes.size(); ++i) {
    const std::optional<at::Tensor> shifts = offsets.get(i);
    const Shape shape = shape_of(x, codes[i], scales[i], shifts, bits[i], outputs[i]);
    results.push_back(uninitialized({shape.rows, outputs[i]}, x.scalar_type()));
    products.push_back({shape, bits[i], data<uint32_t>(codes[i]), data<T>(scales[i]), shifts ? data<T>(*shifts) : nullptr,
                        reinterpret_cast<T*>(results.back().mutable_data_ptr()), nullptr});
  }
#ifdef SLIMBENCH_TILES
  if constexpr (std::is_same_v<Inputs, Tiles>)
    if (x.size(0) >= kRowsForLibrary) {
      for (size_t i = 0; i < products.size(); ++i) products[i].by_library(x, results[i]);
      return results;
    }
#endif
  multiply<Inputs, T>(data<T>(x), products);
  return results;
}

// x [rows, inputs] in bfloat16 or float32; for each weight codes int32 [blocks, groups, words, 16], scales and offsets
// [blocks, groups or 1, 16] of the dtype of x. Returns [rows, outputs] of the dtype of x for each.
std::vector<at::Tensor> packed_mm_shared(const at::Tensor& x, at::TensorList codes, at::TensorList scales,
                                         const c10::List<std::optional<at::Tensor>>& offsets, at::IntArrayRef bits, at::IntArrayRef outputs) {
  const size_t count = codes.size();
  TORCH_CHECK(scales.size() == count && offsets.size() == count && bits.size() == count && outputs.size() == count, "lists differ in length");
  if (x.scalar_type() == at::kFloat) return run<Portable, float>(x, codes, scales, offsets, bits, outputs);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x must be bfloat16 or float32");
#ifdef SLIMBENCH_TILES
  if (x.size(0) >= kRowsForTiles && Tiles::can_be_had()) return run<Tiles, uint16_t>(x, codes, scales, offsets, bits, outputs);
#endif
#ifdef SLIMBENCH_VNNI
  return run<Vnni, uint16_t>(x, codes, scales, offsets, bits, outputs);
#else
  return run<Portable, uint16_t>(x, codes, scales, offsets, bits, outputs);
#endif
}

at::Tensor packed_mm(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& offsets,
                     int64_t bits, int64_t outputs) {
  return packed_mm_shared(x, {codes}, {scales}, c10::List<std::optional<at::Tensor>>({offsets}), {bits}, {outputs})[0];
}

// By which instructions products of our own are computed: of many rows / of few. Of very many, where there are tiles, the library takes its own.
std::string packed_mm_instructions() {
#ifdef SLIMBENCH_TILES
  if (Tiles::can_be_had()) return Tiles::name;
#endif
#ifdef SLIMBENCH_VNNI
  return "VNNI";
#else
  return "portable";
#endif
}

}  // namespace

TORCH_LIBRARY(slimbench, library) {
  library.def("packed_mm_instructions() -> str", packed_mm_instructions);
  library.def("packed_mm(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, int bits, int outputs) -> Tensor");
  library.def("packed_mm_shared(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] offsets, int[] bits, int[] outputs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(slimbench, CPU, library) {
  library.impl("packed_mm", packed_mm);
  library.impl("packed_mm_shared", packed_mm_shared);
}
