// What the files of one instruction set share: their functions, and the choice of the element type.
#pragma once

#include "levels.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

void group_norm(const GroupNorm&, Element);
void layer_norm(const LayerNorm&, Element);
void geglu(const Geglu&, Element);
void upsample(const Upsample&, Element);
void attention(const Attention&, Element);
void winograd(const Winograd&, std::int64_t tile);
void winograd_pack(const float* weight, float* packed, std::int64_t out, std::int64_t channels, std::int64_t tile);

template <typename Work>
void with_type(Element element, Work work) {
  switch (element) {
    case Element::kFloat32: return work(Float32{});
    case Element::kBFloat16: return work(BFloat16{});
    case Element::kFloat16: return work(Float16{});
  }
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
