// Convolutions of 3 x 3, stride 1 and padding 1 in float32 by minimal filtering (Winograd 1980, "Arithmetic Complexity of Computations";
// Lavin and Gray 2015, arXiv 1509.09308). kernels/winograd.py defines what they compute, and has checked every argument.
//
// A tile of kTile x kTile results is made of kSide x kSide pixels, which overlap the next tile's by two. Pixels, weights and results are
// seen at kSide^2 points of two polynomials, and there a convolution is a product for each point: of its matrix of (tiles, channels)
// and of its weights (channels, out). 2.25 times fewer multiplications than the sum over a filter for tiles of 2, 4 times fewer for 4.
//
// Tiles are taken in blocks: what is kept of one is as much as there is room for in the second-level cache, or more if the weights,
// which each block reads anew, are much larger. A large picture has blocks for every thread; of a small one the threads share a block.
#include <omp.h>

#include "operators.h"
#include "scratch.h"
#include "simd.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {
namespace {

constexpr std::int64_t kPanel = 16;          // columns of weights that lie side by side
constexpr int kRows = kLanes == 16 ? 12 : 6; // of a block of sums: as many as there are registers for
constexpr std::int64_t kCacheBytes = 1 << 20, kLeastTiles = 96, kMostTiles = 512;

// The points 0, 1, -1 and infinity.
struct Tile2 {
  static constexpr int kTile = 2, kSide = 4;
  static constexpr double kWeights[kSide][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  static void pixels(const Vector* d, Vector* to) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
  }
  static void results(const Vector* m, Vector* to) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] - m[3];
  }
};

// The points 0, 1, -1, 2, -2 and infinity.
struct Tile4 {
  static constexpr int kTile = 4, kSide = 6;
  static constexpr double kWeights[kSide][3] = {{1.0 / 4, 0, 0},
                                                {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                                {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                                {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                                {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                                {0, 0, 1}};
  static void pixels(const Vector* d, Vector* to) {
    const Vector two = all(2.0f), four = all(4.0f), minus_four = all(-4.0f), minus_five = all(-5.0f);
    const Vector even = multiply_add(minus_four, d[2], d[4]), odd = multiply_add(minus_four, d[1], d[3]);
    const Vector far_even = d[4] - d[2], far_odd = two * (d[3] - d[1]);
    to[0] = multiply_add(four, d[0], multiply_add(minus_five, d[2], d[4]));
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = far_even + far_odd;
    to[4] = far_even - far_odd;
    to[5] = multiply_add(four, d[1], multiply_add(minus_five, d[3], d[5]));
  }
  static void results(const Vector* m, Vector* to) {
    const Vector sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    to[0] = m[0] + sum + far_sum;
    to[1] = multiply_add(all(2.0f), far_difference, difference);
    to[2] = multiply_add(all(4.0f), far_sum, sum);
    to[3] = multiply_add(all(8.0f), far_difference, difference) + m[5];
  }
};

// sums[row][column] = sum over terms of lines[row][term] * weight[term][column], for kCount rows and kVectors vectors of columns, of which
// those of the second half of the columns stand `apart` numbers further on.
template <int kCount, int kVectors>
void block(const float* lines, std::int64_t terms, const float* weight, std::int64_t apart, float* sums, std::int64_t width) {
  Vector sum[kCount][kVectors];
  for (auto& row : sum)
    for (auto& each : row) each = all(0.0f);
  for (std::int64_t term = 0; term < terms; ++term) {
    Vector columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(weight + term * kPanel + v * apart);
    for (int row = 0; row < kCount; ++row) {
      const Vector number = all(lines[row * terms + term]);
      for (int v = 0; v < kVectors; ++v) sum[row][v] = multiply_add(number, columns[v], sum[row][v]);
    }
  }
  for (int row = 0; row < kCount; ++row)
    for (int v = 0; v < kVectors; ++v) store(sums + row * width + v * kLanes, sum[row][v]);
}

template <int kVectors, int kCount = kRows>
void blocks(std::int64_t count, const float* lines, std::int64_t terms, const float* weight, std::int64_t apart, float* sums,
            std::int64_t width) {
  if constexpr (kCount > 1) {
    if (count < kCount) return blocks<kVectors, kCount - 1>(count, lines, terms, weight, apart, sums, width);
  }
  block<kCount, kVectors>(lines, terms, weight, apart, sums, width);
}

// All rows of `count` panels of columns.
void product(const float* lines, std::int64_t rows, std::int64_t terms, const float* weight, std::int64_t panels, float* sums,
             std::int64_t width) {
  const std::int64_t parts = padded(rows, kRows) / kRows, height = padded(rows, parts) / parts;
  const std::int64_t columns = panels * kPanel;
  for (std::int64_t column = 0; column < columns;) {
    const float* const from = weight + column / kPanel * kPanel * terms + column % kPanel;
    const bool two = column + 2 * kLanes <= columns;
    for (std::int64_t row = 0; row < rows; row += height) {
      const std::int64_t count = smaller(height, rows - row);
      const float* const line = lines + row * terms;
      float* const to = sums + row * width + column;
      if (two)
        blocks<2>(count, line, terms, from, kLanes == kPanel ? kPanel * terms : kLanes, to, width);
      else
        blocks<1>(count, line, terms, from, 0, to, width);
    }
    column += two ? 2 * kLanes : kLanes;
  }
}

template <typename Tile>
class Picture {
 public:
  explicit Picture(const Winograd& w)
      : w_(w),
        high_(padded(w.height, kTile) / kTile),
        wide_(padded(w.width, kTile) / kTile),
        tiles_(w.rows * high_ * wide_),
        shared_(tiles_ < 2 * kLeastTiles * omp_get_max_threads()),
        block_(tiles_of_a_block()),
        // Odd numbers of cache lines between points, which else would share the few places that a cache has for one address.
        pixel_point_(padded(block_ * w.channels, 2 * kLine) + kLine),
        result_point_(padded(block_ * w.out, 2 * kLine) + kLine) {}

  void run() const { shared_ ? together() : each_alone(); }

 private:
  static constexpr int kTile = Tile::kTile, kSide = Tile::kSide, kPoints = kSide * kSide;
  static constexpr std::int64_t kLine = 16, kParallelProducts = 1 << 17;

  static std::int64_t larger_of(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

  std::int64_t tiles_of_a_block() const {
    const std::int64_t bytes = kPoints * 4 * (w_.channels + w_.out);
    const std::int64_t most = shared_ ? kMostTiles : smaller(kMostTiles, larger_of(kCacheBytes / bytes, kLeastTiles));
    const std::int64_t count = padded(tiles_, most) / most;
    return padded(tiles_, count) / count;
  }

  std::int64_t panels() const { return w_.out / kPanel; }
  std::int64_t pairs() const { return padded(panels(), 2) / 2; }
  std::int64_t numbers() const { return kPoints * (pixel_point_ + result_point_); }

  void each_alone() const {
#pragma omp parallel
    {
      Scratch<float> scratch(numbers());
      float *const pixels = scratch.data(), *const results = pixels + kPoints * pixel_point_;
#pragma omp for schedule(dynamic)
      for (std::int64_t first = 0; first < tiles_; first += block_) {
        const std::int64_t count = smaller(block_, tiles_ - first);
        for (std::int64_t tile = 0; tile < count; ++tile) take(first + tile, pixels + tile * w_.channels);
        for (std::int64_t task = 0; task < kPoints * pairs(); ++task) multiply(task, count, pixels, results);
        for (std::int64_t tile = 0; tile < count; ++tile) give(first + tile, results + tile * w_.out);
      }
    }
  }

  void together() const {
    Scratch<float> scratch(numbers());
    float *const pixels = scratch.data(), *const results = pixels + kPoints * pixel_point_;
    const bool parallel = tiles_ * kPoints * w_.channels * w_.out >= kParallelProducts;
#pragma omp parallel if (parallel)
    {
      const std::int64_t tasks = kPoints * pairs(), chunk = larger_of(1, tasks / (16 * omp_get_num_threads()));
      for (std::int64_t first = 0; first < tiles_; first += block_) {
        const std::int64_t count = smaller(block_, tiles_ - first);
#pragma omp for schedule(static)
        for (std::int64_t tile = 0; tile < count; ++tile) take(first + tile, pixels + tile * w_.channels);
#pragma omp for schedule(dynamic, chunk)
        for (std::int64_t task = 0; task < tasks; ++task) multiply(task, count, pixels, results);
        // Nobody waits: the next block's pixels are in another place, and its results come after all threads have taken them.
#pragma omp for schedule(static) nowait
        for (std::int64_t tile = 0; tile < count; ++tile) give(first + tile, results + tile * w_.out);
      }
    }
  }

  // Two panels of the results at a point.
  void multiply(std::int64_t task, std::int64_t count, const float* pixels, float* results) const {
    const std::int64_t point = task / pairs(), panel = task % pairs() * 2;
    product(pixels + point * pixel_point_, count, w_.channels, w_.weight + (point * panels() + panel) * kPanel * w_.channels,
            smaller(2, panels() - panel), results + point * result_point_ + panel * kPanel, w_.out);
  }

  // The pixels of a tile at all points.
  void take(std::int64_t tile, float* to) const {
    const std::int64_t row = tile / wide_, top = row % high_ * kTile - 1, left = tile % wide_ * kTile - 1;
    const float* const from = w_.x + (row / high_ * w_.height + top) * w_.width * w_.channels + left * w_.channels;
    for (std::int64_t channel = 0; channel < w_.channels; channel += kLanes) {
      Vector half[kSide][kSide], line[kSide];
      for (int x = 0; x < kSide; ++x) {
        const bool within = left + x >= 0 && left + x < w_.width;
        for (int y = 0; y < kSide; ++y) {
          const bool there = within && top + y >= 0 && top + y < w_.height;
          line[y] = there ? load(from + (y * w_.width + x) * w_.channels + channel) : all(0.0f);
        }
        Tile::pixels(line, half[x]);
      }
      for (int y = 0; y < kSide; ++y) {
        Vector column[kSide];
        for (int x = 0; x < kSide; ++x) column[x] = half[x][y];
        Tile::pixels(column, line);
        for (int x = 0; x < kSide; ++x) store(to + (y * kSide + x) * pixel_point_ + channel, line[x]);
      }
    }
  }

  // The results of a tile from those at all points.
  void give(std::int64_t tile, const float* from) const {
    const std::int64_t row = tile / wide_, top = row % high_ * kTile, left = tile % wide_ * kTile;
    const std::int64_t high = smaller(kTile, w_.height - top), wide = smaller(kTile, w_.width - left);
    float* const to = w_.result + ((row / high_ * w_.height + top) * w_.width + left) * w_.out;
    for (std::int64_t channel = 0; channel < w_.out; channel += kLanes) {
      Vector half[kSide][kTile], line[kSide];
      for (int x = 0; x < kSide; ++x) {
        for (int y = 0; y < kSide; ++y) line[y] = load(from + (y * kSide + x) * result_point_ + channel);
        Tile::results(line, half[x]);
      }
      for (int y = 0; y < high; ++y) {
        for (int x = 0; x < kSide; ++x) line[x] = half[x][y];
        Vector finished[kTile];
        Tile::results(line, finished);
        for (int x = 0; x < wide; ++x) store(to + (y * w_.width + x) * w_.out + channel, finished[x]);
      }
    }
  }

  const Winograd& w_;
  const std::int64_t high_, wide_, tiles_;
  const bool shared_;  // whether threads share a block
  const std::int64_t block_, pixel_point_, result_point_;
};

// From (out, channels, 3, 3) to (points, out / 16, channels, 16), computed in float64 and rounded once.
template <typename Tile>
void pack(const float* weight, float* packed, std::int64_t out, std::int64_t channels) {
  constexpr int kSide = Tile::kSide;
#pragma omp parallel for schedule(static) collapse(2) if (out * channels >= kParallelWork)
  for (std::int64_t panel = 0; panel < out / kPanel; ++panel) {
    for (std::int64_t channel = 0; channel < channels; ++channel) {
      const float* const from = weight + (panel * kPanel * channels + channel) * 9;
      double half[kSide][3][kPanel];
      for (int y = 0; y < kSide; ++y)
        for (int x = 0; x < 3; ++x)
          for (int c = 0; c < kPanel; ++c) {
            const float* const filter = from + c * channels * 9 + x;
            half[y][x][c] = Tile::kWeights[y][0] * filter[0] + Tile::kWeights[y][1] * filter[3] + Tile::kWeights[y][2] * filter[6];
          }
      for (int y = 0; y < kSide; ++y)
        for (int x = 0; x < kSide; ++x) {
          float* const to = packed + (((y * kSide + x) * (out / kPanel) + panel) * channels + channel) * kPanel;
          const double* const w = Tile::kWeights[x];
          for (int c = 0; c < kPanel; ++c)
            to[c] = static_cast<float>(w[0] * half[y][0][c] + w[1] * half[y][1][c] + w[2] * half[y][2][c]);
        }
    }
  }
}

}  // namespace

void winograd(const Winograd& w, std::int64_t tile) {
  tile == 2 ? Picture<Tile2>(w).run() : Picture<Tile4>(w).run();
}

void winograd_pack(const float* weight, float* packed, std::int64_t out, std::int64_t channels, std::int64_t tile) {
  tile == 2 ? pack<Tile2>(weight, packed, out, channels) : pack<Tile4>(weight, packed, out, channels);
}

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
