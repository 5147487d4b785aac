// The operators that are compiled once for each instruction set. The files that define them know their own by LDMRT_LEVEL.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace ldmrt {

// Pictures are (rows, channels, spatial) in memory, or (rows, spatial, channels) if channels are last.
struct GroupNorm {
  const void* x;         // width channels
  const void* residual;  // the same, or null
  const void* joined;    // channels - width of them, or null
  const float* weight;   // (channels), or null
  const float* bias;     // (channels), or null
  const float* added;    // what is added to x: width numbers for each row, or null
  void* total;           // where to keep what is normed, or null
  void* result;
  std::int64_t rows, channels, width, groups, spatial;
  std::int64_t added_stride;  // between rows; 0 if all share one
  float eps;
  bool silu, channels_last;
};

struct LayerNorm {
  const void* x;
  const void* residual;  // or null
  const float* weight;   // (width), or null
  const float* bias;     // (width), or null
  const float* added;    // (width), or null
  void* total;
  void* normed;
  std::int64_t rows, width;
  float eps;
};

struct Geglu {
  const void* x;       // (rows, 2 width)
  const float* added;  // (2 width), or null
  void* result;        // (rows, width)
  std::int64_t rows, width;
};

struct Upsample {
  const void* x;         // (rows, height, width, channels)
  const void* residual;  // the same, or null
  const float* added;    // (channels), or null
  void* result;          // (rows, factor height, factor width, channels)
  std::int64_t rows, height, width, channels, factor;
};

// Heads lie side by side; the numbers of one head of a token are next to each other. Strides are in elements.
struct Attention {
  const void* query;  // (rows, query_tokens, heads * size)
  const void* key;    // (rows, key_tokens, heads * size)
  const void* value;  // the same
  void* result;       // (rows, query_tokens, heads * size), contiguous
  std::int64_t rows, query_tokens, key_tokens, heads, size;
  std::int64_t query_row, query_token, key_row, key_token, value_row, value_token;
  float scale;
};

// A convolution of 3 x 3, stride 1 and padding 1.
struct Winograd {
  const float* x;       // (rows, height, width, channels)
  const float* weight;  // packed
  float* result;        // (rows, height, width, out)
  std::int64_t rows, height, width, channels, out;
};

struct Operators {
  void (*group_norm)(const GroupNorm&, Element);
  void (*layer_norm)(const LayerNorm&, Element);
  void (*geglu)(const Geglu&, Element);
  void (*upsample)(const Upsample&, Element);
  void (*attention)(const Attention&, Element);
  void (*winograd)(const Winograd&, std::int64_t tile);
  void (*winograd_pack)(const float* weight, float* packed, std::int64_t out, std::int64_t channels, std::int64_t tile);
};

// One table for each instruction set.
extern const Operators kBaselineOperators, kAvx2Operators, kAvx512Operators;

}  // namespace ldmrt
