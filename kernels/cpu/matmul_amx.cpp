// Matrix products of bfloat16 with AMX: linear layers, alone or with the gated activation after them, and convolutions.
// kernels/linear.py and kernels/convolution.py define what they compute, and have checked every argument.
//
// Weights come packed in panels of 32 columns, a panel in steps of 32 terms, a step as two tiles of 16 columns. Lines of the left operand
// are read where they lie: 16 of them at the same distance from each other are a tile. Four tiles of sums, 32 lines by 32 columns, stay in
// registers over a chunk of steps. Their rounding is done bit by bit during the next sums: the tiles are busy then, the vectors are not.
#include <omp.h>

#include "matrix.h"
#include "scratch.h"
#include "simd.h"
#include "tiles.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

constexpr std::int64_t kPanel = 32, kStep = 32;                 // columns and terms
constexpr std::int64_t kPanelStepBytes = kPanel * kStep * 2;
constexpr std::int64_t kPair = 2 * kTileLines;                  // lines of a block of sums
constexpr std::int64_t kSums = kPair * kPanel;
// Steps for which sums stay in registers: a panel's share of them, 80 KB, stays in the second-level cache for all lines of a task.
constexpr std::int64_t kChunk = 40;
// What the lines of a task may take of that cache, and how many there may be.
constexpr std::int64_t kLineBytes = 768 << 10, kMostPairs = 16;

// Up to 16 lines of the left operand, and where the results of lines [first, count) go.
struct Lines {
  const char* from;
  std::int64_t stride;  // bytes between lines
  std::int64_t row;     // of the result of line `first`
  int first, count;
};

struct Job {
  const Lines* lines;
  std::int64_t groups;                // of lines
  const std::int64_t* offsets;        // bytes from a line's start to its terms of a step
  std::int64_t steps, panels;
  std::int64_t bytes;                 // of memory that a group of lines reads
  const char* weight;
  const float* bias;                  // or null
  BFloat16* result;
  std::int64_t width;                 // of a line of the result
};

// gelu(x) = x Phi(x), with the error function within 2e-7 (Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 7.1.26).
inline Vector gelu(Vector x) {
  const __m512i sign_bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const Vector z = x * all(0.70710678118654752440f);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(z.v), sign_bit);
  const Vector magnitude{_mm512_castsi512_ps(_mm512_andnot_si512(sign_bit, _mm512_castps_si512(z.v)))};
  const Vector t = reciprocal(multiply_add(magnitude, all(0.3275911f), all(1.0f)));
  Vector p = all(1.061405429f);
  p = multiply_add(p, t, all(-1.453152027f));
  p = multiply_add(p, t, all(1.421413741f));
  p = multiply_add(p, t, all(-0.284496736f));
  p = multiply_add(p, t, all(0.254829592f));
  // 2^-100 is nothing beside 1; smaller numbers would be subnormal, for which processors take a hundred times as long.
  const Vector power = larger(all(-100.0f), magnitude * magnitude * all(-1.44269504088896341f));
  const Vector tail = p * t * power_of_two<true>(power);
  const Vector erf{_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512((all(1.0f) - tail).v), sign))};
  const Vector half = x * all(0.5f);
  return multiply_add(half, erf, half);
}

// Sums that are finished, on their way to the result.
template <bool kGated>
class Pending {
 public:
  Pending() = default;
  Pending(const float* sums, const Job& job, std::int64_t panel, const Lines* lines, int groups)
      : sums_(sums), job_(&job), panel_(panel), lines_(lines), end_(groups * kTileLines) {}

  // Some more lines.
  inline __attribute__((always_inline)) void some(int count) {
    for (; count > 0 && next_ < end_; --count, ++next_) line(next_);
  }

 private:
  inline __attribute__((always_inline)) void line(int number) const {
    const Lines& lines = lines_[number / kTileLines];
    const int within = number % kTileLines;
    if (within < lines.first || within >= lines.count) return;
    const float* const sums = sums_ + number / kTileLines * (kSums / 2) + within * kTileLines;
    Vector left = load(sums), right = load(sums + kSums / 4);
    if (job_->bias != nullptr) {
      left = left + load(job_->bias + panel_ * kPanel);
      right = right + load(job_->bias + panel_ * kPanel + kTileLines);
    }
    BFloat16* const row = job_->result + (lines.row + within - lines.first) * job_->width;
    if constexpr (kGated) {
      const __m256bh rounded = _mm512_cvtneps_pbh((left * gelu(right)).v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + panel_ * (kPanel / 2)), (__m256i)rounded);
    } else {
      _mm512_storeu_si512(row + panel_ * kPanel, (__m512i)_mm512_cvtne2ps_pbh(right.v, left.v));
    }
  }

  const float* sums_ = nullptr;
  const Job* job_ = nullptr;
  std::int64_t panel_ = 0;
  const Lines* lines_ = nullptr;
  int next_ = 0, end_ = 0;
};

// One thread's work.
template <bool kGated>
class Worker {
 public:
  explicit Worker(const Job& job, std::int64_t pairs) : job_(job), sums_((pairs + 1) * kSums) {}
  ~Worker() { pending_.some(kPair); }

  // Lines of pairs [first, first + count), columns of panels [begin, end).
  void task(std::int64_t first, std::int64_t count, std::int64_t begin, std::int64_t end) {
    const std::int64_t chunks = padded(job_.steps, kChunk) / kChunk, length = padded(job_.steps, chunks) / chunks;
    for (std::int64_t panel = begin; panel < end; ++panel) {
      for (std::int64_t step = 0; step < job_.steps; step += length) {
        const std::int64_t last = smaller(step + length, job_.steps);
        for (std::int64_t pair = first; pair < first + count; ++pair) {
          // Sums of one chunk take turns in two places: one is on its way to the result. It is there before the other is stored, so
          // that sums of several chunks can have one place for each pair.
          turn_ ^= 1;
          float* const sums = sums_.data() + (chunks == 1 ? turn_ : pair - first) * kSums;
          block(pair, panel, step, last, sums);
          if (last == job_.steps) {
            pending_.some(kPair);
            pending_ = Pending<kGated>(sums, job_, panel, job_.lines + 2 * pair, pair * 2 + 1 < job_.groups ? 2 : 1);
          }
        }
      }
    }
  }

 private:
  inline void block(std::int64_t pair, std::int64_t panel, std::int64_t step, std::int64_t last, float* sums) {
    const Lines& upper = job_.lines[2 * pair];
    const Lines& lower = job_.lines[smaller(2 * pair + 1, job_.groups - 1)];
    const char* weight = job_.weight + (panel * job_.steps + step) * kPanelStepBytes;
    const int each = static_cast<int>((kPair + last - step - 1) / (last - step));
    if (step == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + kSums / 4, 64);
      _tile_loadd(2, sums + kSums / 2, 64);
      _tile_loadd(3, sums + 3 * kSums / 4, 64);
    }
    for (; step < last; ++step, weight += kPanelStepBytes) {
      const std::int64_t offset = job_.offsets[step];
      _tile_loadd(6, weight, 64);
      _tile_loadd(4, upper.from + offset, upper.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weight + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      pending_.some(each);
      _tile_loadd(5, lower.from + offset, lower.stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kSums / 4, 64);
    _tile_stored(2, sums + kSums / 2, 64);
    _tile_stored(3, sums + 3 * kSums / 4, 64);
  }

  const Job& job_;
  Buffer<float> sums_;
  Pending<kGated> pending_;
  int turn_ = 0;
};

template <bool kGated>
void run(const Job& job) {
  const std::int64_t pairs = padded(job.groups, 2) / 2;
  const std::int64_t fitting = kLineBytes / (2 * job.bytes);
  const std::int64_t most = fitting < 1 ? 1 : smaller(fitting, kMostPairs);
  const std::int64_t blocks = padded(pairs, most) / most, height = padded(pairs, blocks) / blocks;
  // Four tasks for each thread, so that none waits long for the others at the end.
  const std::int64_t wanted = 4 * omp_get_max_threads();
  const std::int64_t parts = smaller(job.panels, padded(wanted, blocks) / blocks);
  const std::int64_t panels = padded(job.panels, parts) / parts;
  const bool parallel = job.groups * job.panels * job.steps >= 64;
#pragma omp parallel if (parallel)
  {
    const Tiles tiles;
    Worker<kGated> worker(job, height);
#pragma omp for schedule(dynamic) collapse(2)
    for (std::int64_t part = 0; part < parts; ++part) {
      for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t first = block * height, begin = part * panels;
        worker.task(first, smaller(height, pairs - first), begin, smaller(begin + panels, job.panels));
      }
    }
  }
}

// Lines side by side: `rows` of `inner` numbers. The last ones that are no whole tile are copied to `rest`, 16 lines.
void plain_lines(const BFloat16* x, std::int64_t rows, std::int64_t inner, std::int64_t stride, BFloat16* rest, Lines* lines) {
  const std::int64_t bytes = 2 * stride;
  for (std::int64_t row = 0; row < rows; row += kTileLines) {
    const int count = static_cast<int>(smaller(kTileLines, rows - row));
    lines[row / kTileLines] = {reinterpret_cast<const char*>(x + row * stride), bytes, row, 0, count};
    if (count < kTileLines) {
      std::memset(rest, 0, static_cast<std::size_t>(2 * kTileLines * inner));
      for (int line = 0; line < count; ++line)
        std::memcpy(rest + line * inner, x + (row + line) * stride, static_cast<std::size_t>(2 * inner));
      lines[row / kTileLines].from = reinterpret_cast<const char*>(rest);
      lines[row / kTileLines].stride = 2 * inner;
    }
  }
}

void side_by_side(std::int64_t steps, std::int64_t* offsets) {
  for (std::int64_t step = 0; step < steps; ++step) offsets[step] = step * 2 * kStep;
}

// A picture as lines where tiles of 16 pixels of a row fit: with its padding around it. The last tile of a row may reach back into the one
// before it, whose results it does not write again.
class Padded {
 public:
  explicit Padded(const Convolution& c)
      : c_(c),
        high_(c.height + 2 * c.padding),
        wide_(c.width + 2 * c.padding),
        out_high_((high_ - c.side) / c.stride + 1),
        out_wide_((wide_ - c.side) / c.stride + 1),
        across_(padded(out_wide_, kTileLines) / kTileLines),
        picture_(c.rows * high_ * wide_ * c.channels) {}

  std::int64_t groups() const { return c_.rows * out_high_ * across_; }
  std::int64_t bytes() const { return 2 * kTileLines * c_.channels * c_.stride * c_.stride; }

  void lay(Lines* lines, std::int64_t* offsets) {
    BFloat16* const to = picture_.data();
    const auto* const from = static_cast<const BFloat16*>(c_.x);
    const std::size_t edge = static_cast<std::size_t>(2 * c_.padding * c_.channels);
    const std::size_t line = static_cast<std::size_t>(2 * c_.width * c_.channels);
    const bool parallel = c_.rows * high_ * wide_ * c_.channels >= kParallelElements;
#pragma omp parallel for schedule(static) if (parallel)
    for (std::int64_t row = 0; row < c_.rows * high_; ++row) {
      const std::int64_t y = row % high_ - c_.padding;
      char* const at = reinterpret_cast<char*>(to + row * wide_ * c_.channels);
      if (y < 0 || y >= c_.height) {
        std::memset(at, 0, line + 2 * edge);
      } else {
        std::memset(at, 0, edge);
        std::memcpy(at + edge, from + (row / high_ * c_.height + y) * c_.width * c_.channels, line);
        std::memset(at + edge + line, 0, edge);
      }
    }
    const std::int64_t bytes = 2 * c_.channels, reach = out_wide_ - kTileLines;
    for (std::int64_t group = 0; group < groups(); ++group) {
      const std::int64_t row = group / across_, x = group % across_ * kTileLines, start = smaller(x, reach);
      const std::int64_t top = row / out_high_ * high_ + row % out_high_ * c_.stride;
      lines[group] = {reinterpret_cast<const char*>(to) + (top * wide_ + start * c_.stride) * bytes, c_.stride * bytes,
                      row * out_wide_ + x, static_cast<int>(x - start), static_cast<int>(kTileLines)};
    }
    for (std::int64_t y = 0; y < c_.side; ++y)
      for (std::int64_t x = 0; x < c_.side; ++x)
        for (std::int64_t channel = 0; channel < c_.channels; channel += kStep)
          *offsets++ = (y * wide_ + x) * bytes + 2 * channel;
  }

 private:
  const Convolution& c_;
  const std::int64_t high_, wide_, out_high_, out_wide_, across_;
  Scratch<BFloat16> picture_;
};

// A small picture: what each of its pixels is made of, side by side.
void gather(const Convolution& c, std::int64_t out_high, std::int64_t out_wide, BFloat16* to) {
  const std::size_t bytes = static_cast<std::size_t>(2 * c.channels);
  const auto* const from = static_cast<const BFloat16*>(c.x);
  const std::int64_t rows = c.rows * out_high * out_wide;
  const bool parallel = rows * c.side * c.side * c.channels >= kParallelElements;
#pragma omp parallel for schedule(static) if (parallel)
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t picture = row / (out_high * out_wide);
    const std::int64_t top = row / out_wide % out_high * c.stride - c.padding, left = row % out_wide * c.stride - c.padding;
    BFloat16* at = to + row * c.side * c.side * c.channels;
    for (std::int64_t y = top; y < top + c.side; ++y) {
      for (std::int64_t x = left; x < left + c.side; ++x, at += c.channels) {
        if (y < 0 || y >= c.height || x < 0 || x >= c.width)
          std::memset(static_cast<void*>(at), 0, bytes);
        else
          std::memcpy(static_cast<void*>(at), from + ((picture * c.height + y) * c.width + x) * c.channels, bytes);
      }
    }
  }
}

void product(const BFloat16* x, std::int64_t rows, std::int64_t inner, std::int64_t stride, Job job, bool gated) {
  Buffer<BFloat16> rest(kTileLines * inner);
  Buffer<Lines> lines(padded(rows, kTileLines) / kTileLines);
  Buffer<std::int64_t> offsets(job.steps);
  plain_lines(x, rows, inner, stride, rest.data(), lines.data());
  side_by_side(job.steps, offsets.data());
  job.lines = lines.data();
  job.groups = padded(rows, kTileLines) / kTileLines;
  job.offsets = offsets.data();
  job.bytes = 2 * kTileLines * inner;
  gated ? run<true>(job) : run<false>(job);
}

}  // namespace
}  // namespace LDMRT_LEVEL

void linear_amx(const Linear& l) {
  Job job{};
  job.steps = l.inner / kStep;
  job.panels = l.width / kPanel;
  job.weight = static_cast<const char*>(l.weight);
  job.bias = l.bias;
  job.result = static_cast<BFloat16*>(l.result);
  job.width = l.gated ? l.width / 2 : l.width;
  product(static_cast<const BFloat16*>(l.x), l.rows, l.inner, l.stride, job, l.gated);
}

void convolution_amx(const Convolution& c) {
  Job job{};
  job.steps = c.side * c.side * c.channels / kStep;
  job.panels = c.out / kPanel;
  job.weight = static_cast<const char*>(c.weight);
  job.result = static_cast<BFloat16*>(c.result);
  job.width = c.out;
  const std::int64_t out_high = (c.height + 2 * c.padding - c.side) / c.stride + 1;
  const std::int64_t out_wide = (c.width + 2 * c.padding - c.side) / c.stride + 1;
  if (out_wide >= kTileLines) {
    Padded picture(c);
    Buffer<Lines> lines(picture.groups());
    Buffer<std::int64_t> offsets(job.steps);
    picture.lay(lines.data(), offsets.data());
    job.lines = lines.data();
    job.groups = picture.groups();
    job.offsets = offsets.data();
    job.bytes = picture.bytes();
    run<false>(job);
  } else {
    const std::int64_t rows = c.rows * out_high * out_wide, inner = c.side * c.side * c.channels;
    Scratch<BFloat16> gathered(rows * inner);
    gather(c, out_high, out_wide, gathered.data());
    product(gathered.data(), rows, inner, inner, job, false);
  }
}

}  // namespace ldmrt
