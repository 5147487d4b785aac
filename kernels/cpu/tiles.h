// The tiles of AMX: eight registers of 16 lines of 64 bytes.
#pragma once

#include <immintrin.h>

#include "dispatch.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

constexpr int kTileLines = 16;
constexpr int kTileBytes = 1024;

// All tiles whole while it lives. What another library set up, and may believe to be there still, is put back after.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    alignas(64) std::uint8_t whole[64] = {1};
    for (int tile = 0; tile < 8; ++tile) whole[16 + 2 * tile] = 64, whole[48 + tile] = kTileLines;
    _tile_loadconfig(whole);
  }
  ~Tiles() {
    if (before_[0] != 0)
      _tile_loadconfig(before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) std::uint8_t before_[64];
};

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
