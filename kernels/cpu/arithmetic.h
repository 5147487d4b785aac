// Functions of a float without branches, so that loops over them vectorise; and sums in several strands, which strict
// floating point allows where one strand could not be cut up.
#pragma once

#include <cmath>
#include <cstdint>

#include "dispatch.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

// One of two numbers, by bits. A conditional would be made a branch, and what follows computed for both of its ways at once: a
// quotient by e^88, say, for every element, and numbers that small take a processor a hundred times as long.
inline float select(bool first, float a, float b) {
  const std::uint32_t mask = first ? 0xffffffffu : 0u;
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

// e^x within 2 units in the last place: 2^n times a polynomial of the rest, which lies within half of ln 2 (Cody and Waite 1980,
// "Software Manual for the Elementary Functions"). Beyond the range of float it is the largest or smallest power; NaN stays NaN.
inline float exponential(float x) {
  x = select(x < -87.0f, -87.0f, x);  // comparisons, so that NaN passes
  x = select(x > 88.0f, 88.0f, x);
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer in its lowest bits
  const float n = shifted - 12582912.0f;
  const float rest = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  float p = 1.0f / 720.0f;
  p = p * rest + 1.0f / 120.0f;
  p = p * rest + 1.0f / 24.0f;
  p = p * rest + 1.0f / 6.0f;
  p = p * rest + 0.5f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  return p * float_of((bits_of(shifted) + 127u) << 23);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// The error function within 1.5e-7 (Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 7.1.26).
inline float error_function(float x) {
  const float magnitude = std::fabs(x);
  const float t = 1.0f / (1.0f + 0.3275911f * magnitude);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float square = magnitude * magnitude;
  const float tail = p * t * exponential(-select(square > 80.0f, 80.0f, square));  // no smaller than a normal number
  return std::copysign(1.0f - tail, x);
}

constexpr int kStrands = 16;

struct Moments {
  double mean, m2;  // m2: the sum of squared differences from the mean
};

// Of so many numbers: their mean, and from that the squares.
inline Moments moments(const float* values, std::int64_t count) {
  double sum = 0.0;
  constexpr std::int64_t kRun = 4096;  // numbers that are added up in float
  const auto strands = [&](auto term) {
    double total = 0.0;
    for (std::int64_t first = 0; first < count; first += kRun) {
      const std::int64_t end = first + kRun < count ? first + kRun : count;
      float partial[kStrands] = {};
      std::int64_t i = first;
      for (; i + kStrands <= end; i += kStrands)
        for (int k = 0; k < kStrands; ++k) partial[k] += term(values[i + k]);
      for (; i < end; ++i) partial[0] += term(values[i]);
      for (const float each : partial) total += each;
    }
    return total;
  };
  sum = strands([](float value) { return value; });
  const double mean = sum / static_cast<double>(count);
  const float centre = static_cast<float>(mean);
  const double m2 = strands([centre](float value) { return (value - centre) * (value - centre); });
  const double off = mean - centre;
  return {mean, m2 - static_cast<double>(count) * off * off};
}

// Two sets of numbers as one (Chan et al. 1983, "Algorithms for computing the sample variance").
inline void merge(Moments& into, double& into_count, const Moments& other, double other_count) {
  const double count = into_count + other_count;
  if (count == 0.0) return;
  const double change = other.mean - into.mean;
  into.m2 += other.m2 + change * change * (into_count * other_count / count);
  into.mean += change * (other_count / count);
  into_count = count;
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
