// Residual addition and layer norm. kernels/layer_norm.py defines what it computes, and has checked every argument.
#include "arithmetic.h"
#include "operators.h"

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

}  // namespace

void layer_norm(const LayerNorm& n, Element element) {
  with_type(element, [&](auto type) { rows<decltype(type)>(n); });
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
