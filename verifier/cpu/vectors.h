// Vectors of float32 as wide as the processor has them, and what is stored in 16 bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int kWide = 16;  // numbers in a vector
#else
constexpr int kWide = 8;
#endif

typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef int32_t WideInt __attribute__((vector_size(4 * kWide)));

inline Wide load(const float* from) {
  Wide value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Wide spread(float value) { return value - Wide{}; }  // less zero, which costs nothing, unlike plus zero

// a * b + c, rounded once. The compiler is told not to do so by itself: it would in some copies of a loop, and not in
// others, and a row's numbers would depend on how many rows run beside it.
inline Wide fused(Wide a, Wide b, Wide c) {
#if defined(__AVX512F__)
  return (Wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Wide)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int place = 0; place < kWide; place++) c[place] = __builtin_fmaf(a[place], b[place], c[place]);
  return c;
#endif
}

inline void store(float* to, Wide value) { std::memcpy(to, &value, sizeof value); }

inline float sum(Wide value) {
  float parts[kWide];
  store(parts, value);
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int place = 0; place < half; place++) parts[place] += parts[place + half];
  return parts[0];
}

// e^x to about 1 ulp for x <= 0; 0 below -87.
inline Wide exponential(Wide x) {
  const Wide magic = Wide{} + 12582912.0f;
  const Wide clamped = x < -87.0f ? Wide{} - 87.0f : x;
  const Wide shifted = fused(clamped, spread(1.44269504088896341f), magic);
  const Wide whole = shifted - magic;
  const Wide rest = fused(whole, spread(2.12194440e-4f), fused(whole, spread(-0.693359375f), clamped));
  Wide series = Wide{} + 1.9875691500e-4f;
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    series = fused(series, rest, spread(term));
  series = fused(series * rest, rest, rest) + 1.0f;
  const WideInt power = (__builtin_convertvector(whole, WideInt) + 127) << 23;
  Wide scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.0f ? Wide{} : series * scale;
}

inline float exponential(float x) { return exponential(spread(x))[0]; }

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  _Float16 value;
};

typedef uint16_t Halves __attribute__((vector_size(2 * kWide)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWide)));

inline Wide widen(const float* from) { return load(from); }
typedef _Float16 SmallFloats __attribute__((vector_size(2 * kWide)));

inline Wide widen(const Float16* from) {
  SmallFloats values;
  std::memcpy(&values, from, sizeof values);
  return __builtin_convertvector(values, Wide);
}

inline void narrow(float value, Float16& out) { out.value = static_cast<_Float16>(value); }
inline Wide widen(const Bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Wide values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

// Rounded to nearest, ties to even. What is no number stays none.
inline void store(Bfloat16* to, Wide value) {
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits kept = value == value ? rounded : (bits >> 16) | 0x40u;
  const Halves halves = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &halves, sizeof halves);
}
