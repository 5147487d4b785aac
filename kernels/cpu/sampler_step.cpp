// One step of the sampler for every slot. kernels/sampler.py defines what it computes, and has checked every argument.
#include <algorithm>

#include "dispatch.h"

namespace ldmrt {
namespace {

// The columns of a table row, as in kernels/sampler.py.
constexpr int kWidth = 32;
constexpr int kDenoisedX = 0;
constexpr int kDenoisedM = 1;
constexpr int kClip = 2;
constexpr int kNextX = 3;
constexpr int kNextSaved = 11;
constexpr int kPushed = 19;
constexpr int kPush = 27;
constexpr int kNextInputScale = 28;

// x, m, d, saved, h1, h2, h3, noise
constexpr int kBasis = 8;

// The elements of a block stay in the first-level cache while each term passes over them.
constexpr std::int64_t kBlock = 256;

struct Step {
  float* x;
  float* saved;
  float* history;
  const void* model_output;
  void* model_input;
  const float* table;
  const float* noise;  // or null
  const std::int64_t* row;
  const float* guidance_scale;
  const std::int64_t* cond_row;
  const std::int64_t* uncond_row;
  std::int64_t slots;
  std::int64_t elements;  // of one slot: C * H * W
};

// out = sum of coefficients[k] * basis[k] in the order of k. A zero coefficient leaves its term out altogether.
void combine(const float* coefficients, const float* const (&basis)[kBasis], std::int64_t count, float* out) {
  std::fill(out, out + count, 0.0f);
  for (int k = 0; k < kBasis; ++k) {
    const float coefficient = coefficients[k];
    const float* const term = basis[k];
    if (coefficient == 0.0f || term == nullptr) continue;
    for (std::int64_t i = 0; i < count; ++i) out[i] += coefficient * term[i];
  }
}

template <typename Model>
void step_block(const Step& s, std::int64_t slot, std::int64_t begin, std::int64_t count) {
  const float* const c = s.table + s.row[slot] * kWidth;
  const std::int64_t at = slot * s.elements + begin;
  const std::int64_t cond_at = s.cond_row[slot] * s.elements + begin;
  const std::int64_t uncond_at = s.uncond_row[slot] * s.elements + begin;
  const bool guided = s.uncond_row[slot] >= 0;
  const std::int64_t history_stride = s.slots * s.elements;

  float* const x = s.x + at;
  float* const saved = s.saved + at;
  float* const h1 = s.history + at;
  float* const h2 = h1 + history_stride;
  float* const h3 = h2 + history_stride;
  const auto* const output = static_cast<const Model*>(s.model_output);
  auto* const input = static_cast<Model*>(s.model_input);

  float m[kBlock];
  if (guided) {
    const float scale = s.guidance_scale[slot];
    for (std::int64_t i = 0; i < count; ++i) {
      const float uncond = output[uncond_at + i].read();
      m[i] = uncond + scale * (output[cond_at + i].read() - uncond);
    }
  } else {
    for (std::int64_t i = 0; i < count; ++i) m[i] = output[cond_at + i].read();
  }

  float d[kBlock];
  const float denoised[kBasis] = {c[kDenoisedX], c[kDenoisedM]};
  combine(denoised, {x, m, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}, count, d);
  const float clip = c[kClip];
  for (std::int64_t i = 0; i < count; ++i) {
    const float low = d[i] < -clip ? -clip : d[i];  // written so that NaN passes
    d[i] = low > clip ? clip : low;
  }

  const float* const noise = s.noise == nullptr ? nullptr : s.noise + s.row[slot] * s.elements + begin;
  const float* const basis[kBasis] = {x, m, d, saved, h1, h2, h3, noise};
  float next_x[kBlock];
  float next_saved[kBlock];
  float pushed[kBlock];
  combine(c + kNextX, basis, count, next_x);
  combine(c + kNextSaved, basis, count, next_saved);
  if (c[kPush] != 0.0f) {
    combine(c + kPushed, basis, count, pushed);
    std::copy_n(h2, count, h3);
    std::copy_n(h1, count, h2);
    std::copy_n(pushed, count, h1);
  }
  std::copy_n(next_x, count, x);
  std::copy_n(next_saved, count, saved);

  const float input_scale = c[kNextInputScale];
  for (std::int64_t i = 0; i < count; ++i) input[cond_at + i] = Model::write(next_x[i] * input_scale);
  if (guided) std::copy_n(input + cond_at, count, input + uncond_at);
}

template <typename Model>
void step_all(const Step& s) {
  const std::int64_t blocks = (s.elements + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) schedule(static) if (s.slots * s.elements >= kParallelElements)
  for (std::int64_t slot = 0; slot < s.slots; ++slot) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      if (s.cond_row[slot] < 0) continue;  // an idle slot
      const std::int64_t begin = block * kBlock;
      step_block<Model>(s, slot, begin, std::min(kBlock, s.elements - begin));
    }
  }
}

}  // namespace
}  // namespace ldmrt

LDMRT_EXPORT void ldmrt_sampler_step(float* x, float* saved, float* history, const void* model_output,
                                     void* model_input, std::int32_t model_element, const float* table,
                                     const float* noise, const std::int64_t* row, const float* guidance_scale,
                                     const std::int64_t* cond_row, const std::int64_t* uncond_row, std::int64_t slots,
                                     std::int64_t elements) {
  const ldmrt::Step step{x,   saved,          history,  model_output, model_input, table,   noise,
                         row, guidance_scale, cond_row, uncond_row,   slots,       elements};
  switch (static_cast<ldmrt::Element>(model_element)) {
    case ldmrt::Element::kFloat32: return ldmrt::step_all<ldmrt::Float32>(step);
    case ldmrt::Element::kBFloat16: return ldmrt::step_all<ldmrt::BFloat16>(step);
    case ldmrt::Element::kFloat16: return ldmrt::step_all<ldmrt::Float16>(step);
  }
}
