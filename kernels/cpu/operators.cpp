// The operators of one instruction set, for dispatch.cpp.
#include "operators.h"

namespace ldmrt {

extern const Operators LDMRT_TABLE;
const Operators LDMRT_TABLE = {group_norm, layer_norm, geglu, upsample, attention, winograd, winograd_pack};

}  // namespace ldmrt
