// Attention of bfloat16 with AMX. See kernels/cpu/attention.h.
#include "attention.h"
#include "matrix.h"
#include "pairs.h"
#include "tiles.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

// Keys and values are the left operand, 16 lines of 32 numbers, queries and weights the right one, 16 lines of 16 pairs.
struct TileProducts : PairPacking<kTileLines, 32> {
  using Word = std::uint32_t;
  using Weight = std::uint32_t;
  using Guard = Tiles;
  static constexpr bool kExact = false;
  static constexpr int kQueries = kTileLines;
  static constexpr int kKeys = 32, kLines = kTileLines, kBlock = 128, kUnits = 8, kScores = kBlock * kQueries;

  static std::int64_t key_words(std::int64_t size) { return padded(size, 32) / 2; }
  static std::int64_t value_words(std::int64_t keys, std::int64_t size) { return keys / 2 * padded(size, kLines); }

  // 32 keys of 16 numbers to a tile, a number to a line; the tiles of the same keys side by side.
  static void pack_values(const BFloat16* from, std::int64_t token, std::int64_t given, std::int64_t count, std::int64_t size,
                          Word* to) {
    const std::int64_t lines = padded(size, kLines);
    auto* const numbers = reinterpret_cast<std::uint16_t*>(to);
    for (std::int64_t key = 0; key < count; ++key)
      for (std::int64_t i = 0; i < lines; ++i)
        numbers[(key / 32 * lines + i) * 32 + key % 32] = key < given && i < size ? from[key * token + i].bits : 0;
  }

  static void scores(const Word* keys, std::int64_t count, const Word* queries, std::int64_t line, float* scores) {
    const std::int64_t stride = line * static_cast<std::int64_t>(sizeof(Word));
    for (std::int64_t key = 0; key < count; key += 32) {
      const Word *const upper = keys + key * line, *const lower = upper + kTileLines * line;
      _tile_zero(0);
      _tile_zero(1);
      for (std::int64_t step = 0; step < line; step += 16) {
        _tile_loadd(4, queries + step * kQueries, 64);
        _tile_loadd(5, upper + step, stride);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, lower + step, stride);
        _tile_dpbf16ps(1, 6, 4);
      }
      _tile_stored(0, scores + key * kQueries, 64);
      _tile_stored(1, scores + (key + kTileLines) * kQueries, 64);
    }
  }

  static void add(const Word* weights, std::int64_t count, const Word* values, std::int64_t lines, bool first, float* sums) {
    for (std::int64_t line = 0; line < lines; line += 2 * kTileLines) {
      float* const sum = sums + line * kQueries;
      const Word* const value = values + line * 16;
      if (line + kTileLines < lines) {
        if (first) {
          _tile_zero(0);
          _tile_zero(1);
        } else {
          _tile_loadd(0, sum, 64);
          _tile_loadd(1, sum + 256, 64);
        }
        for (std::int64_t key = 0; key < count; key += 32) {
          _tile_loadd(4, weights + key / 2 * kQueries, 64);
          _tile_loadd(5, value + key / 2 * lines, 64);
          _tile_dpbf16ps(0, 5, 4);
          _tile_loadd(6, value + key / 2 * lines + 256, 64);
          _tile_dpbf16ps(1, 6, 4);
        }
        _tile_stored(0, sum, 64);
        _tile_stored(1, sum + 256, 64);
      } else {
        if (first)
          _tile_zero(0);
        else
          _tile_loadd(0, sum, 64);
        for (std::int64_t key = 0; key < count; key += 32) {
          _tile_loadd(4, weights + key / 2 * kQueries, 64);
          _tile_loadd(5, value + key / 2 * lines, 64);
          _tile_dpbf16ps(0, 5, 4);
        }
        _tile_stored(0, sum, 64);
      }
    }
  }

};

}  // namespace

}  // namespace LDMRT_LEVEL

void attention_amx(const Attention& a) { Flash<TileProducts, BFloat16>(a).run(); }

}  // namespace ldmrt
