// A vector of floats, as wide as the instruction set has it, for the loops that compilers do not vectorise well by themselves.
// Other than elsewhere, a product and a sum are rounded once where the processor can do so.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "dispatch.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vector {
  __m512 v;
};
inline Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline void store(float* to, Vector a) { _mm512_storeu_ps(to, a.v); }
inline Vector all(float value) { return {_mm512_set1_ps(value)}; }
inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
// a b + c
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; b where one is NaN.
inline Vector larger(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
// a 2^n for a whole n
inline Vector scaled(Vector a, Vector n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vector rounded(Vector a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// What x is above the whole number below it, which is the one that `scaled` uses of it; 0 for an infinite x.
inline Vector above_whole(Vector x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }

// 1 / a: an estimate of 14 bits, and one step of Newton's. A division takes sixteen times as long.
inline Vector reciprocal(Vector a) {
  const Vector estimate{_mm512_rcp14_ps(a.v)};
  return estimate * (all(2.0f) - a * estimate);
}
inline Vector read(const Float32* from) { return load(&from->value); }
inline Vector read(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vector read(const Float16* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
// Store it, and give back what is stored.
inline Vector write(Float32* to, Vector a) {
  store(&to->value, a);
  return a;
}
inline Vector write(BFloat16* to, Vector a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i full = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i high = _mm512_srli_epi32(full, 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
}
inline Vector write(Float16* to, Vector a) {
  const __m256i half = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  return {_mm512_cvtph_ps(half)};
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kLanes = 8;
struct Vector {
  __m256 v;
};
inline Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
inline void store(float* to, Vector a) { _mm256_storeu_ps(to, a.v); }
inline Vector all(float value) { return {_mm256_set1_ps(value)}; }
inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vector larger(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vector scaled(Vector a, Vector n) {
  n = larger(all(-126.0f), n);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return a * Vector{_mm256_castsi256_ps(power)};
}
inline Vector rounded(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vector reciprocal(Vector a) { return all(1.0f) / a; }
inline Vector read(const Float32* from) { return load(&from->value); }
inline Vector read(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vector write(Float32* to, Vector a) {
  store(&to->value, a);
  return a;
}
inline Vector write(BFloat16* to, Vector a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i full = _mm256_blendv_epi8(near, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  const __m256i high = _mm256_srli_epi32(full, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
}

#else

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
struct Vector {
  Floats v;
};
inline Vector load(const float* from) {
  Vector a;
  std::memcpy(&a, from, sizeof a);
  return a;
}
inline void store(float* to, Vector a) { std::memcpy(to, &a, sizeof a); }
inline Vector all(float value) { return {Floats{value, value, value, value}}; }
inline Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
inline Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
inline Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
inline Vector operator/(Vector a, Vector b) { return {a.v / b.v}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
inline Vector larger(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }
inline Vector scaled(Vector a, Vector n) {
  n = larger(all(-126.0f), n);
  const Ints power = (__builtin_convertvector(n.v, Ints) + 127) << 23;
  return a * Vector{(Floats)power};
}
// Of numbers below 2^22.
inline Vector rounded(Vector a) {
  const Vector shift = all(12582912.0f);  // 1.5 * 2^23
  return (a + shift) - shift;
}
inline Vector reciprocal(Vector a) { return all(1.0f) / a; }

#endif

// What has no instruction of its own, number by number.
template <typename T>
inline Vector read(const T* from) {
  float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = from[lane].read();
  return load(values);
}
template <typename T>
inline Vector write(T* to, Vector a) {
  float values[kLanes];
  store(values, a);
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = (to[lane] = T::write(values[lane])).read();
  return load(values);
}

// 2^x for x of at most 126, within 2e-7 of it (`kExact`) or 8e-5, far below the rounding of bfloat16. Below 2^-126 it is as good as
// zero; NaN stays NaN. The polynomials are the best of their degree by relative error (Remez), between -1/2 and 1/2 or 0 and 1.
template <bool kExact>
inline Vector power_of_two(Vector x) {
#if defined(__AVX512F__)
  if constexpr (!kExact) {
    const Vector f = above_whole(x);
    Vector p = all(7.802452147006989e-2f);
    p = multiply_add(p, f, all(2.2606715559959412e-1f));
    p = multiply_add(p, f, all(6.958335638046265e-1f));
    return scaled(multiply_add(p, f, all(9.999251961708069e-1f)), x);
  }
#endif
  x = larger(all(-1000.0f), x);  // and so finite
  const Vector n = rounded(x), f = x - n;
  Vector p = all(1.3276472454890609e-3f);
  p = multiply_add(p, f, all(9.675540961325169e-3f));
  p = multiply_add(p, f, all(5.550713092088699e-2f));
  p = multiply_add(p, f, all(2.4022120237350464e-1f));
  p = multiply_add(p, f, all(6.931469440460205e-1f));
  return scaled(multiply_add(p, f, all(1.0f)), n);
}

// x / (1 + e^-x), for which e^-x is no larger than 2^125: its reciprocal is no subnormal number then.
inline Vector silu(Vector x) {
  const Vector power = all(0.0f) - larger(all(-125.0f), x * all(1.44269504088896341f));
  return x * reciprocal(all(1.0f) + power_of_two<true>(power));
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
