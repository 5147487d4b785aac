// What the operators share: element types and their conversions, the export macro, the threading threshold.
//
// Most files are compiled once for each instruction set, with LDMRT_LEVEL naming it. What is inline stands in a namespace of that
// name: else the linker would keep one of the copies for all, and it might be that of a set which the processor has not. For the
// same reason those files use no templates of the standard library that could be left un-inlined.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#define LDMRT_EXPORT extern "C" __attribute__((visibility("default")))

namespace ldmrt {

// The numbers that kernels/native.py gives to torch's dtypes.
enum class Element : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Fewer elements than this are not worth waking the other threads for.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 17;
// The same for operators that do more with each, as norms and activations do.
constexpr std::int64_t kParallelWork = std::int64_t{1} << 14;

inline namespace LDMRT_LEVEL {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Each storage type reads to float exactly and writes from float rounded to nearest, ties to even. NaN stays NaN.
// There are no branches, so that loops over them vectorise.

struct Float32 {
  float value;
  float read() const { return value; }
  static Float32 write(float value) { return {value}; }
};

struct BFloat16 {
  std::uint16_t bits;

  float read() const { return float_of(std::uint32_t{bits} << 16); }

  static BFloat16 write(float value) {
    const std::uint32_t full = bits_of(value);
    const std::uint32_t rounded = (full + 0x7fffu + ((full >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (full >> 16) | 0x40u;
    const bool is_nan = (full & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(is_nan ? quiet : rounded)};
  }
};

struct Float16 {
  std::uint16_t bits;

  float read() const {
    const std::uint32_t sign = std::uint32_t{bits & 0x8000u} << 16;
    const std::uint32_t magnitude = std::uint32_t{bits & 0x7fffu} << 13;
    // Exponent 31 (infinity and NaN) moves to 255; the others gain the difference of the biases, 127 - 15.
    const std::uint32_t normal = magnitude + (magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u);
    // A subnormal is its mantissa times 2^-24: given the exponent of 2^-14 and its implicit one, less that one.
    const float subnormal = float_of(magnitude + 0x38800000u) - float_of(0x38800000u);
    return float_of(sign | (magnitude < 0x00800000u ? bits_of(subnormal) : normal));
  }

  static Float16 write(float value) {
    const std::uint32_t full = bits_of(value);
    const std::uint32_t sign = (full >> 16) & 0x8000u;
    const std::uint32_t magnitude = full & 0x7fffffffu;
    // Normal results: drop 13 bits of the mantissa; a carry runs into the exponent, and beyond it to infinity.
    const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Results below 2^-14: adding 0.5 leaves multiples of 2^-24 in the mantissa, rounded by the addition itself.
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;                                   // 2^16 and more, infinity
    result = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : result;     // NaN
    return {static_cast<std::uint16_t>(sign | result)};
  }
};

// Memory for working values, on a cache line of its own.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), kLine))) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The least multiple of `unit` that is no less than `count`.
inline std::int64_t padded(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
