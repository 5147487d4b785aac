// Attention of bfloat16 with AVX512-BF16, whose products are of pairs. See kernels/cpu/attention.h.
#include "attention.h"
#include "matrix.h"
#include "pairs.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

struct Pairs {
  using Word = std::uint32_t;
  using Weight = std::uint32_t;
  static constexpr int kNumbers = 2;  // in a word
  static constexpr bool kExact = false;

  static __m512bh lanes(const Word* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static __m512bh same(Word word) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(word)); }
  static Vector add_product(__m512bh word, __m512bh lanes, Vector sum) { return {_mm512_dpbf16_ps(sum.v, word, lanes)}; }
};

struct PairProducts : VectorProducts<Pairs>, PairPacking<2 * kLanes, 2> {
  // Two keys to a line.
  static void pack_values(const BFloat16* from, std::int64_t token, std::int64_t given, std::int64_t count, std::int64_t size,
                          Word* to) {
    const std::int64_t lines = padded(size, kLines);
    for (std::int64_t key = 0; key < count; key += 2)
      for (std::int64_t i = 0; i < lines; ++i)
        to[key / 2 * lines + i] = pair(key < given && i < size ? from[key * token + i].bits : 0,
                                       key + 1 < given && i < size ? from[(key + 1) * token + i].bits : 0);
  }
};

}  // namespace

}  // namespace LDMRT_LEVEL

void attention_bf16(const Attention& a) { Flash<PairProducts, BFloat16>(a).run(); }

}  // namespace ldmrt
