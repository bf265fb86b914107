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
// With AMX, which multiplies tiles, a prompt takes another way: codes less mid, small integers and so exact in bfloat16, go through
// torch's brgemm (oneDNN) group by group, and the sums of each group are scaled in float32. Inputs stay as they are.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <vector>

#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SLIMBENCH_VNNI
#endif
#ifdef __AMX_BF16__
#define SLIMBENCH_TILES
#endif
#if !defined(CPUBLAS_BRGEMM_BF16BF16F32) || !defined(__AVX512BF16__) || !defined(SLIMBENCH_VNNI)
#undef SLIMBENCH_TILES
#endif

namespace {

constexpr int64_t kAhead = 32 * kLanes;  // words that are asked for before they are needed
constexpr int kMostRows = 8;            // rows of inputs for which one expansion of the weights serves
constexpr int64_t kRowsForThreads = 8;  // rows of inputs from which on they are prepared by all threads
constexpr int64_t kRowsForTiles = 32;   // rows of inputs from which on tiles are worth their expansion
constexpr int64_t kRowsOfTiles = 128;   // rows of inputs whose sums are kept at once

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
      __builtin_prefetch(codes + kAhead);
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

// Products of bfloat16 by brgemm. Of each four inputs the order is 0, 2, 1, 3: so the bytes of a word come apart in pairs.
struct Tiles {
  static constexpr int64_t blocks = 4, columns = blocks * kLanes;

  std::vector<uint16_t> values;
  std::vector<float> totals;

  Tiles(const Shape& shape, const uint16_t* x) : values(shape.rows * shape.inputs), totals(shape.rows * shape.groups) {
    at::parallel_for(0, shape.rows * shape.groups, 64, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t i = g * shape.group; i < (g + 1) * shape.group; i += 4) {
          for (int64_t t = 0; t < 4; ++t) values[i + t] = x[i + (t % 2) * 2 + t / 2];
          totals[g] += (to_float(x[i]) + to_float(x[i + 1])) + (to_float(x[i + 2]) + to_float(x[i + 3]));
        }
      }
    });
  }

  // Two inputs of sixteen rows of the weight, one a half word: codes less `mid` in bfloat16.
  template <int Bits>
  static __m512i pairs(__m512i codes) {
    if constexpr (Bits == 8) {
      const auto whole = [](__m512i code) {
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128))));
      };
      const __m512i first = whole(_mm512_and_si512(codes, _mm512_set1_epi32(0xffff))), second = whole(_mm512_srli_epi32(codes, 16));
      return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    } else {
      alignas(64) static const auto numbers = [] {
        std::array<uint16_t, 32> found{};
        for (int code = 0; code < 1 << Bits; ++code) found[code] = to_bfloat16(float(code - (1 << (Bits - 1))));
        return found;
      }();
      return _mm512_permutexvar_epi16(codes, _mm512_load_si512(numbers.data()));
    }
  }

  // The weights of a block as brgemm wants them: [inputs / 2, columns, 2], of which this block has sixteen columns.
  template <int Bits>
  static void expand(const Shape& shape, const uint32_t* codes, uint16_t* to) {
    for (int64_t g = 0; g < shape.groups; ++g)
      codes = each_field<Bits>(codes, shape.group, [&](Words bytes, int64_t input, int) {
        uint16_t* at = to + (g * shape.group + input) * columns;
        const __m512i mask = _mm512_set1_epi32(0x00ff00ff);
        _mm512_storeu_si512(at, pairs<Bits>(_mm512_and_si512((__m512i)bytes, mask)));
        _mm512_storeu_si512(at + 2 * columns, pairs<Bits>(_mm512_and_si512(_mm512_srli_epi32((__m512i)bytes, 8), mask)));
      });
  }

  // Some blocks of weights, from `block` on, times all rows of inputs.
  template <int Bits, typename T>
  void multiply(const Shape& shape, int64_t block, const uint32_t* codes, const T* scales, const T* offsets, T* y) const {
    const int64_t here = std::min(blocks, shape.blocks - block);
    std::vector<uint16_t> weights(shape.inputs * columns);
    for (int64_t b = 0; b < here; ++b)
      expand<Bits>(shape, codes + (block + b) * shape.groups * shape.words * kLanes, weights.data() + b * kLanes * 2);
    std::vector<float> sums(kRowsOfTiles * columns);
    std::vector<Floats> results(kRowsOfTiles * blocks);
    for (int64_t row = 0; row < shape.rows; row += kRowsOfTiles) {
      const int64_t many = std::min(kRowsOfTiles, shape.rows - row);
      std::fill(results.begin(), results.end(), Floats{});
      for (int64_t g = 0; g < shape.groups; ++g) {
        const bool goes_on = shape.scale_stride == 0 && g > 0, is_last = shape.scale_stride || g + 1 == shape.groups;
        at::native::cpublas::brgemm(many, columns, shape.group, shape.inputs, columns, columns, goes_on,
                                    reinterpret_cast<const at::BFloat16*>(values.data() + row * shape.inputs + g * shape.group),
                                    reinterpret_cast<const at::BFloat16*>(weights.data() + g * shape.group * columns), sums.data());
        for (int64_t b = 0; b < here; ++b) {
          const int64_t step = (shape.scale_stride ? (block + b) * shape.groups + g : block + b) * kLanes;
          if (is_last) {
            const Floats scale = load_lanes(scales + step);
            for (int64_t m = 0; m < many; ++m) results[m * blocks + b] += scale * load_lanes(sums.data() + m * columns + b * kLanes);
          }
          if (offsets) {
            const Floats offset = load_lanes(offsets + step);
            for (int64_t m = 0; m < many; ++m) results[m * blocks + b] += offset * totals[(row + m) * shape.groups + g];
          }
        }
      }
      for (int64_t b = 0; b < here; ++b) {
        const int64_t begin = (block + b) * kLanes, count = std::min(kLanes, shape.outputs - begin);
        for (int64_t m = 0; m < many; ++m) store_lanes(y + (row + m) * shape.outputs + begin, results[m * blocks + b], count);
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
    switch (bits) {
      case 2: return part_of<2>(index);
      case 3: return part_of<3>(index);
      case 4: return part_of<4>(index);
      default: return part_of<8>(index);
    }
  }

  template <int Bits>
  void part_of(int64_t index) const {
    if constexpr (Inputs::blocks == 1)
      rows_of<Bits, kMostRows>(shape, *x, index, 0, codes, scales, offsets, y);
    else
      x->template multiply<Bits>(shape, index * Inputs::blocks, codes, scales, offsets, y);
  }
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
    size_t which = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t part = begin; part < end; ++part) {
      while (part >= ends[which]) ++which;
      products[which].part(part - (ends[which] - products[which].parts()));
    }
    if constexpr (Inputs::blocks > 1) at::native::cpublas::brgemm_release();
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
  if (x.size(0) >= kRowsForTiles) return run<Tiles, uint16_t>(x, codes, scales, offsets, bits, outputs);
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

// By which instructions products are computed: of many rows / of few.
std::string packed_mm_instructions() {
#ifdef SLIMBENCH_TILES
  return "tiles / VNNI";
#elif defined(SLIMBENCH_VNNI)
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
