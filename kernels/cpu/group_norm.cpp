// Group norm, with what is put together before it and SiLU after it. kernels/group_norm.py and kernels/add_group_norm.py define what
// it computes, and have checked every argument.
#include "arithmetic.h"
#include "levels.h"
#include "operators.h"
#include "simd.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

// Positions whose sums are kept in float before they go on in double: the rounding of float then stays that of a short sum.
constexpr std::int64_t kRun = 64;

template <typename T>
struct Source {
  const T* x;
  const T* residual;
  const T* joined;
  const float* added;
  T* total;
};

// One line of what is normed: `own` elements of x and `rest` of joined, in float.
// `added`: one number for each element, or, if `uniform`, the same for all.
template <typename T>
void assemble(const Source<T>& s, std::int64_t own, std::int64_t rest, bool uniform, float* line) {
  #pragma omp simd
  for (std::int64_t i = 0; i < own; ++i) line[i] = s.x[i].read();
  if (s.residual != nullptr)
    #pragma omp simd
    for (std::int64_t i = 0; i < own; ++i) line[i] += s.residual[i].read();
  if (s.added != nullptr && uniform) {
    const float added = *s.added;
    #pragma omp simd
    for (std::int64_t i = 0; i < own; ++i) line[i] += added;
  } else if (s.added != nullptr) {
    #pragma omp simd
    for (std::int64_t i = 0; i < own; ++i) line[i] += s.added[i];
  }
  #pragma omp simd
  for (std::int64_t i = 0; i < rest; ++i) line[own + i] = s.joined[i].read();
  if (s.total != nullptr) {
    // What is normed is the sum as it is stored, so that whoever reads it later sees the same numbers.
    #pragma omp simd
    for (std::int64_t i = 0; i < own + rest; ++i) s.total[i] = T::write(line[i]);
    #pragma omp simd
    for (std::int64_t i = 0; i < own + rest; ++i) line[i] = s.total[i].read();
  }
}

template <typename T>
void finish(const float* line, std::int64_t count, const float* centre, const float* scale, const float* final,
            bool silu_after, T* result) {
  if (silu_after) {
    #pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) result[i] = T::write(silu((line[i] - centre[i]) * scale[i] + final[i]));
  } else {
    #pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) result[i] = T::write((line[i] - centre[i]) * scale[i] + final[i]);
  }
}

template <typename T>
class Norm {
 public:
  explicit Norm(const GroupNorm& g) : g_(g), size_(g.channels / g.groups), rest_(g.channels - g.width) {}

  void run() {
    if (g_.channels_last) {
      channels_last();
    } else {
      contiguous();
    }
  }

 private:
  // The pointers of a position (channels last) or of a channel (contiguous), `offset` elements into its row.
  Source<T> source(std::int64_t row, std::int64_t own_offset, std::int64_t joined_offset, std::int64_t total_offset,
                   std::int64_t added_offset) const {
    const auto at = [](const void* base, std::int64_t offset) {
      return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
    };
    return {at(g_.x, row * g_.width * g_.spatial + own_offset),
            at(g_.residual, row * g_.width * g_.spatial + own_offset),
            at(g_.joined, row * rest_ * g_.spatial + joined_offset),
            g_.added == nullptr ? nullptr : g_.added + row * g_.added_stride + added_offset,
            g_.total == nullptr ? nullptr
                                : static_cast<T*>(g_.total) + row * g_.channels * g_.spatial + total_offset};
  }

  void channels_last() {
    // A row is cut into parts, each a run of positions, so that threads share rows; the cut does not depend on their number.
    const std::int64_t parts = smaller(16, (g_.spatial + kRun - 1) / kRun);
    const std::int64_t length = (g_.spatial + parts - 1) / parts;
    const std::int64_t groups = g_.groups;
    Buffer<Moments> found_buffer(g_.rows * parts * groups);
    Moments* const found = found_buffer.data();
    const bool parallel = g_.rows * g_.channels * g_.spatial >= kParallelWork;
    // Channels that are whole vectors, as those of real models are.
    const bool whole = g_.channels % kLanes == 0 && g_.width % kLanes == 0;
#pragma omp parallel for schedule(static) if (parallel)
    for (std::int64_t job = 0; job < g_.rows * parts; ++job) {
      const std::int64_t begin = job % parts * length, end = smaller(begin + length, g_.spatial);
      if (whole)
        whole_moments(job / parts, begin, end, found + job * groups);
      else
        part_moments(job / parts, begin, end, found + job * groups);
    }
    Buffer<float> centre_buffer(g_.rows * g_.channels), scale_buffer(g_.rows * g_.channels), final_buffer(g_.channels);
    float *const centre = centre_buffer.data(), *const scale = scale_buffer.data(), *const final = final_buffer.data();
    #pragma omp simd
    for (std::int64_t c = 0; c < g_.channels; ++c) final[c] = g_.bias == nullptr ? 0.0f : g_.bias[c];
    for (std::int64_t row = 0; row < g_.rows; ++row) {
      for (std::int64_t group = 0; group < groups; ++group) {
        Moments all{0.0, 0.0};
        double count = 0.0;
        for (std::int64_t part = 0; part < parts; ++part) {
          const std::int64_t begin = part * length, end = smaller(begin + length, g_.spatial);
          if (end > begin) merge(all, count, found[(row * parts + part) * groups + group], 1.0 * (end - begin) * size_);
        }
        const double deviation = 1.0 / std::sqrt(all.m2 / count + g_.eps);
        for (std::int64_t c = group * size_; c < (group + 1) * size_; ++c) {
          centre[row * g_.channels + c] = static_cast<float>(all.mean);
          scale[row * g_.channels + c] = static_cast<float>(deviation * (g_.weight == nullptr ? 1.0 : g_.weight[c]));
        }
      }
    }
#pragma omp parallel for schedule(static) if (parallel)
    for (std::int64_t job = 0; job < g_.rows * parts; ++job) {
      const std::int64_t row = job / parts, begin = job % parts * length, end = smaller(begin + length, g_.spatial);
      if (whole && (g_.total != nullptr || (g_.residual == nullptr && rest_ == 0))) {
        const auto normalize = g_.silu ? &Norm::normalize<true> : &Norm::normalize<false>;
        (this->*normalize)(row, begin, end, centre + row * g_.channels, scale + row * g_.channels, final);
        continue;
      }
      Buffer<float> line(g_.channels);
      for (std::int64_t position = begin; position < end; ++position) {
        reread(row, position, line.data());
        finish(line.data(), g_.channels, centre + row * g_.channels, scale + row * g_.channels, final, g_.silu,
               static_cast<T*>(g_.result) + (row * g_.spatial + position) * g_.channels);
      }
    }
  }

  // The moments of every group over some positions. What is summed is the difference from the first position, which is one of
  // the numbers, so that a large mean costs no digits.
  void part_moments(std::int64_t row, std::int64_t begin, std::int64_t end, Moments* found) {
    const std::int64_t channels = g_.channels;
    Buffer<float> line_buffer(channels), pivot_buffer(channels), sums_buffer(channels), squares_buffer(channels);
    Buffer<double> all_sums_buffer(channels), all_squares_buffer(channels);
    float *const line = line_buffer.data(), *const pivot = pivot_buffer.data();
    float *const sums = sums_buffer.data(), *const squares = squares_buffer.data();
    double *const all_sums = all_sums_buffer.data(), *const all_squares = all_squares_buffer.data();
    #pragma omp simd
    for (std::int64_t c = 0; c < channels; ++c) all_sums[c] = all_squares[c] = 0.0;
    for (std::int64_t first = begin; first < end; first += kRun) {
      #pragma omp simd
      for (std::int64_t c = 0; c < channels; ++c) sums[c] = squares[c] = 0.0f;
      for (std::int64_t position = first; position < smaller(first + kRun, end); ++position) {
        assemble(source(row, position * g_.width, position * rest_, position * channels, 0), g_.width, rest_, false, line);
        if (position == begin)
          #pragma omp simd
          for (std::int64_t c = 0; c < channels; ++c) pivot[c] = line[c];
        for (std::int64_t c = 0; c < channels; ++c) {
          const float difference = line[c] - pivot[c];
          sums[c] += difference;
          squares[c] += difference * difference;
        }
      }
      #pragma omp simd
      for (std::int64_t c = 0; c < channels; ++c) all_sums[c] += sums[c];
      #pragma omp simd
      for (std::int64_t c = 0; c < channels; ++c) all_squares[c] += squares[c];
    }
    group_moments(begin, end, pivot, all_sums, all_squares, found);
  }

  // `part_moments` of channels that are whole vectors: the sums of some of them stay in registers over a run of positions.
  void whole_moments(std::int64_t row, std::int64_t begin, std::int64_t end, Moments* found) {
    const std::int64_t channels = g_.channels;
    Buffer<float> pivot(channels);
    Buffer<double> sums(channels), squares(channels);
    for (std::int64_t c = 0; c < channels; ++c) sums.data()[c] = squares.data()[c] = 0.0;
    const bool residual = g_.residual != nullptr, added = g_.added != nullptr, total = g_.total != nullptr;
    const auto own = residual ? (added ? &Norm::columns<true, true, true> : &Norm::columns<true, false, true>)
                     : added  ? (total ? &Norm::columns<false, true, true> : &Norm::columns<false, true, false>)
                              : (total ? &Norm::columns<false, false, true> : &Norm::columns<false, false, false>);
    const auto joined = total ? &Norm::columns<false, false, true> : &Norm::columns<false, false, false>;
    for (std::int64_t first = begin; first < end; first += kRun) {
      const std::int64_t last = smaller(first + kRun, end);
      const auto some = [&](auto columns, const void* x, std::int64_t width, std::int64_t from) {
        for (std::int64_t c = 0; c < width; c += kColumns * kLanes) {
          const int count = static_cast<int>(smaller(kColumns, (width - c) / kLanes));
          (this->*columns)(static_cast<const T*>(x), width, row, c, from, count, first, last, first == begin,
                           pivot.data() + from + c, sums.data() + from + c, squares.data() + from + c);
        }
      };
      some(own, g_.x, g_.width, 0);
      if (rest_ > 0) some(joined, g_.joined, rest_, g_.width);
    }
    group_moments(begin, end, pivot.data(), sums.data(), squares.data(), found);
  }

  static constexpr int kColumns = 4;

  // Sums over some positions, of `count` vectors of channels from `c` on of x; `from` is where its channels begin in the total.
  template <bool kResidual, bool kAdded, bool kTotal>
  void columns(const T* x, std::int64_t width, std::int64_t row, std::int64_t c, std::int64_t from, int count,
               std::int64_t first, std::int64_t last, bool begins, float* pivot, double* sums, double* squares) {
    if (count == kColumns)
      columns_of<kResidual, kAdded, kTotal, kColumns>(x, width, row, c, from, first, last, begins, pivot, sums, squares);
    else
      for (int k = 0; k < count; ++k)
        columns_of<kResidual, kAdded, kTotal, 1>(x, width, row, c + k * kLanes, from, first, last, begins,
                                                 pivot + k * kLanes, sums + k * kLanes, squares + k * kLanes);
  }

  template <bool kResidual, bool kAdded, bool kTotal, int kCount>
  void columns_of(const T* x, std::int64_t width, std::int64_t row, std::int64_t c, std::int64_t from, std::int64_t first,
                  std::int64_t last, bool begins, float* pivot, double* sums, double* squares) {
    const std::int64_t at = row * g_.spatial + first;
    const T* own = x + at * width + c;
    const T* residual = kResidual ? static_cast<const T*>(g_.residual) + at * width + c : nullptr;
    T* total = kTotal ? static_cast<T*>(g_.total) + at * g_.channels + from + c : nullptr;
    Vector added[kCount], middle[kCount], sum[kCount], square[kCount];
    for (int k = 0; k < kCount; ++k) {
      added[k] = kAdded ? load(g_.added + row * g_.added_stride + c + k * kLanes) : all(0.0f);
      sum[k] = square[k] = all(0.0f);
      middle[k] = load(pivot + k * kLanes);
    }
    for (std::int64_t position = first; position < last; ++position) {
      for (int k = 0; k < kCount; ++k) {
        Vector value = read(own + k * kLanes);
        if constexpr (kResidual) value = value + read(residual + k * kLanes);
        if constexpr (kAdded) value = value + added[k];
        // What is normed is the sum as it is stored, so that whoever reads it later sees the same numbers.
        if constexpr (kTotal) value = write(total + k * kLanes, value);
        if (begins && position == first) middle[k] = value;
        const Vector difference = value - middle[k];
        sum[k] = sum[k] + difference;
        square[k] = multiply_add(difference, difference, square[k]);
      }
      own += width;
      if constexpr (kResidual) residual += width;
      if constexpr (kTotal) total += g_.channels;
    }
    for (int k = 0; k < kCount; ++k) {
      float run[2][kLanes];
      store(run[0], sum[k]);
      store(run[1], square[k]);
      store(pivot + k * kLanes, middle[k]);
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[k * kLanes + lane] += run[0][lane];
        squares[k * kLanes + lane] += run[1][lane];
      }
    }
  }

  // From the sums of differences from a pivot, by channel, to the moments of every group.
  void group_moments(std::int64_t begin, std::int64_t end, const float* pivot, const double* sums, const double* squares,
                     Moments* found) const {
    if (end <= begin) return;  // nobody reads them
    const double positions = static_cast<double>(end - begin), share = 1.0 / positions;
    for (std::int64_t group = 0; group < g_.groups; ++group) {
      // The group's mean, and then its channels' squares about their own means, and those of the means about it.
      double sum = 0.0, m2 = 0.0;
      for (std::int64_t c = group * size_; c < (group + 1) * size_; ++c) sum += pivot[c] + sums[c] * share;
      const double mean = sum / static_cast<double>(size_);
      for (std::int64_t c = group * size_; c < (group + 1) * size_; ++c) {
        const double own = sums[c] * share, off = pivot[c] + own - mean;
        m2 += squares[c] - sums[c] * own + positions * off * off;
      }
      found[group] = {mean, m2};
    }
  }

  // Of channels that are whole vectors, from the total if there is one, else from x alone and what is added to it.
  template <bool kSilu>
  void normalize(std::int64_t row, std::int64_t begin, std::int64_t end, const float* centre, const float* scale,
                 const float* final) const {
    const bool given = g_.total != nullptr;
    const T* const from = static_cast<const T*>(given ? g_.total : g_.x);
    const float* const added = given || g_.added == nullptr ? nullptr : g_.added + row * g_.added_stride;
    for (std::int64_t position = begin; position < end; ++position) {
      const std::int64_t at = (row * g_.spatial + position) * g_.channels;
      T* const result = static_cast<T*>(g_.result) + at;
      for (std::int64_t c = 0; c < g_.channels; c += kLanes) {
        Vector value = read(from + at + c);
        if (added != nullptr) value = value + load(added + c);
        const Vector y = multiply_add(value - load(centre + c), load(scale + c), load(final + c));
        write(result + c, kSilu ? silu(y) : y);
      }
    }
  }

  // A position again: from the total if there is one.
  void reread(std::int64_t row, std::int64_t position, float* line) const {
    if (g_.total != nullptr) {
      const T* const total = static_cast<const T*>(g_.total) + (row * g_.spatial + position) * g_.channels;
      #pragma omp simd
      for (std::int64_t c = 0; c < g_.channels; ++c) line[c] = total[c].read();
    } else {
      assemble(source(row, position * g_.width, position * rest_, 0, 0), g_.width, rest_, false, line);
    }
  }

  void contiguous() {
    const bool parallel = g_.rows * g_.channels * g_.spatial >= kParallelWork;
#pragma omp parallel for schedule(static) if (parallel)
    for (std::int64_t job = 0; job < g_.rows * g_.groups; ++job) {
      const std::int64_t row = job / g_.groups, group = job % g_.groups;
      Buffer<float> line(g_.spatial);
      Moments all{0.0, 0.0};
      double count = 0.0;
      for (std::int64_t c = group * size_; c < (group + 1) * size_; ++c) {
        channel(row, c, g_.total != nullptr, line.data());
        merge(all, count, moments(line.data(), g_.spatial), static_cast<double>(g_.spatial));
      }
      const double deviation = 1.0 / std::sqrt(all.m2 / count + g_.eps);
      const float centre = static_cast<float>(all.mean);
      for (std::int64_t c = group * size_; c < (group + 1) * size_; ++c) {
        channel(row, c, false, line.data());
        const float scale = static_cast<float>(deviation * (g_.weight == nullptr ? 1.0 : g_.weight[c]));
        const float final = g_.bias == nullptr ? 0.0f : g_.bias[c];
        T* const result = static_cast<T*>(g_.result) + (row * g_.channels + c) * g_.spatial;
        const float* const v = line.data();
        if (g_.silu) {
          #pragma omp simd
          for (std::int64_t i = 0; i < g_.spatial; ++i) result[i] = T::write(silu((v[i] - centre) * scale + final));
        } else {
          #pragma omp simd
          for (std::int64_t i = 0; i < g_.spatial; ++i) result[i] = T::write((v[i] - centre) * scale + final);
        }
      }
    }
  }

  // A channel of a contiguous picture; put together and stored the first time, if there is a total, else read from it.
  void channel(std::int64_t row, std::int64_t c, bool first, float* line) const {
    if (g_.total != nullptr && !first) {
      const T* const total = static_cast<const T*>(g_.total) + (row * g_.channels + c) * g_.spatial;
      #pragma omp simd
      for (std::int64_t i = 0; i < g_.spatial; ++i) line[i] = total[i].read();
      return;
    }
    const bool own = c < g_.width;
    Source<T> s = source(row, own ? c * g_.spatial : 0, own ? 0 : (c - g_.width) * g_.spatial, c * g_.spatial, own ? c : 0);
    assemble(s, own ? g_.spatial : 0, own ? 0 : g_.spatial, true, line);
  }

  const GroupNorm& g_;
  const std::int64_t size_, rest_;
};

}  // namespace

void group_norm(const GroupNorm& g, Element element) {
  with_type(element, [&](auto type) { Norm<decltype(type)>(g).run(); });
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
