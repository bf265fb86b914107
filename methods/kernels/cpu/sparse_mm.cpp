// Product of inputs with a sparse weight on a CPU: y[m, o] = sum_i x[m, i] · w[o, i], where only weights that are not zero are read.
//
// Layout. Of each row, one bit a weight: input i is bit i % 8 of byte i / 8, 1 where a weight is stored. The stored weights of all rows
// stand one after the other; those of row o begin at starts[o].
//
// Few rows of inputs: a vector of stored weights is spread to its places in a register and multiplied there in float32, so that a token
// costs the bytes that are stored. Many rows: some rows of the weight are spread in memory and multiplied by torch, as a prompt is
// limited by arithmetic.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define SLIMBENCH_AVX2
#endif

namespace {

constexpr int kMostRows = 4;          // rows of inputs for which one spread in registers serves
constexpr int64_t kFewRows = 8;       // up to which weights are not spread in memory
constexpr int64_t kTileRows = 512;    // rows of the weight that are spread in memory at once
constexpr int64_t kGrain = 16;        // rows of the weight that a thread takes at least
constexpr int64_t kWord = 64;         // inputs whose bits are read at once
constexpr int64_t kAhead = 4096;      // bytes of stored weights that are asked for before they are needed

// For each byte of bits and each of its inputs, which of the stored weights is that of the input; negative where there is none.
constexpr auto kPlaces = [] {
  std::array<std::array<int8_t, 8>, 256> places{};
  for (int byte = 0; byte < 256; ++byte)
    for (int i = 0, stored = 0; i < 8; ++i) places[byte][i] = byte >> i & 1 ? int8_t(stored++) : int8_t(-128);
  return places;
}();

// Lanes: what `kStep` inputs are computed in. `spread` puts the weights that begin at `from` into the places of the bits of `mask`,
// `add` adds their products with inputs to sums, of which there are `kSums` in turn.

// Any processor.
template <typename T>
struct Portable {
  static constexpr int kStep = 8, kSums = 1;
  using Weights = std::array<float, kStep>;
  using Sums = Weights;

  static Weights spread(uint64_t mask, const T* from) {
    Weights weights;
    const auto& places = kPlaces[mask & 0xff];
    for (int i = 0; i < kStep; ++i) weights[i] = places[i] < 0 ? 0.f : get(from[places[i]]);
    return weights;
  }
  static void add(Sums& sums, const Weights& weights, const T* x) {
    for (int i = 0; i < kStep; ++i) sums[i] += weights[i] * get(x[i]);
  }
  static void store(T* to, const Weights& weights) {
    for (int i = 0; i < kStep; ++i) put(to[i], weights[i]);
  }
  static float total(const Sums& sums) {
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  }
};

template <typename T>
struct Best : Portable<T> {};

#ifdef SLIMBENCH_AVX2

__m256 eight(const float* from) { return _mm256_loadu_ps(from); }
__m256 eight(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <typename T>
struct Avx2 {
  static constexpr int kStep = 8, kSums = 2;
  using Weights = __m256;
  using Sums = __m256;

  static Weights spread(uint64_t mask, const T* from) {
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces[mask & 0xff].data())));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(eight(from), places), _mm256_setzero_ps(), _mm256_castsi256_ps(places));
  }
  static void add(Sums& sums, Weights weights, const T* x) { sums = _mm256_fmadd_ps(weights, eight(x), sums); }
  static void store(T* to, Weights weights) {
    std::array<float, kStep> lanes;
    _mm256_storeu_ps(lanes.data(), weights);
    Portable<T>::store(to, lanes);
  }
  static float total(Sums sums) {
    std::array<float, kStep> lanes;
    _mm256_storeu_ps(lanes.data(), sums);
    return Portable<T>::total(lanes);
  }
};

#ifdef __AVX512F__

// Zeros that the compiler does not know for such: it would fill a vector by the form of the instruction that zeroes the other lanes, and
// that form waits for what the register held before (seen on Zen 5, where it takes twice the time).
inline __m512i fresh() {
  __m512i zeros = _mm512_setzero_si512();
  asm("" : "+v"(zeros));
  return zeros;
}

template <>
struct Best<float> {
  static constexpr int kStep = 16, kSums = 4;
  using Weights = __m512;
  using Sums = __m512;

  static Weights spread(uint64_t mask, const float* from) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh()), __mmask16(mask), _mm512_loadu_ps(from));
  }
  static void add(Sums& sums, Weights weights, const float* x) { sums = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sums); }
  static void store(float* to, Weights weights) { _mm512_storeu_ps(to, weights); }
  static float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
};
#else
template <>
struct Best<float> : Avx2<float> {};
#endif

#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
template <>
struct Best<uint16_t> {
  static constexpr int kStep = 32, kSums = 2;
  using Weights = __m512i;
  using Sums = __m512;

  static Weights spread(uint64_t mask, const uint16_t* from) {
    return _mm512_mask_expand_epi16(fresh(), __mmask32(mask), _mm512_loadu_si512(from));
  }
  static void add(Sums& sums, Weights weights, const uint16_t* x) {
    sums = _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)_mm512_loadu_si512(x));
  }
  static void store(uint16_t* to, Weights weights) { _mm512_storeu_si512(to, weights); }
  static float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
};
#else
template <>
struct Best<uint16_t> : Avx2<uint16_t> {};
#endif

#endif

// The weight: `bytes` are those of the bits of a row, `count` all stored weights.
template <typename T>
struct Weight {
  int64_t outputs, inputs, bytes, count;
  const uint8_t* bits;
  const int32_t* starts;
  const T* values;

  // Inputs filled up to whole words.
  int64_t width() const { return (inputs + kWord - 1) / kWord * kWord; }
};

// Calls `use` with each `kStep` weights of a row, the input at which they begin, and which of its word they are.
template <typename T, typename Use>
inline void each_step(const Weight<T>& weight, int64_t row, Use use) {
  constexpr int step = Best<T>::kStep;
  const uint8_t* bits = weight.bits + row * weight.bytes;
  const T* values = weight.values + weight.starts[row];
  std::vector<T> last;
  if (weight.starts[row + 1] + step > weight.count) [[unlikely]] {  // a vector would be read behind the end
    last.assign(values, weight.values + weight.starts[row + 1]);
    last.resize(last.size() + step);
    values = last.data();
  }
  for (int64_t at = 0; at < weight.bytes; at += 8) {
    uint64_t mask = 0;
    if (at + 8 <= weight.bytes) [[likely]]
      std::memcpy(&mask, bits + at, 8);
    else
      for (int64_t i = at; i < weight.bytes; ++i) mask |= uint64_t(bits[i]) << 8 * (i - at);
    __builtin_prefetch(bits + at + kAhead / 16);
#pragma GCC unroll 8
    for (int begin = 0; begin < kWord; begin += step) {
      const T* from = values + std::popcount(mask & ((uint64_t(1) << begin) - 1));
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      use(Best<T>::spread(mask >> begin, from), 8 * at + begin, begin / step);
    }
    values += std::popcount(mask);
  }
}

// `Rows` rows of inputs, `width` apart, times one row of the weight.
template <int Rows, typename T>
void products(const Weight<T>& weight, int64_t row, const T* x, int64_t width, T* y) {
  using Lanes = Best<T>;
  typename Lanes::Sums sums[Rows][Lanes::kSums] = {};
  each_step(weight, row, [&](typename Lanes::Weights weights, int64_t input, int step) {
    for (int m = 0; m < Rows; ++m) Lanes::add(sums[m][step % Lanes::kSums], weights, x + m * width + input);
  });
  for (int m = 0; m < Rows; ++m) {
    float total = 0;
    for (const auto& part : sums[m]) total += Lanes::total(part);
    put(y[m * weight.outputs + row], total);
  }
}

// All rows of inputs, `Rows` at once as long as there are so many.
template <int Rows, typename T>
void rows_of(const Weight<T>& weight, int64_t row, const T* x, int64_t width, int64_t rows, T* y) {
  for (; rows >= Rows; rows -= Rows, x += Rows * width, y += Rows * weight.outputs) products<Rows>(weight, row, x, width, y);
  if constexpr (Rows > 1) {
    if (rows) rows_of<Rows / 2>(weight, row, x, width, rows, y);
  }
}

template <typename T>
void few(const Weight<T>& weight, const T* x, int64_t rows, T* y) {
  const int64_t width = weight.width();
  std::vector<T> filled;
  if (width > weight.inputs) {
    filled.resize(rows * width);
    for (int64_t m = 0; m < rows; ++m) std::copy_n(x + m * weight.inputs, weight.inputs, filled.data() + m * width);
    x = filled.data();
  }
  at::parallel_for(0, weight.outputs, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) rows_of<kMostRows>(weight, row, x, width, rows, y);
  });
}

template <typename T>
void many(const Weight<T>& weight, const at::Tensor& x, at::Tensor& y) {
  const at::Tensor tile = at::empty({std::min(kTileRows, weight.outputs), weight.inputs}, x.options());
  T* dense = reinterpret_cast<T*>(tile.mutable_data_ptr());
  for (int64_t first = 0; first < weight.outputs; first += kTileRows) {
    const int64_t count = std::min(kTileRows, weight.outputs - first);
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<T> whole(weight.width());
      for (int64_t row = begin; row < end; ++row) {
        each_step(weight, first + row, [&](typename Best<T>::Weights weights, int64_t input, int) { Best<T>::store(whole.data() + input, weights); });
        std::copy_n(whole.data(), weight.inputs, dense + row * weight.inputs);
      }
    });
    y.narrow(1, first, count).copy_(at::mm(x, tile.narrow(0, 0, count).t()));
  }
}

template <typename T>
at::Tensor multiply(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& starts, const at::Tensor& values) {
  const Weight<T> weight{bits.size(0), x.size(1), bits.size(1), values.numel(), bits.const_data_ptr<uint8_t>(),
                         starts.const_data_ptr<int32_t>(), reinterpret_cast<const T*>(values.const_data_ptr())};
  at::Tensor y = at::empty({x.size(0), weight.outputs}, x.options());
  if (x.size(0) > kFewRows)
    many(weight, x, y);
  else
    few(weight, reinterpret_cast<const T*>(x.const_data_ptr()), x.size(0), reinterpret_cast<T*>(y.mutable_data_ptr()));
  return y;
}

// x [rows, inputs] in bfloat16 or float32; bits uint8 [outputs, inputs / 8], starts int32 [outputs + 1], values of the dtype of x.
// Returns [rows, outputs] in that dtype. That starts fit the bits is for the caller to see to.
at::Tensor sparse_mm(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& starts, const at::Tensor& values) {
  TORCH_CHECK(x.dim() == 2 && bits.dim() == 2 && starts.dim() == 1 && values.dim() == 1,
              "expected x and bits of 2, starts and values of 1 dimension");
  TORCH_CHECK(x.is_contiguous() && bits.is_contiguous() && starts.is_contiguous() && values.is_contiguous(), "tensors must be contiguous");
  TORCH_CHECK(bits.scalar_type() == at::kByte && starts.scalar_type() == at::kInt && values.scalar_type() == x.scalar_type(),
              "bits are uint8, starts int32, values of the dtype of x");
  TORCH_CHECK(bits.size(1) == (x.size(1) + 7) / 8 && starts.size(0) == bits.size(0) + 1, "bits and starts do not fit ", x.size(1), " inputs");
  if (x.scalar_type() == at::kFloat) return multiply<float>(x, bits, starts, values);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x must be bfloat16 or float32");
  return multiply<uint16_t>(x, bits, starts, values);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimbench, library) {
  library.def("sparse_mm(Tensor x, Tensor bits, Tensor starts, Tensor values) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimbench, CPU, library) {
  library.impl("sparse_mm", sparse_mm);
}
