// Pairs of bfloat16, the words that AVX512-BF16 and AMX multiply: how they are packed, and the weights of a softmax as pairs of keys.
#pragma once

#include "simd.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

inline std::uint32_t pair(std::uint16_t first, std::uint16_t second) { return first | std::uint32_t{second} << 16; }

// Tokens as lanes: to[word][lane] has two numbers of a token. What is not given is zero.
inline void pack_lanes(const BFloat16* from, std::int64_t token, std::int64_t given, int lanes, std::int64_t size,
                       std::int64_t words, std::uint32_t* to) {
  for (int lane = 0; lane < lanes; ++lane) {
    const BFloat16* const x = from + lane * token;
    for (std::int64_t word = 0; word < words; ++word)
      to[word * lanes + lane] = lane >= given || 2 * word >= size ? 0
                                : pair(x[2 * word].bits, 2 * word + 1 < size ? x[2 * word + 1].bits : 0);
  }
}

// Tokens as lines of `width` numbers, an even number. What is not given is zero.
inline void pack_lines(const BFloat16* from, std::int64_t token, std::int64_t given, std::int64_t count, std::int64_t size,
                       std::int64_t width, std::uint32_t* to) {
  for (std::int64_t line = 0; line < count; ++line) {
    char* const at = reinterpret_cast<char*>(to + line * (width / 2));
    const std::size_t bytes = line < given ? 2 * static_cast<std::size_t>(size) : 0;
    if (bytes != 0) std::memcpy(at, from + line * token, bytes);
    std::memset(at + bytes, 0, 2 * static_cast<std::size_t>(width) - bytes);
  }
}

// Two vectors as one of pairs, rounded to the nearest; a number that lies between two, upwards. For numbers that are not negative.
inline __m512i pairs(Vector first, Vector second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first.v), half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_add_epi32(_mm512_castps_si512(second.v), half));
}

// From scores[key][query] to weights[pair of keys][query]; gives their sums.
template <int kQueries>
inline Vector pair_weights(const float* scores, std::int64_t keys, int group, Vector factor, Vector shift, std::uint32_t* weights) {
  Vector sum = all(0.0f), other = all(0.0f);
  scores += group * kLanes;
  weights += group * kLanes;
  const auto weight = [&](std::int64_t key) {
    return power_of_two<false>(multiply_add(load(scores + key * kQueries), factor, shift));
  };
  std::int64_t key = 0;
  for (; key + 2 <= keys; key += 2) {
    const Vector first = weight(key), second = weight(key + 1);
    sum = sum + first;
    other = other + second;
    _mm512_storeu_si512(weights + key / 2 * kQueries, pairs(first, second));
  }
  if (key < keys) {
    const Vector last = weight(key);
    sum = sum + last;
    _mm512_storeu_si512(weights + key / 2 * kQueries, pairs(last, all(0.0f)));
  }
  return sum + other;
}

// What the products of pairs share, of units of `kQueries` queries: how queries and keys are packed, padded to whole runs of `kTerms` numbers,
// and the weights.
template <int kQueries, int kTerms>
struct PairPacking {
  static void pack_queries(const BFloat16* from, std::int64_t token, std::int64_t queries, std::int64_t size, std::uint32_t* to) {
    pack_lanes(from, token, queries, kQueries, size, padded(size, kTerms) / 2, to);
  }

  static void pack_keys(const BFloat16* from, std::int64_t token, std::int64_t given, std::int64_t count, std::int64_t size,
                        std::uint32_t* to) {
    pack_lines(from, token, given, count, size, padded(size, kTerms), to);
  }

  static Vector weights(const float* scores, std::int64_t keys, int group, Vector factor, Vector shift, std::uint32_t* weights) {
    return pair_weights<kQueries>(scores, keys, group, factor, shift, weights);
  }

  // Keys that fill up a block weigh nothing.
  static void rest(std::uint32_t* weights, std::int64_t given, std::int64_t count) {
    for (std::int64_t i = padded(given, 2) / 2 * kQueries; i < count / 2 * kQueries; ++i) weights[i] = 0;
  }
};

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
