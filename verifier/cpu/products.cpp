// Products of few rows with a weight that never changes, on a CPU: out[m][n] = sum over k of x[m][k] * weight[n][k].
// Compiled at start (verifier/cpu/build.py) by g++ 12 or newer for a processor with vectors of 512 or 256 bits.
//
// With few rows a product costs what reading the weight from memory costs, so the weight is packed once in the order in
// which it is read: blocks of 64 outputs, of which those of one k (two k in 16 bits) lie side by side. A sum runs over k
// in one order whatever the number of rows, so that a row's result does not depend on the others.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kVectors = 4;
#else
constexpr int kLanes = 8, kVectors = 2;
#endif
constexpr int kBlock = kLanes * kVectors;  // outputs that are computed together
constexpr int kTogether = 6;               // rows that share what is loaded: 24 of 32 registers are sums, or 12 of 16
constexpr int kRows = 96;                  // of one turn through the weight: they stay in the cache
constexpr int kPieces = 4;                 // of the work of a thread, so that one which is held up leaves some to others

typedef float Wide __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WideInt __attribute__((vector_size(4 * kLanes)));

template <typename To, typename From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector>
Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Each kind of number says what is packed for one step of k, and how it enters a sum.

struct Float32 {
  using Number = float;
  static constexpr int kPer = 1;
  using Weights = Wide;
  static Wide add(Wide sum, Weights weights, const Number* x) { return sum + weights * (x[0] - Wide{}); }
  static void write(Number* to, Wide sum) { std::memcpy(to, &sum, sizeof sum); }
};

struct Bfloat16 {
  using Number = uint16_t;
  static constexpr int kPer = 2;
  using Weights = WideInt;
  static Wide add(Wide sum, Weights weights, const Number* x) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
#ifdef __AVX512BF16__
    return as<Wide>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(weights), as<__m512bh>(_mm512_set1_epi32(pair))));
#else
    sum += as<Wide>(weights << 16) * (as<float>(pair << 16) - Wide{});
    return sum + as<Wide>(weights & 0xffff0000u) * (as<float>(pair & 0xffff0000u) - Wide{});
#endif
  }
  // Rounded to nearest, ties to even. What is no number stays none: its lower half, which comes from x, is empty.
  static void write(Number* to, Wide sum) {
    const WideInt bits = as<WideInt>(sum);
    const WideInt rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#ifdef __AVX512F__
    const __m256i narrow = _mm512_cvtepi32_epi16(as<__m512i>(rounded));
    std::memcpy(to, &narrow, sizeof narrow);
#else
    for (int lane = 0; lane < kLanes; lane++) to[lane] = static_cast<Number>(rounded[lane]);
#endif
  }
};

struct Sizes {
  int64_t rows, outputs, width, stride;  // stride of the rows of x, in numbers
};

template <typename Kind>
int64_t steps_of(int64_t width) {
  return (width + Kind::kPer - 1) / Kind::kPer;
}

// `count` rows with one block. A row that is one number short of whole steps ends in `tails`.
template <typename Kind, int count>
void block_of(const typename Kind::Number* weight, const typename Kind::Number* x, const Sizes& sizes,
              typename Kind::Number* out, int num_outputs) {
  constexpr int kPer = Kind::kPer;
  Wide sums[count][kVectors] = {};
  const int64_t whole = sizes.width / kPer;
  const auto step = [&](const typename Kind::Number* at, const auto& numbers) {
    typename Kind::Weights weights[kVectors];
    for (int part = 0; part < kVectors; part++)
      weights[part] = load<typename Kind::Weights>(at + part * kLanes * kPer);
    for (int row = 0; row < count; row++)
      for (int part = 0; part < kVectors; part++)
        sums[row][part] = Kind::add(sums[row][part], weights[part], numbers(row));
  };
  for (int64_t k = 0; k < whole; k++)
    step(weight + k * kBlock * kPer, [&](int row) { return x + row * sizes.stride + k * kPer; });
  if (whole * kPer < sizes.width) {
    typename Kind::Number tails[count][kPer] = {};
    for (int row = 0; row < count; row++) tails[row][0] = x[row * sizes.stride + whole * kPer];
    step(weight + whole * kBlock * kPer, [&](int row) { return tails[row]; });
  }
  for (int row = 0; row < count; row++) {
    typename Kind::Number whole_row[kBlock];
    for (int part = 0; part < kVectors; part++) Kind::write(whole_row + part * kLanes, sums[row][part]);
    std::memcpy(out + row * sizes.outputs, whole_row, num_outputs * sizeof whole_row[0]);
  }
}

// `rows` rows with one block, in turns of at most kTogether that are as equal as they can be: a turn of one row takes
// nearly as long as one of two.
template <typename Kind, int... more>
void rows_of(const typename Kind::Number* weight, const typename Kind::Number* x, const Sizes& sizes,
             typename Kind::Number* out, int num_outputs, int64_t rows, std::integer_sequence<int, more...>) {
  constexpr decltype(&block_of<Kind, 1>) turns[] = {block_of<Kind, more + 1>...};
  for (int64_t left = (rows + kTogether - 1) / kTogether; left > 0; left--) {
    const int64_t count = (rows + left - 1) / left;
    turns[count - 1](weight, x, sizes, out, num_outputs);
    rows -= count;
    x += count * sizes.stride;
    out += count * sizes.outputs;
  }
}

template <typename Kind>
void multiply(const typename Kind::Number* weight, const typename Kind::Number* x, const Sizes& sizes,
              typename Kind::Number* out, int num_threads) {
  const int64_t blocks = (sizes.outputs + kBlock - 1) / kBlock;
  const int64_t size = steps_of<Kind>(sizes.width) * Kind::kPer * kBlock;
  const int piece = static_cast<int>(std::max<int64_t>(1, blocks / (kPieces * num_threads)));
#pragma omp parallel num_threads(num_threads)
  for (int64_t first = 0; first < sizes.rows; first += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, sizes.rows - first);
#pragma omp for schedule(dynamic, piece) nowait
    for (int64_t block = 0; block < blocks; block++) {
      const int num_outputs = static_cast<int>(std::min<int64_t>(kBlock, sizes.outputs - block * kBlock));
      rows_of<Kind>(weight + block * size, x + first * sizes.stride, sizes,
                    out + first * sizes.outputs + block * kBlock, num_outputs, rows,
                    std::make_integer_sequence<int, kTogether>());
    }
  }
}

// Writes `outputs` rows of a weight into the blocks from output `first` on; what is not written stays.
template <typename Kind>
void pack(const typename Kind::Number* weight, const Sizes& sizes, int64_t across, int64_t first,
          typename Kind::Number* packed) {
  const int64_t size = steps_of<Kind>(sizes.width) * Kind::kPer * kBlock;
#pragma omp parallel for
  for (int64_t row = 0; row < sizes.outputs; row++) {
    const int64_t output = first + row;
    typename Kind::Number* block = packed + output / kBlock * size + output % kBlock * Kind::kPer;
    for (int64_t k = 0; k < sizes.width; k++)
      block[k / Kind::kPer * kBlock * Kind::kPer + k % Kind::kPer] = weight[row * sizes.stride + k * across];
  }
}

}  // namespace

extern "C" {

// Whether products made here are worth having on this processor.
int product_is_fast() {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
  return 1;
#else
  return 0;
#endif
}

// Outputs that lie side by side in a packed weight.
int product_block() { return kBlock; }

void pack_float32(const float* weight, const Sizes* sizes, int64_t across, int64_t first, float* packed) {
  pack<Float32>(weight, *sizes, across, first, packed);
}

void pack_bfloat16(const uint16_t* weight, const Sizes* sizes, int64_t across, int64_t first, uint16_t* packed) {
  pack<Bfloat16>(weight, *sizes, across, first, packed);
}

void multiply_float32(const float* weight, const float* x, const Sizes* sizes, float* out, int num_threads) {
  multiply<Float32>(weight, x, *sizes, out, num_threads);
}

void multiply_bfloat16(const uint16_t* weight, const uint16_t* x, const Sizes* sizes, uint16_t* out, int num_threads) {
  multiply<Bfloat16>(weight, x, *sizes, out, num_threads);
}
}
