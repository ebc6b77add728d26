// What stands between the products of a decoder layer, each in one pass over its numbers: norms, gated activations,
// rotary positions. Then a whole layer, of these, the products and attention: one call in place of thirty.
// A row's numbers come in one order whatever the other rows are, so they do not depend on them.
//
// Where transformers rounds to 16 bits on the way, so does this: the numbers are those of its own code but for the order
// of the sums in a norm and the last bit of an exponential.

#include <algorithm>
#include <memory>

#include "calls.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t kAlone = 1 << 14;  // numbers from which on several threads are worth waking
constexpr int64_t kSlice = 96;       // rows whose gates are computed at a time: a long prompt would take much memory

template <typename T>
Wide rounded(Wide value) {
  T numbers[kWide];
  store(numbers, value);
  return widen(numbers);
}

template <>
Wide rounded<float>(Wide value) {
  return value;
}

// Calls `work` with each whole vector of a row of `size` numbers, and with the rest of it in vectors filled up with zeros.
template <typename T, int inputs, typename Work>
void along(int64_t size, const T* const (&from)[inputs], T* to, const Work& work) {
  Wide values[inputs];
  int64_t at = 0;
  for (; at + kWide <= size; at += kWide) {
    for (int input = 0; input < inputs; input++) values[input] = widen(from[input] + at);
    store(to + at, work(values, at));
  }
  if (at == size) return;
  T rest[inputs][kWide] = {}, out[kWide];
  for (int input = 0; input < inputs; input++) {
    std::memcpy(rest[input], from[input] + at, (size - at) * sizeof(T));
    values[input] = widen(rest[input]);
  }
  store(out, work(values, at));
  std::memcpy(to + at, out, (size - at) * sizeof(T));
}

template <typename Work>
void each_row(int64_t rows, int64_t width, int num_threads, const Work& work) {
  const int64_t at_once = std::max<int64_t>(1, kAlone / std::max<int64_t>(1, width));  // rows of a piece
  team().run((rows + at_once - 1) / at_once, num_threads, [&](int64_t piece) {
    for (int64_t row = piece * at_once; row < std::min(rows, (piece + 1) * at_once); row++) work(row);
  });
}

// out = x / root(mean(x^2) + eps) * weight. `weight` is float32 and as long as whole vectors. `is_early`: what is
// multiplied is rounded first.
template <typename T>
void norm(const T* x, const float* weight, T* out, int64_t rows, int64_t width, float eps, bool is_early,
          int num_threads) {
  each_row(rows, width, num_threads, [&](int64_t row) {
    const T* const from[1] = {x + row * width};
    Wide squares{};
    int64_t at = 0;
    for (; at + kWide <= width; at += kWide) {
      const Wide value = widen(from[0] + at);
      squares = fused(value, value, squares);
    }
    if (at < width) {
      T rest[kWide] = {};
      std::memcpy(rest, from[0] + at, (width - at) * sizeof(T));
      squares = fused(widen(rest), widen(rest), squares);
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    along(width, from, out + row * width, [&](const Wide* values, int64_t place) {
      const Wide scaled = values[0] * factor;
      return (is_early ? rounded<T>(scaled) : scaled) * load(weight + place);
    });
  });
}

Wide silu(Wide x) {
  const Wide power = exponential(x < 0.0f ? x : -x);
  return x * ((x < 0.0f ? power : Wide{} + 1.0f) / (power + 1.0f));
}

Wide gelu(Wide x) {  // by tanh
  const Wide inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  const Wide power = exponential(-2.0f * (inner < 0.0f ? -inner : inner));
  const Wide tanh = (1.0f - power) / (1.0f + power);
  return 0.5f * x * (1.0f + (inner < 0.0f ? -tanh : tanh));
}

// out = act(gate) * up. `both` [rows, 2 * width], gate first.
template <typename T>
void activate(const T* both, T* out, int64_t rows, int64_t width, int kind, int num_threads) {
  each_row(rows, width, num_threads, [&](int64_t row) {
    const T* const from[2] = {both + row * 2 * width, both + row * 2 * width + width};
    along(width, from, out + row * width, [&](const Wide* values, int64_t) {
      return rounded<T>(kind == 0 ? silu(values[0]) : gelu(values[0])) * values[1];
    });
  });
}

// out [places, heads, width] = x * cos + (-second half, first half) * sin. `cos`, `sin` [places, width].
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, T* out, const Heads& sizes, int num_threads) {
  const int64_t half = sizes.width / 2;
  each_row(sizes.places, sizes.heads * sizes.width, num_threads, [&](int64_t place) {
    const T *cosines = cos + place * sizes.width, *sines = sin + place * sizes.width;
    for (int64_t head = 0; head < sizes.heads; head++) {
      const T* from = x + place * sizes.place_stride + head * sizes.head_stride;
      T* to = out + (place * sizes.heads + head) * sizes.width;
      const auto turn = [](const Wide* values, Wide sign) {
        return rounded<T>(values[0] * values[1]) + rounded<T>(sign * values[2] * values[3]);
      };
      const T* const first[4] = {from, cosines, from + half, sines};
      const T* const second[4] = {from + half, cosines + half, from, sines + half};
      along(half, first, to, [&](const Wide* values, int64_t) { return turn(values, Wide{} - 1.0f); });
      along(half, second, to + half, [&](const Wide* values, int64_t) { return turn(values, Wide{} + 1.0f); });
    }
  });
}

// to = one + other; `stride` of the rows of other, 0 for one row that is added to all.
template <typename T>
void add(const T* one, const T* other, int64_t stride, T* to, int64_t rows, int64_t width, int num_threads) {
  each_row(rows, width, num_threads, [&](int64_t row) {
    const T* const from[2] = {one + row * width, other + row * stride};
    along(width, from, to + row * width, [](const Wide* values, int64_t) { return values[0] + values[1]; });
  });
}

void call_multiply(const float* weight, const float* x, const Sizes& sizes, float* out, int num_threads) {
  multiply_float32(weight, x, &sizes, out, num_threads);
}

void call_multiply(const Bfloat16* weight, const Bfloat16* x, const Sizes& sizes, Bfloat16* out, int num_threads) {
  multiply_bfloat16(&weight->bits, &x->bits, &sizes, &out->bits, num_threads);
}

void call_attend(float, const Step& step, const Layer& layer, const Inputs& inputs) {
  attend_float32(&step, &layer, &inputs);
}

void call_attend(Bfloat16, const Step& step, const Layer& layer, const Inputs& inputs) {
  attend_bfloat16(&step, &layer, &inputs);
}

template <typename T>
void linear(const Matrix& matrix, const T* x, T* out, int64_t rows, int num_threads) {
  const Sizes sizes{rows, matrix.outputs, matrix.width, matrix.width};
  call_multiply(static_cast<const T*>(matrix.weight), x, sizes, out, num_threads);
  if (matrix.bias != nullptr)
    add(out, static_cast<const T*>(matrix.bias), 0, out, rows, matrix.outputs, num_threads);
}

template <typename T>
void norm(const Norm& norms, const T* x, T* out, int64_t rows, int64_t width, int num_threads) {
  norm(x, norms.weight, out, rows, width, norms.eps, norms.is_early != 0, num_threads);
}

// Each head of each row in its place, where a family does so; `stride` of the rows.
template <typename T>
void norm_heads(const Norm& norms, T* x, int64_t rows, int64_t heads, int64_t width, int64_t stride, int num_threads) {
  if (norms.weight == nullptr) return;
  each_row(rows, heads * width, num_threads,
           [&](int64_t row) { norm(norms, x + row * stride, x + row * stride, heads, width, 1); });
}

// Memory for `size` numbers, the same at every call: what the system gives anew it clears first. It stays as large as the
// largest step wanted it, some 20,000 numbers a position for a model of 8 billion.
template <typename T>
T* scratch(int64_t size) {
  thread_local std::unique_ptr<T[]> memory;
  thread_local int64_t held = 0;
  if (size > held) {
    held = 0;
    memory.reset();
    memory.reset(new T[size]);
    held = size;
  }
  return memory.get();
}

// x + attention(norm(x)), and to that its own gated layer of its norm. x, out [rows, width]; cos, sin [rows, head].
template <typename T>
void decode(const Decoder& decoder, const Step& step, const T* x, const T* cos, const T* sin, T* out, int64_t rows) {
  const Layer& layer = *decoder.attention;
  const int threads = step.num_threads;
  const int64_t width = decoder.out.outputs, head = layer.k_dim, all = decoder.heads.outputs;
  const int64_t queries = layer.num_heads * head, keys = layer.num_kv_heads * head;
  const int64_t gates = decoder.gates.outputs, at_once = std::min(rows, kSlice);
  T* const memory = scratch<T>(rows * (width + all + 2 * queries + keys) + at_once * (gates + gates / 2));
  T *const normed = memory, *const joined = normed + rows * width, *const query = joined + rows * all;
  T *const key = query + rows * queries, *const attended = key + rows * keys, *const both = attended + rows * queries;
  T* const active = both + at_once * gates;

  norm(decoder.first, x, normed, rows, width, threads);
  linear(decoder.heads, normed, joined, rows, threads);
  norm_heads(decoder.query, joined, rows, layer.num_heads, head, all, threads);
  norm_heads(decoder.key, joined + queries, rows, layer.num_kv_heads, head, all, threads);
  rotate(joined, cos, sin, query, {rows, layer.num_heads, head, head, all}, threads);
  rotate(joined + queries, cos, sin, key, {rows, layer.num_kv_heads, head, head, all}, threads);
  const T* const value = joined + queries + keys;
  call_attend(T{}, step, layer, {query, key, value, head, queries, head, keys, head, all, nullptr, attended});
  linear(decoder.out, attended, normed, rows, threads);
  add(x, normed, width, out, rows, width, threads);
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row);
    T *const from = out + row * width, *const to = normed + row * width;
    norm(decoder.second, from, to, count, width, threads);
    linear(decoder.gates, to, both, count, threads);
    activate(both, active, count, gates / 2, decoder.activation, threads);
    linear(decoder.down, active, to, count, threads);
    add(from, to, width, from, count, width, threads);
  }
}

}  // namespace

extern "C" {
// out [rows, width] in float32.
void widen_bfloat16(const Bfloat16* x, float* out, int64_t rows, int64_t width, int num_threads) {
  each_row(rows, width, num_threads, [&](int64_t row) {
    const Bfloat16* from = x + row * width;
    float* to = out + row * width;
    int64_t at = 0;
    for (; at + kWide <= width; at += kWide) store(to + at, widen(from + at));
    for (; at < width; at++) {
      const uint32_t bits = static_cast<uint32_t>(from[at].bits) << 16;
      std::memcpy(to + at, &bits, sizeof bits);
    }
  });
}

#define FOR_TYPE(T, name)                                                                                            \
  void norm_##name(const T* x, const float* weight, T* out, int64_t rows, int64_t width, float eps, int is_early,    \
                   int num_threads) {                                                                                \
    norm(x, weight, out, rows, width, eps, is_early != 0, num_threads);                                              \
  }                                                                                                                  \
  void activate_##name(const T* both, T* out, int64_t rows, int64_t width, int kind, int num_threads) {              \
    activate(both, out, rows, width, kind, num_threads);                                                             \
  }                                                                                                                  \
  void rotate_##name(const T* x, const T* cos, const T* sin, T* out, const Heads* sizes, int num_threads) {          \
    rotate(x, cos, sin, out, *sizes, num_threads);                                                                   \
  }                                                                                                                  \
  void decode_##name(const Decoder* decoder, const Step* step, const T* x, const T* cos, const T* sin, T* out,       \
                     int64_t rows) {                                                                                 \
    decode(*decoder, *step, x, cos, sin, out, rows);                                                                 \
  }

FOR_TYPE(float, float32)
FOR_TYPE(Bfloat16, bfloat16)
}
