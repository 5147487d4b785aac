// Attention in float32, whatever the storage type. kernels/attention.py defines what it computes, and has checked every argument.
#include "attention.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

template <typename T>
struct Floats32 {
  using Word = float;
  using Weight = float;
  static constexpr int kNumbers = 1;  // in a word
  static constexpr bool kExact = true;

  static Vector lanes(const float* from) { return load(from); }
  static Vector same(float word) { return all(word); }
  static Vector add_product(Vector word, Vector lanes, Vector sum) { return multiply_add(word, lanes, sum); }
};

template <typename T>
struct FloatProducts : VectorProducts<Floats32<T>> {
  using Base = VectorProducts<Floats32<T>>;
  using Base::kQueries;

  static void pack_queries(const T* from, std::int64_t token, std::int64_t queries, std::int64_t size, float* to) {
    for (std::int64_t i = 0; i < size; ++i)
      for (std::int64_t q = 0; q < kQueries; ++q) to[i * kQueries + q] = q < queries ? from[q * token + i].read() : 0.0f;
  }

  static void pack_keys(const T* from, std::int64_t token, std::int64_t given, std::int64_t count, std::int64_t size, float* to) {
    for (std::int64_t key = 0; key < count; ++key)
      for (std::int64_t i = 0; i < size; ++i) to[key * size + i] = key < given ? from[key * token + i].read() : 0.0f;
  }

  static void pack_values(const T* from, std::int64_t token, std::int64_t given, std::int64_t count, std::int64_t size,
                          float* to) {
    const std::int64_t lines = padded(size, Base::kLines);
    for (std::int64_t key = 0; key < count; ++key)
      for (std::int64_t i = 0; i < lines; ++i)
        to[key * lines + i] = key < given && i < size ? from[key * token + i].read() : 0.0f;
  }

  static Vector weights(const float* scores, std::int64_t keys, int group, Vector factor, Vector shift, float* weights) {
    Vector sum = all(0.0f);
    for (std::int64_t key = 0; key < keys; ++key) {
      const std::int64_t at = key * kQueries + group * kLanes;
      const Vector weight = power_of_two<true>(multiply_add(load(scores + at), factor, shift));
      store(weights + at, weight);
      sum = sum + weight;
    }
    return sum;
  }

  // Keys that fill up a block weigh nothing.
  static void rest(float* weights, std::int64_t given, std::int64_t count) {
    for (std::int64_t i = given * kQueries; i < count * kQueries; ++i) weights[i] = 0.0f;
  }

};

}  // namespace

void attention(const Attention& a, Element element) {
  with_type(element, [&](auto type) { Flash<FloatProducts<decltype(type)>, decltype(type)>(a).run(); });
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
