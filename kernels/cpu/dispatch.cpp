// The library as a whole: its version, and the choice among instruction sets by what the processor has.
#include "dispatch.h"

#include "levels.h"

namespace ldmrt {
namespace {

// In the order of kernels/native.py's LEVELS; a processor that has one has those before it.
enum Level : std::int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

Level highest() {
#if defined(LDMRT_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

const Operators* of(Level level) {
#if defined(LDMRT_X86)
  if (level == kAvx512) return &kAvx512Operators;
  if (level == kAvx2) return &kAvx2Operators;
#endif
  (void)level;
  return &kBaselineOperators;
}

const Operators* g_operators = of(highest());

}  // namespace
}  // namespace ldmrt

using ldmrt::Element;

// Raised whenever the signature or the meaning of an exported symbol changes; kernels/native.py holds the same number.
LDMRT_EXPORT std::int32_t ldmrt_abi_version() { return 2; }

// The highest instruction set that the processor has.
LDMRT_EXPORT std::int32_t ldmrt_highest_level() { return ldmrt::highest(); }

// Use an instruction set from now on; not while an operator runs. What the processor has not is refused with 0.
LDMRT_EXPORT std::int32_t ldmrt_use_level(std::int32_t level) {
  if (level < ldmrt::kBaseline || level > ldmrt::highest()) return 0;
  ldmrt::g_operators = ldmrt::of(static_cast<ldmrt::Level>(level));
  return 1;
}

LDMRT_EXPORT void ldmrt_group_norm(const void* x, const void* residual, const void* joined, const float* weight,
                                   const float* bias, const float* added, void* total, void* result,
                                   std::int32_t element, std::int64_t rows, std::int64_t channels, std::int64_t width,
                                   std::int64_t groups, std::int64_t spatial, std::int64_t added_stride, float eps,
                                   std::int32_t silu, std::int32_t channels_last) {
  ldmrt::g_operators->group_norm({x, residual, joined, weight, bias, added, total, result, rows, channels, width, groups,
                                  spatial, added_stride, eps, silu != 0, channels_last != 0},
                                 static_cast<Element>(element));
}

LDMRT_EXPORT void ldmrt_layer_norm(const void* x, const void* residual, const float* weight, const float* bias,
                                   const float* added, void* total, void* normed, std::int32_t element,
                                   std::int64_t rows, std::int64_t width, float eps) {
  ldmrt::g_operators->layer_norm({x, residual, weight, bias, added, total, normed, rows, width, eps},
                                 static_cast<Element>(element));
}

LDMRT_EXPORT void ldmrt_geglu(const void* x, const float* added, void* result, std::int32_t element, std::int64_t rows,
                              std::int64_t width) {
  ldmrt::g_operators->geglu({x, added, result, rows, width}, static_cast<Element>(element));
}

LDMRT_EXPORT void ldmrt_upsample(const void* x, const void* residual, const float* added, void* result,
                                 std::int32_t element, std::int64_t rows, std::int64_t height, std::int64_t width,
                                 std::int64_t channels, std::int64_t factor) {
  ldmrt::g_operators->upsample({x, residual, added, result, rows, height, width, channels, factor},
                               static_cast<Element>(element));
}
