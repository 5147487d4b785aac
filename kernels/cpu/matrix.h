// The operators of bfloat16 for processors with instructions for its products. dispatch.cpp chooses them.
#pragma once

#include "levels.h"

namespace ldmrt {

struct Linear {
  const void* x;       // (rows, inner), `stride` numbers between rows
  const void* weight;  // packed: kernels/linear.py
  const float* bias;   // (width) in the order of the packed columns, or null
  void* result;        // (rows, width), or (rows, width / 2) if gated
  std::int64_t rows, inner, width, stride;
  bool gated;          // of each panel the first 16 columns are multiplied with the GELU of the others
};

struct Convolution {
  const void* x;       // (rows, height, width, channels)
  const void* weight;  // packed: kernels/linear.py, of (out, side, side, channels)
  void* result;        // (rows, height', width', out)
  std::int64_t rows, height, width, channels, out, side, stride, padding;
};

void attention_bf16(const Attention&);  // AVX512-BF16
void attention_amx(const Attention&);
void linear_amx(const Linear&);
void convolution_amx(const Convolution&);

}  // namespace ldmrt
