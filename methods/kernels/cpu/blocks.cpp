// A prompt, or one new token, of each sequence through all blocks of a decoder of packed weights, in one call: with RMS norms, rotary
// positions, grouped heads and a gated MLP, as transformers' Llama has them.
//
//     h = x + o(attention(rotary(q n), rotary(k n), v n)), n = norm(x);   y = h + down(silu(gate m) · up m), m = norm(h)
//
// Products are those of `packed_mm.cpp`. What lies between them is too little to be worth a launch from Python each: it is computed in
// float32 and rounded to bfloat16 where transformers stores it (rotary positions once, not each product). Softmax and its sums stay in
// float32. The queries of a prompt attend by `prompt_attention.h`, with AMX and without AVX-512 by torch's own operator.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "lanes.h"

#if defined(__AVX512F__) && !defined(__AMX_BF16__)  // whose tiles torch's operator uses
#include "prompt_attention.h"
#define SLIMBENCH_PROMPT_ATTENTION
#endif

namespace {

typedef c10::List<std::optional<at::Tensor>> Optionals;

constexpr int kTogether = 4;  // vectors of a head whose sums stay in registers
constexpr int64_t kRowsOfThread = 16;  // tokens at least for which another thread is worth its waking

enum Weight { kQuery, kKey, kValue, kOut, kGate, kUp, kDown, kWeights };

float sum_of(Floats lanes) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eights[2];
  std::memcpy(eights, &lanes, sizeof lanes);
  eights[0] += eights[1];
  Four fours[2];
  std::memcpy(fours, eights, sizeof fours);
  fours[0] += fours[1];
  return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// Rounds to the nearest, ties to even; no NaN among them.
void store_lanes(uint16_t* to, Floats lanes) {
  const Words bits = (Words)lanes;
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const Halves halves = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

Floats rounded(Floats lanes) {
  const Words bits = (Words)lanes;
  return (Floats)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

uint16_t* out(at::Tensor& tensor) { return reinterpret_cast<uint16_t*>(tensor.mutable_data_ptr()); }

// Adds to x [rows, width], and returns the norm of the sum: x / rms(x) · weight.
at::Tensor added_and_normed(at::Tensor& x, const at::Tensor* more, const at::Tensor& weight, double epsilon) {
  RECORD_FUNCTION("slimbench::add_rms_norm", {});
  at::Tensor y = uninitialized(x.sizes(), x.scalar_type());
  const int64_t width = x.size(1);
  const uint16_t* w = data<uint16_t>(weight);
  uint16_t *sums = out(x), *result = out(y);
  at::parallel_for(0, x.size(0), kRowsOfThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint16_t *sum = sums + row * width, *to = result + row * width;
      if (more) {
        const uint16_t* from = data<uint16_t>(*more) + row * width;
        for (int64_t i = 0; i < width; i += kLanes) store_lanes(sum + i, load_lanes(sum + i) + load_lanes(from + i));
      }
      Floats squares{};
      for (int64_t i = 0; i < width; i += kLanes) squares += load_lanes(sum + i) * load_lanes(sum + i);
      const float scale = 1 / std::sqrt(sum_of(squares) / float(width) + float(epsilon));
      for (int64_t i = 0; i < width; i += kLanes) store_lanes(to + i, rounded(load_lanes(sum + i) * scale) * load_lanes(w + i));
    }
  });
  return y;
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up) {
  RECORD_FUNCTION("slimbench::silu_mul", {});
  at::Tensor y = uninitialized(gate.sizes(), gate.scalar_type());
  const uint16_t *g = data<uint16_t>(gate), *u = data<uint16_t>(up);
  uint16_t* to = out(y);
  at::parallel_for(0, gate.size(0), kRowsOfThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * gate.size(1); i < end * gate.size(1); i += kLanes) {
      const Floats x = load_lanes(g + i);
      store_lanes(to + i, rounded(x / (1.f + exponential(-x))) * load_lanes(u + i));
    }
  });
  return y;
}

// A head turned by the angles of its position: its halves are the two coordinates.
void rotate(const uint16_t* from, const uint16_t* cos, const uint16_t* sin, int64_t width, uint16_t* to) {
  const int64_t half = width / 2;
  if (half % kLanes == 0) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const Floats one = load_lanes(from + i), other = load_lanes(from + half + i);
      store_lanes(to + i, one * load_lanes(cos + i) - other * load_lanes(sin + i));
      store_lanes(to + half + i, other * load_lanes(cos + half + i) + one * load_lanes(sin + half + i));
    }
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    const float other = i < half ? -to_float(from[i + half]) : to_float(from[i - half]);
    to[i] = to_bfloat16(to_float(from[i]) * to_float(cos[i]) + other * to_float(sin[i]));
  }
}

// Weights of the values: the softmax of a query's scores over the keys, but for the total, which is returned. Values are asked for, since they
// are needed next.
float weigh(const Floats* query, const uint16_t* keys, const uint16_t* values, int64_t seen, int64_t parts, float* scores) {
  for (int64_t t = 0; t < seen; ++t) {
    Floats sum{};
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t at = (t * parts + p) * kLanes;
      __builtin_prefetch(values + at);
      sum += query[p] * load_lanes(keys + at);
    }
    scores[t] = sum_of(sum);
  }
  std::fill(scores + seen, scores + seen + kLanes, -std::numeric_limits<float>::infinity());
  Floats highest = load_lanes(scores);
  for (int64_t t = kLanes; t < seen; t += kLanes) {
    const Floats here = load_lanes(scores + t);
    highest = here > highest ? here : highest;
  }
  float each[kLanes];
  std::memcpy(each, &highest, sizeof each);
  const float largest = *std::max_element(each, each + kLanes);
  Floats totals{};
  for (int64_t t = 0; t < seen; t += kLanes) {
    const Floats weights = exponential(load_lanes(scores + t) - largest);
    std::memcpy(scores + t, &weights, sizeof weights);
    totals += weights;
  }
  return sum_of(totals);
}

// The mean of values [seen, width] by their weights, from a vector on: `Parts` of them at once as long as there are so many.
template <int Parts>
void mix(const float* weights, float total, const uint16_t* values, int64_t seen, int64_t parts, int64_t part, uint16_t* to) {
  for (; part + Parts <= parts; part += Parts) {
    Floats sums[Parts] = {};
    for (int64_t t = 0; t < seen; ++t)
#pragma GCC unroll 8
      for (int p = 0; p < Parts; ++p) sums[p] += weights[t] * load_lanes(values + (t * parts + part + p) * kLanes);
    for (int p = 0; p < Parts; ++p) store_lanes(to + (part + p) * kLanes, sums[p] / total);
  }
  if constexpr (Parts > 1) mix<1>(weights, total, values, seen, parts, part, to);
}

// Keys and values [sequences, groups, room, width] get those of a token each; its queries attend to all up to it.
at::Tensor attention(const std::vector<at::Tensor>& projected, const at::Tensor& keys, const at::Tensor& values, int64_t position,
                     const uint16_t* cos, const uint16_t* sin, double scaling) {
  RECORD_FUNCTION("slimbench::attention", {});
  const at::Tensor& queries = projected[kQuery];
  const int64_t room = keys.size(2), width = keys.size(3), parts = width / kLanes, seen = position + 1;
  const int64_t groups = keys.size(0) * keys.size(1), share = queries.numel() / width / groups;  // heads of a group
  uint16_t *all_keys = const_cast<uint16_t*>(data<uint16_t>(keys)), *all_values = const_cast<uint16_t*>(data<uint16_t>(values));
  for (int64_t g = 0; g < groups; ++g) {
    rotate(data<uint16_t>(projected[kKey]) + g * width, cos, sin, width, all_keys + (g * room + position) * width);
    std::memcpy(all_values + (g * room + position) * width, data<uint16_t>(projected[kValue]) + g * width, width * sizeof *all_values);
  }
  at::Tensor y = uninitialized(queries.sizes(), queries.scalar_type());
  uint16_t* result = out(y);
  at::parallel_for(0, groups * share, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> turned(width);
    std::vector<Floats> query(parts);
    std::vector<float> scores(seen + kLanes);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t from = head / share * room * width;
      rotate(data<uint16_t>(queries) + head * width, cos, sin, width, turned.data());
      for (int64_t p = 0; p < parts; ++p) query[p] = load_lanes(turned.data() + p * kLanes) * float(scaling);
      const float total = weigh(query.data(), all_keys + from, all_values + from, seen, parts, scores.data());
      mix<kTogether>(scores.data(), total, all_values + from, seen, parts, 0, result + head * width);
    }
  });
  return y;
}

// Keys and values, which are empty, get those of the tokens of each prompt; each token's queries attend to all up to it.
at::Tensor attention_of_prompts(const std::vector<at::Tensor>& projected, const at::Tensor& keys, const at::Tensor& values, const uint16_t* cos,
                                const uint16_t* sin, double scaling) {
  RECORD_FUNCTION("slimbench::attention", {});
  const at::Tensor& queries = projected[kQuery];
  const int64_t sequences = keys.size(0), groups = keys.size(1), room = keys.size(2), width = keys.size(3);
  const int64_t tokens = queries.size(0) / sequences, heads = queries.size(1) / width;
  at::Tensor turned = uninitialized({sequences, tokens, heads, width}, queries.scalar_type());
  uint16_t *all_keys = const_cast<uint16_t*>(data<uint16_t>(keys)), *all_values = const_cast<uint16_t*>(data<uint16_t>(values));
  at::parallel_for(0, queries.size(0), kRowsOfThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t position = row % tokens;
      const uint16_t *c = cos + position * width, *s = sin + position * width;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = (row * heads + h) * width;
        rotate(data<uint16_t>(queries) + at, c, s, width, out(turned) + at);
      }
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = (row * groups + g) * width, to = ((row / tokens * groups + g) * room + position) * width;
        rotate(data<uint16_t>(projected[kKey]) + from, c, s, width, all_keys + to);
        std::memcpy(all_values + to, data<uint16_t>(projected[kValue]) + from, width * sizeof *all_values);
      }
    }
  });
#ifdef SLIMBENCH_PROMPT_ATTENTION
  at::Tensor y = uninitialized(queries.sizes(), queries.scalar_type());
  const int64_t share = heads / groups, pieces = (tokens + kQueries - 1) / kQueries;
  at::parallel_for(0, sequences * heads * pieces, 1, [&](int64_t begin, int64_t end) {
    Attending attending(tokens, width, heads * width, float(scaling));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / pieces, sequence = head / heads, from = head / share * room * width;
      const int64_t at = (sequence * tokens * heads + head % heads) * width;
      attending(i % pieces * kQueries, data<uint16_t>(turned) + at, all_keys + from, all_values + from, out(y) + at);
    }
  });
  return y;
#else
  const auto of_heads = [&](const at::Tensor& of) { return of.narrow(2, 0, tokens).repeat_interleave(heads / groups, 1); };
  const at::Tensor y = at::scaled_dot_product_attention(turned.transpose(1, 2), of_heads(keys), of_heads(values), {}, 0, true, scaling);
  return y.transpose(1, 2).reshape(queries.sizes()).contiguous();
#endif
}

// The blocks of a decoder. What stays the same is checked and kept once: to hand over a thousand tensors takes as long as several products.
class PackedBlocks : public torch::CustomClassHolder {
 public:
  // Norms of each block, before attention and before the MLP, and the last one; seven weights of each block; cos and sin [positions, width].
  PackedBlocks(std::vector<at::Tensor> norms, std::vector<at::Tensor> codes, std::vector<at::Tensor> scales, Optionals offsets,
               std::vector<int64_t> bits, std::vector<int64_t> outputs, at::Tensor cos, at::Tensor sin, double epsilon, double scaling)
      : norms_(std::move(norms)), codes_(std::move(codes)), scales_(std::move(scales)), offsets_(std::move(offsets)), bits_(std::move(bits)),
        outputs_(std::move(outputs)), cos_(std::move(cos)), sin_(std::move(sin)), epsilon_(epsilon), scaling_(scaling),
        blocks_(outputs_.size() / kWeights) {
    const size_t all = blocks_ * kWeights;
    TORCH_CHECK(blocks_ && norms_.size() == 2 * blocks_ + 1, "lists differ in length");
    TORCH_CHECK(codes_.size() == all && scales_.size() == all && offsets_.size() == all && bits_.size() == all && outputs_.size() == all,
                "lists of weights differ in length");
    for (const auto* table : {&cos_, &sin_})
      TORCH_CHECK(table->dim() == 2 && table->scalar_type() == at::kBFloat16 && table->is_contiguous(), "cos, sin must be bfloat16 [room, width]");
    TORCH_CHECK(cos_.sizes() == sin_.sizes() && cos_.size(1) % kLanes == 0, "cos and sin differ in shape, or are not of 16 n angles");
    TORCH_CHECK(width_of_blocks() % kLanes == 0, "outputs are not of 16 n numbers");
    for (const at::Tensor& norm : norms_)
      TORCH_CHECK(norm.scalar_type() == at::kBFloat16 && norm.is_contiguous() && norm.numel() == width_of_blocks(), "norms do not fit the outputs");
    for (size_t block = 0; block < blocks_; ++block) {
      const auto wide = [&](Weight which) { return outputs_[block * kWeights + which]; };
      TORCH_CHECK(wide(kKey) % cos_.size(1) == 0 && wide(kValue) == wide(kKey) && wide(kQuery) % wide(kKey) == 0, "heads differ in width");
      TORCH_CHECK(wide(kGate) == wide(kUp) && wide(kGate) % kLanes == 0, "widths do not fit");
      TORCH_CHECK(wide(kOut) == width_of_blocks() && wide(kDown) == width_of_blocks(), "widths do not fit");
    }
  }

  // x [sequences, tokens, hidden] in bfloat16, of one token each, or of prompts before which there is nothing; keys and values [sequences,
  // groups, room, width] and lengths of each block, which grow by the tokens. Returns the normed outputs of the last block for the last token
  // of each sequence.
  at::Tensor step(const at::Tensor& x, const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values,
                  const std::vector<at::Tensor>& lengths) {
    TORCH_CHECK(x.dim() == 3 && x.scalar_type() == at::kBFloat16 && x.is_contiguous() && x.numel() && x.size(2) == width_of_blocks(),
                "x must be bfloat16 [sequences, tokens, hidden]");
    TORCH_CHECK(keys.size() == blocks_ && values.size() == blocks_ && lengths.size() == blocks_, "lists differ in length");
    for (size_t block = 0; block < blocks_; ++block) check(block, x.size(0), x.size(1), keys[block], values[block], lengths[block]);
    at::Tensor hidden = x.reshape({-1, x.size(2)}).clone();
    at::Tensor normed = added_and_normed(hidden, nullptr, norms_[0], epsilon_);
    for (size_t block = 0; block < blocks_; ++block) {
      int64_t& length = *const_cast<int64_t*>(data<int64_t>(lengths[block]));
      const auto projected = times(normed, block, kQuery, 3);
      const uint16_t *c = data<uint16_t>(cos_) + length * cos_.size(1), *s = data<uint16_t>(sin_) + length * sin_.size(1);
      const at::Tensor seen = x.size(1) == 1 ? attention(projected, keys[block], values[block], length, c, s, scaling_)
                                             : attention_of_prompts(projected, keys[block], values[block], c, s, scaling_);
      const at::Tensor attended = times(seen, block, kOut, 1)[0];
      length += x.size(1);
      normed = added_and_normed(hidden, &attended, norms_[2 * block + 1], epsilon_);
      const auto wide = times(normed, block, kGate, 2);
      const at::Tensor down = times(gated(wide[0], wide[1]), block, kDown, 1)[0];
      normed = added_and_normed(hidden, &down, norms_[2 * block + 2], epsilon_);
    }
    return normed.view(x.sizes()).select(1, x.size(1) - 1).contiguous();
  }

 private:
  int64_t width_of_blocks() const { return outputs_[kDown]; }

  void check(size_t block, int64_t sequences, int64_t tokens, const at::Tensor& k, const at::Tensor& v, const at::Tensor& length) const {
    TORCH_CHECK(k.dim() == 4 && k.sizes() == v.sizes() && k.is_contiguous() && v.is_contiguous() && k.scalar_type() == at::kBFloat16 &&
                    v.scalar_type() == at::kBFloat16 && k.size(0) == sequences && k.size(3) == cos_.size(1),
                "keys and values must be bfloat16 [sequences, groups, room, width]");
    TORCH_CHECK(outputs_[block * kWeights + kKey] == k.size(1) * k.size(3), "heads do not fit the cache");
    TORCH_CHECK(length.scalar_type() == at::kLong && length.numel() == 1, "lengths must be one int64 each");
    TORCH_CHECK(tokens == 1 || !*data<int64_t>(length), "a prompt begins with an empty cache");
    TORCH_CHECK(*data<int64_t>(length) + tokens <= std::min(k.size(2), cos_.size(0)), "no room for ", tokens == 1 ? "another token" : "the prompt");
  }

  // The products of x with some weights of a block, from the first on.
  std::vector<at::Tensor> times(const at::Tensor& x, size_t block, size_t first, size_t count) const {
    typedef std::vector<at::Tensor> Shared(const at::Tensor&, at::TensorList, at::TensorList, const Optionals&, at::IntArrayRef, at::IntArrayRef);
    typedef at::Tensor Alone(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, int64_t);
    static const auto product = c10::Dispatcher::singleton().findSchemaOrThrow("slimbench::packed_mm_shared", "").typed<Shared>();
    static const auto alone = c10::Dispatcher::singleton().findSchemaOrThrow("slimbench::packed_mm", "").typed<Alone>();
    const size_t begin = block * kWeights + first;
    if (count == 1) return {alone.call(x, codes_[begin], scales_[begin], offsets_.get(begin), bits_[begin], outputs_[begin])};
    Optionals moved;
    moved.reserve(count);
    for (size_t i = begin; i < begin + count; ++i) moved.push_back(offsets_.get(i));
    return product.call(x, {&codes_[begin], count}, {&scales_[begin], count}, moved, {&bits_[begin], count}, {&outputs_[begin], count});
  }

  const std::vector<at::Tensor> norms_, codes_, scales_;
  const Optionals offsets_;
  const std::vector<int64_t> bits_, outputs_;
  const at::Tensor cos_, sin_;
  const double epsilon_, scaling_;
  const size_t blocks_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimbench, library) {
  typedef std::vector<at::Tensor> Tensors;
  typedef std::vector<int64_t> Sizes;
  library.class_<PackedBlocks>("PackedBlocks")
      .def(torch::init<Tensors, Tensors, Tensors, Optionals, Sizes, Sizes, at::Tensor, at::Tensor, double, double>())
      .def("step", &PackedBlocks::step);
}
