// Residual addition and layer norm. kernels/layer_norm.py defines what it computes, and has checked every argument.
#include "arithmetic.h"
#include "operators.h"
#include "simd.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

template <typename T>
void rows(const LayerNorm& n) {
#pragma omp parallel if (n.rows * n.width >= kParallelWork)
  {
    Buffer<float> line(n.width);
    float* const v = line.data();
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < n.rows; ++row) {
      const std::int64_t at = row * n.width;
      const T* const x = static_cast<const T*>(n.x) + at;
      T* const total = static_cast<T*>(n.total) + at;
      T* const normed = static_cast<T*>(n.normed) + at;
      #pragma omp simd
      for (std::int64_t i = 0; i < n.width; ++i) v[i] = x[i].read();
      if (n.residual != nullptr) {
        const T* const residual = static_cast<const T*>(n.residual) + at;
        #pragma omp simd
        for (std::int64_t i = 0; i < n.width; ++i) v[i] += residual[i].read();
      }
      if (n.added != nullptr)
        #pragma omp simd
        for (std::int64_t i = 0; i < n.width; ++i) v[i] += n.added[i];
      #pragma omp simd
      for (std::int64_t i = 0; i < n.width; ++i) total[i] = T::write(v[i]);
      // What is normed is the sum as it is stored.
      #pragma omp simd
      for (std::int64_t i = 0; i < n.width; ++i) v[i] = total[i].read();
      const Moments all = moments(v, n.width);
      const float centre = static_cast<float>(all.mean);
      const float scale = static_cast<float>(1.0 / std::sqrt(all.m2 / static_cast<double>(n.width) + n.eps));
      #pragma omp simd
      for (std::int64_t i = 0; i < n.width; ++i) v[i] = (v[i] - centre) * scale;
      if (n.weight != nullptr)
        #pragma omp simd
        for (std::int64_t i = 0; i < n.width; ++i) v[i] *= n.weight[i];
      if (n.bias != nullptr)
        #pragma omp simd
        for (std::int64_t i = 0; i < n.width; ++i) v[i] += n.bias[i];
      #pragma omp simd
      for (std::int64_t i = 0; i < n.width; ++i) normed[i] = T::write(v[i]);
    }
  }
}

// Rows this long have sums of at most 256 numbers in each lane of four vectors.
constexpr std::int64_t kLongest = 1024 * kLanes;
constexpr int kSums = 4;

double total_of(const Vector (&sums)[kSums]) {
  float values[kLanes];
  store(values, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  double totals[4] = {};
  for (int lane = 0; lane < kLanes; ++lane) totals[lane % 4] += values[lane];
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

// Calls `with(i, number)` for every vector of a row, `number` being which of the sums it adds to.
template <typename With>
inline __attribute__((always_inline)) void each_vector(std::int64_t width, With with) {
  std::int64_t i = 0;
  for (; i + kSums * kLanes <= width; i += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) with(i + k * kLanes, k);
  for (; i < width; i += kLanes) with(i, 0);
}

// Rows that are whole vectors.
template <typename T, bool kResidual, bool kAdded>
void whole_rows(const LayerNorm& n) {
  const double count = static_cast<double>(n.width);
#pragma omp parallel if (n.rows * n.width >= kParallelWork)
  {
    Buffer<float> line(n.width);
    float* const v = line.data();
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < n.rows; ++row) {
      const std::int64_t at = row * n.width;
      const T* const x = static_cast<const T*>(n.x) + at;
      const T* const residual = kResidual ? static_cast<const T*>(n.residual) + at : nullptr;
      T* const total = static_cast<T*>(n.total) + at;
      T* const normed = static_cast<T*>(n.normed) + at;
      Vector sums[kSums] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
      each_vector(n.width, [&](std::int64_t i, int number) {
        Vector value = read(x + i);
        if constexpr (kResidual) value = value + read(residual + i);
        if constexpr (kAdded) value = value + load(n.added + i);
        value = write(total + i, value);  // what is normed is the sum as it is stored
        store(v + i, value);
        sums[number] = sums[number] + value;
      });
      const double mean = total_of(sums) / count;
      const Vector centre = all(static_cast<float>(mean));
      Vector squares[kSums] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
      each_vector(n.width, [&](std::int64_t i, int number) {
        const Vector difference = load(v + i) - centre;
        squares[number] = multiply_add(difference, difference, squares[number]);
      });
      const double off = mean - static_cast<float>(mean);
      const double variance = total_of(squares) / count - off * off;
      const Vector unit = all(static_cast<float>(1.0 / std::sqrt(variance + n.eps)));
      for (std::int64_t i = 0; i < n.width; i += kLanes) {
        Vector y = (load(v + i) - centre) * unit;
        if (n.weight != nullptr) y = y * load(n.weight + i);
        if (n.bias != nullptr) y = y + load(n.bias + i);
        write(normed + i, y);
      }
    }
  }
}

template <typename T>
void any_rows(const LayerNorm& n) {
  if (n.width % kLanes != 0 || n.width > kLongest) return rows<T>(n);
  if (n.residual != nullptr) return n.added != nullptr ? whole_rows<T, true, true>(n) : whole_rows<T, true, false>(n);
  return n.added != nullptr ? whole_rows<T, false, true>(n) : whole_rows<T, false, false>(n);
}

}  // namespace

void layer_norm(const LayerNorm& n, Element element) {
  with_type(element, [&](auto type) { any_rows<decltype(type)>(n); });
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
