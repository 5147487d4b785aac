// A sum, each of whose pixels becomes a square of them. kernels/upsample.py defines what it computes, and has checked every argument.
#include "operators.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

template <typename T>
void pixels(const Upsample& u) {
#pragma omp parallel if (u.rows * u.height * u.width * u.channels >= kParallelElements)
  {
    Buffer<float> line(u.channels);
    float* const v = line.data();
#pragma omp for schedule(static)
    for (std::int64_t y = 0; y < u.rows * u.height; ++y) {
      const std::int64_t across = u.factor * u.width * u.channels;
      T* const target = static_cast<T*>(u.result) + y * u.factor * across;
      for (std::int64_t x = 0; x < u.width; ++x) {
        const std::int64_t at = (y * u.width + x) * u.channels;
        const T* const source = static_cast<const T*>(u.x) + at;
        T* const first = target + x * u.factor * u.channels;
        #pragma omp simd
        for (std::int64_t c = 0; c < u.channels; ++c) v[c] = source[c].read();
        if (u.residual != nullptr) {
          const T* const residual = static_cast<const T*>(u.residual) + at;
          #pragma omp simd
          for (std::int64_t c = 0; c < u.channels; ++c) v[c] += residual[c].read();
        }
        if (u.added != nullptr)
          #pragma omp simd
          for (std::int64_t c = 0; c < u.channels; ++c) v[c] += u.added[c];
        #pragma omp simd
        for (std::int64_t c = 0; c < u.channels; ++c) first[c] = T::write(v[c]);
        for (std::int64_t k = 1; k < u.factor; ++k) std::memcpy(first + k * u.channels, first, sizeof(T) * u.channels);
      }
      for (std::int64_t k = 1; k < u.factor; ++k) std::memcpy(target + k * across, target, sizeof(T) * across);
    }
  }
}

}  // namespace

void upsample(const Upsample& u, Element element) {
  with_type(element, [&](auto type) { pixels<decltype(type)>(u); });
}


}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
