// The gated activation. kernels/geglu.py defines what it computes, and has checked every argument.
#include "arithmetic.h"
#include "operators.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

constexpr std::int64_t kBlock = 1024;
constexpr float kSqrtHalf = 0.70710678118654752440f;

template <typename T>
void rows(const Geglu& g) {
  const std::int64_t blocks = (g.width + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) schedule(static) if (g.rows * g.width >= kParallelWork)
  for (std::int64_t row = 0; row < g.rows; ++row) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t first = block * kBlock, count = smaller(kBlock, g.width - first);
      const T* const x = static_cast<const T*>(g.x) + row * 2 * g.width + first;
      T* const result = static_cast<T*>(g.result) + row * g.width + first;
      float value[kBlock], gate[kBlock];
      #pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) value[i] = x[i].read();
      #pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) gate[i] = x[g.width + i].read();
      if (g.added != nullptr) {
        #pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) value[i] += g.added[first + i];
        #pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) gate[i] += g.added[g.width + first + i];
      }
      for (std::int64_t i = 0; i < count; ++i) {
        const float gelu = 0.5f * gate[i] * (1.0f + error_function(gate[i] * kSqrtHalf));
        result[i] = T::write(value[i] * gelu);
      }
    }
  }
}

}  // namespace

void geglu(const Geglu& g, Element element) {
  with_type(element, [&](auto type) { rows<decltype(type)>(g); });
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
