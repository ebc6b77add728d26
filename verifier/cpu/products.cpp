// Products of few rows with a weight that never changes, on a CPU: out[m][n] = sum over k of x[m][k] * weight[n][k].
// Compiled at start (verifier/cpu/build.py) by g++ 12 or newer for a processor with vectors of 512 or 256 bits.
//
// With few rows a product costs what reading the weight from memory costs, so the weight is packed once in the order in
// which it is read: blocks of 64 outputs, of which those of one k (two k in 16 bits) lie side by side. A sum runs over k
// in one order whatever the number of rows, so that a row's result does not depend on the others.
//
// Where the processor has tiles (AMX), 16 rows of 16 bits take little longer than one.

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "calls.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int kVectors = kWide == 16 ? 4 : 2;
constexpr int kBlock = kWide * kVectors;    // outputs that are computed together
constexpr int kTogether = 6;               // rows that share what is loaded: 24 of 32 registers are sums, or 12 of 16
constexpr int kRows = 96;                  // of one turn through the weight: they stay in the cache
constexpr int64_t kPacked = 32;            // numbers of a row that are packed at a time
constexpr int kPieces = 4;                 // of the work of a thread at least, so that whoever is held up has little
constexpr int64_t kPiece = 1 << 18;        // most bytes of weight in a piece

template <typename To, typename From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector>
Vector load_as(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Each kind of number says what is packed for one step of k, and how it enters a sum.

struct Floats {
  using Number = float;
  static constexpr int kPer = 1, kTile = 1;
  using Weights = Wide;
  static Wide add(Wide sum, Weights weights, const Number* x) { return fused(weights, spread(x[0]), sum); }
  static void write(Number* to, Wide sum) { std::memcpy(to, &sum, sizeof sum); }
};

struct Halved {
  using Number = uint16_t;
  static constexpr int kPer = 2, kTile = 16;
  using Weights = Bits;
  static Wide add(Wide sum, Weights weights, const Number* x) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
#ifdef __AVX512BF16__
    return as<Wide>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(weights), as<__m512bh>(_mm512_set1_epi32(pair))));
#else
    sum = fused(as<Wide>(weights << 16), spread(as<float>(pair << 16)), sum);
    return fused(as<Wide>(weights & 0xffff0000u), spread(as<float>(pair & 0xffff0000u)), sum);
#endif
  }
  // Rounded to nearest, ties to even. What is no number stays none: its lower half, which comes from x, is empty.
  static void write(Number* to, Wide sum) {
    const Bits bits = as<Bits>(sum);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#ifdef __AVX512F__
    const __m256i narrow = _mm512_cvtepi32_epi16(as<__m512i>(rounded));
    std::memcpy(to, &narrow, sizeof narrow);
#else
    for (int lane = 0; lane < kWide; lane++) to[lane] = static_cast<Number>(rounded[lane]);
#endif
  }
};

// Steps of k in a packed weight: whole tiles, whether or not this processor has them.
template <typename Kind>
int64_t steps_of(int64_t width) {
  constexpr int64_t kNumbers = Kind::kPer * Kind::kTile;
  return (width + kNumbers - 1) / kNumbers * Kind::kTile;
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
      weights[part] = load_as<typename Kind::Weights>(at + part * kWide * kPer);
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
    for (int part = 0; part < kVectors; part++) Kind::write(whole_row + part * kWide, sums[row][part]);
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

#ifdef __AMX_BF16__

constexpr int kTileRows = 16, kTileWidth = Halved::kPer * Halved::kTile;
static_assert(kBlock == 4 * 16, "four tiles of sums lie side by side");

// Whether the system lets this process use tiles: it wants to be asked.
bool has_tiles() {
  constexpr long kAskForFeature = 0x1023, kTileData = 18;
  static const bool is_given = syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
  return is_given;
}

// The compiler does not know that tiles read memory, and would leave out what is written there for nobody else.
inline void is_read(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// The tiles of this thread. Owns them while it lives.
class Tiles {
 public:
  explicit Tiles(int rows) {
    Shapes shapes;
    for (int tile = 0; tile < 7; tile++) {
      shapes.bytes[tile] = 64;
      shapes.rows[tile] = tile == 5 || tile == 6 ? Halved::kTile : rows;  // the weights; else sums and x
    }
    is_read(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

 private:
  struct Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// `count` rows, as many as the tiles have, with one block.
void tiles_of(const uint16_t* weight, const uint16_t* x, const Sizes& sizes, uint16_t* out, int num_outputs,
              int count) {
  constexpr int64_t kStride = kBlock * Halved::kPer * sizeof(uint16_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto step = [](const uint16_t* at, const uint16_t* rows, int64_t stride) {
    _tile_loadd(4, rows, stride * sizeof(uint16_t));
    _tile_loadd(5, at, kStride);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, at + kTileWidth, kStride);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, at + 2 * kTileWidth, kStride);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, at + 3 * kTileWidth, kStride);
    _tile_dpbf16ps(3, 4, 6);
  };
  const int64_t whole = sizes.width / kTileWidth * kTileWidth;
  for (int64_t k = 0; k < whole; k += kTileWidth) step(weight + k * kBlock, x + k, sizes.stride);
  if (whole < sizes.width) {
    uint16_t tails[kTileRows][kTileWidth] = {};
    for (int row = 0; row < count; row++)
      std::memcpy(tails[row], x + row * sizes.stride + whole, (sizes.width - whole) * sizeof(uint16_t));
    is_read(tails);
    step(weight + whole * kBlock, tails[0], kTileWidth);
  }
  float sums[kTileRows][kBlock];
  _tile_stored(0, sums[0], sizeof sums[0]);
  _tile_stored(1, sums[0] + 16, sizeof sums[0]);
  _tile_stored(2, sums[0] + 32, sizeof sums[0]);
  _tile_stored(3, sums[0] + 48, sizeof sums[0]);
  for (int row = 0; row < count; row++) {
    uint16_t whole_row[kBlock];
    for (int part = 0; part < kVectors; part++) Halved::write(whole_row + part * kWide, load(sums[row] + part * kWide));
    std::memcpy(out + row * sizes.outputs, whole_row, num_outputs * sizeof whole_row[0]);
  }
}

#endif

template <typename Kind>
void multiply(const typename Kind::Number* weight, const typename Kind::Number* x, const Sizes& sizes,
              typename Kind::Number* out, int num_threads) {
  const int64_t blocks = (sizes.outputs + kBlock - 1) / kBlock;
  const int64_t size = steps_of<Kind>(sizes.width) * Kind::kPer * kBlock;
  const int64_t most = std::max<int64_t>(1, kPiece / (size * static_cast<int64_t>(sizeof(typename Kind::Number))));
  const int64_t at_once = std::clamp<int64_t>(blocks / (kPieces * num_threads), 1, most);  // blocks of a piece
  const int64_t pieces = (blocks + at_once - 1) / at_once;
  team().run(pieces * ((sizes.rows + kRows - 1) / kRows), num_threads, [&](int64_t piece) {
    const int64_t first = piece / pieces * kRows, rows = std::min<int64_t>(kRows, sizes.rows - first);
    const int64_t begin = piece % pieces * at_once, end = std::min(blocks, begin + at_once);
    const auto outputs_of = [&](int64_t block) {
      return static_cast<int>(std::min<int64_t>(kBlock, sizes.outputs - block * kBlock));
    };
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<Kind, Halved>)
      if (has_tiles()) {
        for (int64_t row = 0; row < rows; row += kTileRows) {
          const int count = static_cast<int>(std::min<int64_t>(kTileRows, rows - row));
          const Tiles tiles(count);
          for (int64_t block = begin; block < end; block++)
            tiles_of(weight + block * size, x + (first + row) * sizes.stride, sizes,
                     out + (first + row) * sizes.outputs + block * kBlock, outputs_of(block), count);
        }
        return;
      }
#endif
    for (int64_t block = begin; block < end; block++) {
      rows_of<Kind>(weight + block * size, x + first * sizes.stride, sizes,
                    out + first * sizes.outputs + block * kBlock, outputs_of(block), rows,
                    std::make_integer_sequence<int, kTogether>());
    }
  });
}

// Writes `outputs` rows of a weight into the blocks from output `first` on; what is not written stays.
template <typename Kind>
void pack(const typename Kind::Number* weight, const Sizes& sizes, int64_t across, int64_t first,
          typename Kind::Number* packed, int num_threads) {
  constexpr int64_t kPer = Kind::kPer;
  const int64_t size = steps_of<Kind>(sizes.width) * kPer * kBlock, last = first + sizes.outputs;
  team().run((last - 1) / kBlock - first / kBlock + 1, num_threads, [&](int64_t piece) {
    const int64_t block = first / kBlock + piece;
    const int64_t begin = std::max(first, block * kBlock), end = std::min(last, (block + 1) * kBlock);
    for (int64_t k_begin = 0; k_begin < sizes.width; k_begin += kPacked) {  // what is read and written stays in the cache
      const int64_t k_end = std::min(sizes.width, k_begin + kPacked);
      for (int64_t output = begin; output < end; output++) {
        const typename Kind::Number* row = weight + (output - first) * sizes.stride;
        typename Kind::Number* to = packed + block * size + output % kBlock * kPer;
        for (int64_t k = k_begin; k < k_end; k++) to[k / kPer * kBlock * kPer + k % kPer] = row[k * across];
      }
    }
  });
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

// Whether this processor multiplies bfloat16 itself.
int product_in_bfloat16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// 1 if a small product of each type is right; on a processor that cannot run this code the process ends.
int try_products() {
  constexpr int64_t kOutputs = 2 * kBlock, kWidth = 6, kTried = kTogether + 1, kNumbers = Halved::kPer * Halved::kTile;
  const Sizes weights{0, kOutputs, kWidth, kWidth}, sizes{kTried, kOutputs, kWidth, kWidth};
  float numbers[kOutputs * kWidth], packed[kOutputs * kWidth], rows[kTried * kWidth], out[kTried * kOutputs];
  uint16_t halves[kOutputs * kWidth], half_packed[kOutputs * kNumbers] = {}, half_rows[kTried * kWidth];
  uint16_t half_out[kTried * kOutputs];
  for (float& number : numbers) number = 0.5f;
  for (float& number : rows) number = 2.0f;
  for (uint16_t& number : halves) number = 0x3f00;     // 0.5
  for (uint16_t& number : half_rows) number = 0x4000;  // 2
  pack<Floats>(numbers, weights, 1, 0, packed, 1);
  multiply<Floats>(packed, rows, sizes, out, 2);
  pack<Halved>(halves, weights, 1, 0, half_packed, 1);
  multiply<Halved>(half_packed, half_rows, sizes, half_out, 2);
  for (const float number : out)
    if (number != 6.0f) return 0;
  for (const uint16_t number : half_out)
    if (number != 0x40c0) return 0;
  return 1;
}

// Outputs that lie side by side in a packed weight, and what its width is a multiple of.
int product_block() { return kBlock; }
int product_step() { return Halved::kPer * Halved::kTile; }

void pack_float32(const float* weight, const Sizes* sizes, int64_t across, int64_t first, float* packed,
                  int num_threads) {
  pack<Floats>(weight, *sizes, across, first, packed, num_threads);
}

void pack_bfloat16(const uint16_t* weight, const Sizes* sizes, int64_t across, int64_t first, uint16_t* packed,
                   int num_threads) {
  pack<Halved>(weight, *sizes, across, first, packed, num_threads);
}

void multiply_float32(const float* weight, const float* x, const Sizes* sizes, float* out, int num_threads) {
  multiply<Floats>(weight, x, *sizes, out, num_threads);
}

void multiply_bfloat16(const uint16_t* weight, const uint16_t* x, const Sizes* sizes, uint16_t* out, int num_threads) {
  multiply<Halved>(weight, x, *sizes, out, num_threads);
}
}
