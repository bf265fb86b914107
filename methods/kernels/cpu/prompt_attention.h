// Attention of prompts. The queries of a head lie beside each other in lanes, so that scores, softmax and sums are computed for all of them
// without a sum over lanes; keys and values are gone through some at a time, and what was summed before is scaled down where a higher score
// is found, as in FlashAttention (arXiv:2205.14135, algorithm 1). Everything is of float32 but what is read and written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "lanes.h"

namespace {

constexpr int64_t kQueries = 2 * kLanes;  // that lie beside each other
constexpr int64_t kKeys = 64;             // whose scores are kept at once
constexpr int64_t kSums = 8;              // rows of a product that stay in registers; `kKeys` and the width of a head are multiples of it

// y[m, q] += sum_k a[m · row + k · term] · b[k, q], for `rows` rows, and all queries q.
void add_product(const float* a, int64_t row, int64_t term, int64_t rows, const float* b, int64_t terms, float* y) {
  for (int64_t m = 0; m < rows; m += kSums, a += kSums * row, y += kSums * kQueries) {
    Floats sums[kSums][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kSums; ++r) {
      sums[r][0] = load_lanes(y + r * kQueries);
      sums[r][1] = load_lanes(y + r * kQueries + kLanes);
    }
    for (int64_t k = 0; k < terms; ++k) {
      const Floats one = load_lanes(b + k * kQueries), other = load_lanes(b + k * kQueries + kLanes);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kSums; ++r) {
        const float factor = a[r * row + k * term];
        sums[r][0] += factor * one;
        sums[r][1] += factor * other;
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kSums; ++r) std::memcpy(y + r * kQueries, sums[r], sizeof sums[r]);
  }
}

// Some queries of a head, from `first` on, against all keys up to each. Queries and what comes out are `stride` apart from token to token, keys
// and values [tokens, width] one behind the other.
class Attending {
 public:
  Attending(int64_t tokens, int64_t width, int64_t stride, float scaling)
      : tokens_(tokens), width_(width), stride_(stride), scaling_(scaling),
        room_(uninitialized({2 * (kQueries + kKeys) * width + kKeys * kQueries}, at::kFloat)), queries_(room_.mutable_data_ptr<float>()),
        sums_(queries_ + width * kQueries), keys_(sums_ + width * kQueries), values_(keys_ + kKeys * width), scores_(values_ + kKeys * width) {}

  void operator()(int64_t first, const uint16_t* queries, const uint16_t* keys, const uint16_t* values, uint16_t* to) {
    const int64_t many = std::min(kQueries, tokens_ - first);
    for (int64_t q = 0; q < kQueries; ++q)
      for (int64_t d = 0; d < width_; ++d)
        queries_[d * kQueries + q] = q < many ? to_float(queries[(first + q) * stride_ + d]) * scaling_ : 0;
    std::fill_n(sums_, width_ * kQueries, 0.f);
    Floats highest[2], totals[2] = {};
    for (Floats& each : highest) each = Floats{} - std::numeric_limits<float>::infinity();
    for (int64_t begin = 0; begin < first + many; begin += kKeys) {
      const int64_t here = std::min(kKeys, first + many - begin), filled = (here + kSums - 1) / kSums * kSums;
      widen(keys + begin * width_, here, filled, keys_);
      widen(values + begin * width_, here, filled, values_);
      std::fill_n(scores_, filled * kQueries, 0.f);
      add_product(keys_, width_, 1, filled, queries_, width_, scores_);
      if (begin + filled > first) hide(begin - first, filled);
      for (int64_t half = 0; half < 2; ++half) weigh(filled, half, highest[half], totals[half]);
      add_product(values_, 1, width_, width_, scores_, filled, sums_);
    }
    for (int64_t d = 0; d < width_; ++d)
      for (int64_t half = 0; half < 2; ++half) store(d, half, load_lanes(sums_ + d * kQueries + half * kLanes) / totals[half]);
    for (int64_t q = 0; q < many; ++q)
      for (int64_t d = 0; d < width_; ++d) to[(first + q) * stride_ + d] = to_bfloat16(sums_[d * kQueries + q]);
  }

 private:
  void store(int64_t row, int64_t half, Floats lanes) { std::memcpy(sums_ + row * kQueries + half * kLanes, &lanes, sizeof lanes); }

  // Rows up to `filled` that are not there are zeros.
  void widen(const uint16_t* from, int64_t rows, int64_t filled, float* to) const {
    for (int64_t i = 0; i < rows * width_; i += kLanes) {
      const Floats lanes = load_lanes(from + i);
      std::memcpy(to + i, &lanes, sizeof lanes);
    }
    std::fill(to + rows * width_, to + filled * width_, 0.f);
  }

  // Scores of keys behind a query are as low as can be; the first key is `ahead` tokens behind the first query.
  void hide(int64_t ahead, int64_t rows) {
    for (int64_t k = std::max<int64_t>(0, 1 - ahead); k < rows; ++k)
      std::fill_n(scores_ + k * kQueries, std::min(kQueries, ahead + k), -std::numeric_limits<float>::infinity());
  }

  // Scores become weights; what was summed before is scaled to the highest score so far.
  void weigh(int64_t rows, int64_t half, Floats& highest, Floats& total) {
    float* const scores = scores_ + half * kLanes;
    Floats higher = highest;
    for (int64_t k = 0; k < rows; ++k) {
      const Floats here = load_lanes(scores + k * kQueries);
      higher = here > higher ? here : higher;
    }
    const Floats factor = exponential(highest - higher);
    highest = higher;
    total *= factor;
    for (int64_t k = 0; k < rows; ++k) {
      const Floats weights = exponential(load_lanes(scores + k * kQueries) - higher);
      std::memcpy(scores + k * kQueries, &weights, sizeof weights);
      total += weights;
    }
    for (int64_t d = 0; d < width_; ++d) store(d, half, load_lanes(sums_ + d * kQueries + half * kLanes) * factor);
  }

  const int64_t tokens_, width_, stride_;
  const float scaling_;
  const at::Tensor room_;  // aligned, as a vector of the standard library is not
  float *const queries_, *const sums_, *const keys_, *const values_, *const scores_;
};

}  // namespace
