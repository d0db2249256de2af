// The contraction of ghost_dot's tile form on the tile unit: examples by directions, an entry of the tile a depth.
//
// Directions are bfloat16 as they are; an entry of G is split into three, which hold the 24 bits of its float exactly:
// nothing is rounded that the vector units would not round.
#pragma once

namespace u2a {
namespace {

class TileContraction {
  using E = TileEngine;
  static constexpr int64_t W = E::W, kArea = E::MR * E::NR, kParts = 3;
  // 16 rows of 32 entries, or of 16 pairs of them: one row of the tiles of 16 examples, or of 16 directions.
  static constexpr int64_t kStep = E::kTile;

 public:
  static constexpr int64_t kExamples = W;
  static constexpr int64_t kDirectionBytes = kArea * sizeof(BFloat16), kColumnPanels = 2;

  TileContraction(int64_t directions, int64_t row_panels)
      : rows_(row_panels * E::MR),
        directions_(round_up(directions, W) * row_panels * kColumnPanels * kDirectionBytes),
        parts_(kParts * E::MR * kStep * sizeof(uint32_t)),
        sums_(round_up(directions, W) * kParts * W * sizeof(float)) {
    std::memset(parts_.as<uint32_t>(), 0, kParts * E::MR * kStep * sizeof(uint32_t));
  }

  void load_directions(const DirectionBlock<BFloat16>& v) {
    some_ = v.some;
    const int64_t panels = ceil_div(v.columns, E::NR);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t j = 0; j < v.some; j += W) {
        const View<BFloat16> row{v.at(j, r), v.stride.direction, v.stride.column};
        const int64_t few = r < v.count ? smaller(W, v.some - j) : 0;
        // Rows are too far apart for the hardware to see what is read next.
        for (int64_t i = 0; !v.stride.side_by_side() && r + 1 < v.count && i < few; ++i)
          for (int64_t p = 0; p < panels; ++p)
            __builtin_prefetch(row.from_row(i).data + v.stride.row + p * E::NR, 0, 2);
        for (int64_t p = 0; p < panels; ++p)
          for_pair_depths({row.data + p * E::NR * row.depth, row.row, row.depth}, few,
                          smaller<int64_t>(E::NR, v.columns - p * E::NR),
                          [&](int64_t q, VecU pairs) { store(direction_step(p, j, r) + q * W, pairs); });
      }
    }
  }

  void start() { std::memset(sums_.as<float>(), 0, round_up(some_, W) * kParts * W * sizeof(float)); }

  float* tile(int64_t x) { return tiles_[x % 2]; }

  void take(int64_t x, int64_t share) {
    constexpr int64_t kRows = E::MR / E::kShares;
    for (int64_t r = share * kRows; r < (share + 1) * kRows; ++r) {
      __m512 low = (__m512)load(tile(x) + r * E::NR), high = (__m512)load(tile(x) + r * E::NR + W);
      for (int64_t part = 0; part < kParts; ++part) {
        const __m512 first = leading(low), second = leading(high);
        store(part_step(part, r) + x * W, bits_as<VecU>(_mm512_cvtne2ps_pbh(second, first)));
        low = _mm512_sub_ps(low, first);
        high = _mm512_sub_ps(high, second);
      }
    }
  }

  void add_panel(int64_t p, int64_t q) {
    memory_fence();
    for (int64_t j = 0; j < some_; j += W) {
      float* sums = sums_.as<float>() + j * kParts * W;
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + W * W, 64);
      _tile_loadd(2, sums + 2 * W * W, 64);
      const uint32_t* direction = direction_step(p, j, q * E::MR);
      for (int64_t r = 0; r < E::MR; ++r, direction += kStep) {
        _tile_loadd(7, direction, 64);
        _tile_loadd(4, part_step(0, r), 64);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(5, part_step(1, r), 64);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(6, part_step(2, r), 64);
        _tile_dpbf16ps(2, 6, 7);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + W * W, 64);
      _tile_stored(2, sums + 2 * W * W, 64);
    }
    memory_fence();
  }

  double sum(int64_t j, int64_t x) const {
    const float* sums = sums_.as<float>() + j / W * kParts * W * W + x * W + j % W;
    return double(sums[0]) + double(sums[W * W]) + double(sums[2 * W * W]);
  }

 private:
  // The 8 leading bits: a bfloat16 that is never the larger one, so that no float overflows.
  static __m512 leading(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int(0xffff0000u))));
  }
  uint32_t* direction_step(int64_t p, int64_t j, int64_t r) const {
    return directions_.as<uint32_t>() + ((p * ceil_div(some_, W) + j / W) * rows_ + r) * kStep;
  }
  uint32_t* part_step(int64_t part, int64_t r) const { return parts_.as<uint32_t>() + (part * E::MR + r) * kStep; }

  int64_t rows_, some_ = 0;
  alignas(64) float tiles_[2][kArea];
  Buffer directions_, parts_, sums_;
};

// A block of 16 directions costs the tile unit as much as one of them.
template <>
struct Contractions<TileEngine, BFloat16> {
  static constexpr int64_t kMany = 8;
  using Few = VectorContraction<TileEngine, BFloat16>;
  using Many = TileContraction;
  using SideBySide = TileContraction;
};

}  // namespace
}  // namespace u2a
