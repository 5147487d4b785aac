// Flash attention (Dao et al. 2023, arXiv 2307.08691) for a processor: the scores exist only block by block. Every block lies transposed,
// a key to a line and a query to a lane, so that the maxima and sums of the softmax run down the lanes and no line is ever added up
// across.
//
// What multiplies is a parameter, `Products`: of floats, of pairs of bfloat16, or of tiles. It says how queries, keys and values are
// packed for it, which is done once for each head.
#pragma once

#include "operators.h"
#include "simd.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

constexpr float kLog2E = 1.4426950408889634f;

// What turns the scores of one unit of queries (`Products::kQueries`) into weights, block by block of keys.
template <class Products>
class Softmax {
 public:
  static constexpr int kGroups = Products::kQueries / kLanes;

  void start() {
    for (int g = 0; g < kGroups; ++g) largest_[g] = all(-INFINITY), sum_[g] = all(0.0f);
  }

  // From the scores of some keys to weights, in the form that the products take. Scores times `scale` are powers of two. `sums` is
  // what was summed up of the keys before, or null: it is scaled to go with these.
  void block(const float* scores, std::int64_t keys, float scale, typename Products::Weight* weights, float* sums,
             std::int64_t lines) {
    const Vector factor = all(scale);
    for (int g = 0; g < kGroups; ++g) {
      Vector four[4] = {largest_[g], largest_[g], largest_[g], largest_[g]};
      const float* const column = scores + g * kLanes;
      std::int64_t key = 0;
      for (; key + 4 <= keys; key += 4)
        for (int k = 0; k < 4; ++k) four[k] = larger(load(column + (key + k) * Products::kQueries), four[k]);
      for (; key < keys; ++key) four[0] = larger(load(column + key * Products::kQueries), four[0]);
      const Vector largest = larger(larger(four[0], four[1]), larger(four[2], four[3]));
      const Vector shift = all(0.0f) - largest * factor;
      const Vector change = power_of_two<Products::kExact>(multiply_add(largest_[g], factor, shift));
      sum_[g] = multiply_add(sum_[g], change, Products::weights(scores, keys, g, factor, shift, weights));
      largest_[g] = largest;
      for (std::int64_t line = 0; sums != nullptr && line < lines; ++line) {
        float* const at = sums + line * Products::kQueries + g * kLanes;
        store(at, load(at) * change);
      }
    }
  }

  // The results of `queries` queries: divided by the sums of their weights, and turned the right way round.
  template <typename T>
  void finish(float* sums, std::int64_t queries, std::int64_t size, T* out, std::int64_t stride) const {
    for (int g = 0; g < kGroups; ++g) {
      const Vector share = all(1.0f) / sum_[g];
      for (std::int64_t line = 0; line < size; ++line) {
        float* const at = sums + line * Products::kQueries + g * kLanes;
        store(at, load(at) * share);
      }
    }
    for (std::int64_t query = 0; query < queries; ++query)
      for (std::int64_t line = 0; line < size; ++line)
        out[query * stride + line] = T::write(sums[line * Products::kQueries + query]);
  }

 private:
  Vector largest_[kGroups], sum_[kGroups];
};

template <class Products, typename T>
class Flash {
 public:
  explicit Flash(const Attention& a)
      : a_(a),
        line_(Products::key_words(a.size)),
        lines_(padded(a.size, Products::kLines)),
        keys_(padded(a.key_tokens, Products::kKeys)),
        key_words_(keys_ * line_),
        value_words_(Products::value_words(keys_, a.size)) {}

  void run() const {
    const std::int64_t heads = a_.rows * a_.heads, blocks = padded(keys_, Products::kBlock) / Products::kBlock;
    const std::int64_t spans = padded(a_.query_tokens, kSpan) / kSpan;
    Buffer<Word> key_buffer(heads * key_words_), value_buffer(heads * value_words_);
    Word *const keys = key_buffer.data(), *const values = value_buffer.data();
    const bool parallel = a_.rows * a_.query_tokens * a_.heads * a_.size >= kParallelWork;
#pragma omp parallel if (parallel)
    {
      const typename Products::Guard guard;
#pragma omp for schedule(static) collapse(2)
      for (std::int64_t head = 0; head < heads; ++head) {
        for (std::int64_t block = 0; block < blocks; ++block) {
          const std::int64_t first = block * Products::kBlock;
          const std::int64_t count = smaller(Products::kBlock, keys_ - first);
          const std::int64_t given = smaller(count, a_.key_tokens - first);
          Products::pack_keys(of(a_.key, a_.key_row, a_.key_token, head, first), a_.key_token, given, count, a_.size,
                              keys + head * key_words_ + first * line_);
          Products::pack_values(of(a_.value, a_.value_row, a_.value_token, head, first), a_.value_token, given, count,
                                a_.size, values + head * value_words_ + Products::value_words(first, a_.size));
        }
      }
      Buffer<Word> queries(kSpan * line_);
      Buffer<float> sums(kSpan * lines_), scores(Products::kScores);
      Buffer<typename Products::Weight> weights(Products::kScores);
#pragma omp for schedule(dynamic) collapse(2)
      for (std::int64_t head = 0; head < heads; ++head) {
        for (std::int64_t number = 0; number < spans; ++number)
          span(head, number * kSpan, keys + head * key_words_, values + head * value_words_, queries.data(), sums.data(),
               scores.data(), weights.data());
      }
    }
  }

 private:
  using Word = typename Products::Word;
  static constexpr std::int64_t kQueries = Products::kQueries, kSpan = kQueries * Products::kUnits;

  // The queries of a head from `first` on.
  void span(std::int64_t head, std::int64_t first, const Word* keys, const Word* values, Word* queries, float* sums,
            float* scores, typename Products::Weight* weights) const {
    Softmax<Products> softmax[Products::kUnits];
    const std::int64_t left = smaller(kSpan, a_.query_tokens - first), units = padded(left, kQueries) / kQueries;
    for (std::int64_t u = 0; u < units; ++u) {
      Products::pack_queries(of(a_.query, a_.query_row, a_.query_token, head, first + u * kQueries), a_.query_token,
                             smaller(kQueries, left - u * kQueries), a_.size, queries + u * kQueries * line_);
      softmax[u].start();
    }
    for (std::int64_t key = 0; key < keys_; key += Products::kBlock) {
      const std::int64_t count = smaller(Products::kBlock, keys_ - key), given = smaller(count, a_.key_tokens - key);
      const Word* const value = values + Products::value_words(key, a_.size);
      for (std::int64_t u = 0; u < units; ++u) {
        float* const sum = sums + u * lines_ * kQueries;
        Products::scores(keys + key * line_, count, queries + u * kQueries * line_, line_, scores);
        softmax[u].block(scores, given, a_.scale * kLog2E, weights, key == 0 ? nullptr : sum, lines_);
        Products::rest(weights, given, count);
        Products::add(weights, count, value, lines_, key == 0, sum);
      }
    }
    T* const result = static_cast<T*>(a_.result);
    for (std::int64_t u = 0; u < units; ++u) {
      const std::int64_t token = head / a_.heads * a_.query_tokens + first + u * kQueries;
      softmax[u].finish(sums + u * lines_ * kQueries, smaller(kQueries, left - u * kQueries), a_.size,
                        result + (token * a_.heads + head % a_.heads) * a_.size, a_.heads * a_.size);
    }
  }

  const T* of(const void* tensor, std::int64_t row, std::int64_t token, std::int64_t head, std::int64_t first) const {
    return static_cast<const T*>(tensor) + head / a_.heads * row + first * token + head % a_.heads * a_.size;
  }

  const Attention& a_;
  const std::int64_t line_, lines_, keys_, key_words_, value_words_;
};

// Products of vectors. `Operation` has a Word, what a lane holds of a query: one number, or a pair of them; and how a word of a key
// times words of queries is added to lanes of scores.
template <class Operation>
struct VectorProducts : Operation {
  using typename Operation::Word;
  struct Guard {
    Guard() {}
  };
  static constexpr int kQueries = 2 * kLanes;
  // Lines of sums at a time: as many as there are registers for.
  static constexpr int kTile = kLanes == 16 ? 12 : 6;
  static constexpr int kKeys = 2 * kTile, kLines = kTile, kBlock = 5 * 24, kUnits = 4, kScores = kBlock * kQueries;
  static_assert(kBlock % kKeys == 0, "a block is whole tiles of keys");

  static std::int64_t key_words(std::int64_t size) { return padded(size, Operation::kNumbers) / Operation::kNumbers; }
  static std::int64_t value_words(std::int64_t keys, std::int64_t size) { return keys / Operation::kNumbers * padded(size, kTile); }

  static void scores(const Word* keys, std::int64_t count, const Word* queries, std::int64_t line, float* scores) {
    for (std::int64_t key = 0; key < count; key += kTile)
      tile(keys + key * line, 1, line, queries, line, true, scores + key * kQueries);
  }

  static void add(const Word* weights, std::int64_t count, const Word* values, std::int64_t lines, bool first, float* sums) {
    for (std::int64_t line = 0; line < lines; line += kTile)
      tile(values + line, lines, 1, weights, count / Operation::kNumbers, first, sums + line * kQueries);
  }

  // sums[line][lane] (+)= sum over steps of words[line, step] * lanes[step][lane]
  static void tile(const Word* words, std::int64_t by_step, std::int64_t by_line, const Word* lanes, std::int64_t steps,
                   bool first, float* sums) {
    Vector sum[kTile][2];
    for (int line = 0; line < kTile; ++line)
      for (int half = 0; half < 2; ++half) sum[line][half] = first ? all(0.0f) : load(sums + line * kQueries + half * kLanes);
    for (std::int64_t step = 0; step < steps; ++step) {
      const Word* const from = lanes + step * kQueries;
      const auto left = Operation::lanes(from), right = Operation::lanes(from + kLanes);
      for (int line = 0; line < kTile; ++line) {
        const auto word = Operation::same(words[step * by_step + line * by_line]);
        sum[line][0] = Operation::add_product(word, left, sum[line][0]);
        sum[line][1] = Operation::add_product(word, right, sum[line][1]);
      }
    }
    for (int line = 0; line < kTile; ++line)
      for (int half = 0; half < 2; ++half) store(sums + line * kQueries + half * kLanes, sum[line][half]);
  }
};

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
