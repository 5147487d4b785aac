// The operators of bfloat16 for processors with instructions for its products. dispatch.cpp chooses them.
#pragma once

#include "levels.h"

namespace ldmrt {

void attention_bf16(const Attention&);  // AVX512-BF16
void attention_amx(const Attention&);

}  // namespace ldmrt
