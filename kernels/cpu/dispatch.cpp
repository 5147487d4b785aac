// The library as a whole: its version, and the choice among instruction sets by what the processor has.
#include "dispatch.h"

#include "levels.h"
#include "matrix.h"

#if defined(LDMRT_X86_MATRIX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ldmrt {
namespace {

// In the order of kernels/native.py's LEVELS; a processor that has one has those before it.
enum Level : std::int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

#if defined(LDMRT_X86_MATRIX)
// Linux lends a process the memory for tiles only if it asks (Documentation/arch/x86/xstate.rst).
bool ask_for_tiles() {
  constexpr long kAsk = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

Level highest_of_matrices() {
  std::uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & (1u << 5)) == 0) return kAvx512;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22)) != 0 && (d & (1u << 24)) != 0;
  return tiles && ask_for_tiles() ? kAmx : kAvx512Bf16;
}
#endif

Level find_highest() {
#if defined(LDMRT_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
#if defined(LDMRT_X86_MATRIX)
    return highest_of_matrices();
#else
    return kAvx512;
#endif
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

Level highest() {
  static const Level found = find_highest();
  return found;
}

const Operators* of(Level level) {
#if defined(LDMRT_X86)
  if (level >= kAvx512) return &kAvx512Operators;
  if (level == kAvx2) return &kAvx2Operators;
#endif
  (void)level;
  return &kBaselineOperators;
}

Level g_level = highest();
const Operators* g_operators = of(g_level);

}  // namespace
}  // namespace ldmrt

using ldmrt::Element;

// Raised whenever the signature or the meaning of an exported symbol changes; kernels/native.py holds the same number.
LDMRT_EXPORT std::int32_t ldmrt_abi_version() { return 4; }

// The highest instruction set that the processor has.
LDMRT_EXPORT std::int32_t ldmrt_highest_level() { return ldmrt::highest(); }

// Use an instruction set from now on; not while an operator runs. What the processor has not is refused with 0.
LDMRT_EXPORT std::int32_t ldmrt_use_level(std::int32_t level) {
  if (level < ldmrt::kBaseline || level > ldmrt::highest()) return 0;
  ldmrt::g_level = static_cast<ldmrt::Level>(level);
  ldmrt::g_operators = ldmrt::of(ldmrt::g_level);
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

LDMRT_EXPORT void ldmrt_attention(const void* query, const void* key, const void* value, void* result, std::int32_t element,
                                  std::int64_t rows, std::int64_t query_tokens, std::int64_t key_tokens, std::int64_t heads,
                                  std::int64_t size, std::int64_t query_row, std::int64_t query_token, std::int64_t key_row,
                                  std::int64_t key_token, std::int64_t value_row, std::int64_t value_token, float scale) {
  const ldmrt::Attention a{query,     key,         value,   result,    rows,      query_tokens, key_tokens, heads, size,
                           query_row, query_token, key_row, key_token, value_row, value_token,  scale};
#if defined(LDMRT_X86_MATRIX)
  if (static_cast<Element>(element) == Element::kBFloat16) {
    if (ldmrt::g_level == ldmrt::kAmx) return ldmrt::attention_amx(a);
    if (ldmrt::g_level == ldmrt::kAvx512Bf16) return ldmrt::attention_bf16(a);
  }
#endif
  ldmrt::g_operators->attention(a, static_cast<Element>(element));
}

// Weights (out, channels, 3, 3) as `ldmrt_winograd` takes them, for tiles of 2 x 2 or 4 x 4.
LDMRT_EXPORT void ldmrt_winograd_pack(const float* weight, float* packed, std::int64_t out, std::int64_t channels,
                                      std::int64_t tile) {
  ldmrt::g_operators->winograd_pack(weight, packed, out, channels, tile);
}

// Whether vectors are long enough for that to be faster than a library's convolutions.
LDMRT_EXPORT std::int32_t ldmrt_takes_winograd() { return ldmrt::g_level >= ldmrt::kAvx2; }

LDMRT_EXPORT void ldmrt_winograd(const float* x, const float* weight, float* result, std::int64_t rows, std::int64_t height,
                                 std::int64_t width, std::int64_t channels, std::int64_t out, std::int64_t tile) {
  ldmrt::g_operators->winograd({x, weight, result, rows, height, width, channels, out}, tile);
}

// From (out, inner) words of two terms to the order that matmul_amx.cpp describes: for every panel and step two tiles of 16 pairs of terms
// by 16 columns.
LDMRT_EXPORT void ldmrt_pack(const std::uint32_t* weight, std::uint32_t* packed, std::int64_t out, std::int64_t inner) {
  const std::int64_t tiles = inner / 32, words = inner / 2;
#pragma omp parallel for schedule(static) if (out * inner >= ldmrt::kParallelElements)
  for (std::int64_t column = 0; column < out / 16; ++column) {
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::uint32_t* const from = weight + column * 16 * words + tile * 16;
      std::uint32_t* const to = packed + ((column / 2 * tiles + tile) * 2 + column % 2) * 256;
      for (int pair = 0; pair < 16; ++pair)
        for (int each = 0; each < 16; ++each) to[pair * 16 + each] = from[each * words + pair];
    }
  }
}

// Whether linear layers and convolutions of packed weights can be computed now.
LDMRT_EXPORT std::int32_t ldmrt_takes_packed() { return ldmrt::g_level == ldmrt::kAmx; }

LDMRT_EXPORT void ldmrt_linear(const void* x, const void* weight, const float* bias, void* result, std::int64_t rows,
                               std::int64_t inner, std::int64_t width, std::int64_t stride, std::int32_t gated) {
#if defined(LDMRT_X86_MATRIX)
  ldmrt::linear_amx({x, weight, bias, result, rows, inner, width, stride, gated != 0});
#else
  (void)x, (void)weight, (void)bias, (void)result, (void)rows, (void)inner, (void)width, (void)stride, (void)gated;
#endif
}

LDMRT_EXPORT void ldmrt_conv2d(const void* x, const void* weight, void* result, std::int64_t rows, std::int64_t height,
                               std::int64_t width, std::int64_t channels, std::int64_t out, std::int64_t side,
                               std::int64_t stride, std::int64_t padding) {
#if defined(LDMRT_X86_MATRIX)
  ldmrt::convolution_amx({x, weight, result, rows, height, width, channels, out, side, stride, padding});
#else
  (void)x, (void)weight, (void)result, (void)rows, (void)height, (void)width, (void)channels, (void)out, (void)side;
  (void)stride, (void)padding;
#endif
}
