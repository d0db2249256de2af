// Packing of bfloat16 for the instructions that multiply pairs of neighbors along k.
//
// A pair is one 32-bit lane, so that the pair panels of AVX-512 BF16 are float panels of half the depth: pair (r, q) of
// a panel of width P lies at q * P + r. The tile registers of AMX take the same for B (P = 16) and rows of 16 pairs for
// A.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// pairs[q][i]: elements (i, 2 q) and (i, 2 q + 1) of rows i < count at depths from k0 on; zeros outside count and k.
struct PairSquare {
  static constexpr int W = kLanes<float>;
  VecU lanes[W];

  // Loads; true if lanes[i] holds row i's pairs, false if lanes[q] holds depth q's.
  bool load(View<BFloat16> source, int64_t count, int64_t k0, int64_t k) {
    const bool whole = k0 + 2 * W <= k;
    if (source.depth == 1 && whole) {
      if (count >= W) {
        for (int i = 0; i < W; ++i) lanes[i] = load_pairs(source.data + i * source.row + k0);
      } else {
        for (int i = 0; i < W; ++i) lanes[i] = i < count ? load_pairs(source.data + i * source.row + k0) : VecU{};
      }
      return true;
    }
    if (source.row == 1 && whole && count >= W) {
      for (int q = 0; q < W; ++q) {
        const BFloat16* p = source.data + (k0 + 2 * q) * source.depth;
        lanes[q] = widened(p) | (widened(p + source.depth) << 16);
      }
      return false;
    }
    for (int i = 0; i < W; ++i) {
      for (int q = 0; q < W; ++q) {
        lanes[i][q] = at(source, count, i, k0 + 2 * q, k) | (at(source, count, i, k0 + 2 * q + 1, k) << 16);
      }
    }
    return true;
  }

 private:
  static VecU load_pairs(const BFloat16* p) {
    VecU x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static VecU widened(const BFloat16* p) {
    HalfVecU16 x;
    std::memcpy(&x, p, sizeof(x));
    return zero_extended(x);
  }
  static uint32_t at(View<BFloat16> source, int64_t count, int64_t i, int64_t j, int64_t k) {
    return i < count && j < k ? source.data[i * source.row + j * source.depth].bits : 0u;
  }
};

// What memory needs to answer takes as long as this many squares.
constexpr int64_t kSquaresAhead = 8;

// Packs rows of pairs: store(q, lanes) receives, for each pair of depths q in order, the pairs of the square's rows.
template <class Store>
void for_pair_depths(View<BFloat16> source, int64_t count, int64_t k, const Store& store_lanes) {
  for (int64_t k0 = 0; k0 < k; k0 += 2 * PairSquare::W) {
    PairSquare square;
    // Rows are too far apart for the hardware to see what is read next.
    for (int64_t i = 0; source.depth == 1 && i < smaller<int64_t>(PairSquare::W, count); ++i)
      __builtin_prefetch(source.data + i * source.row + k0 + kSquaresAhead * 2 * PairSquare::W);
    if (square.load(source, count, k0, k)) transpose(square.lanes);
    for (int q = 0; q < PairSquare::W; ++q) store_lanes(k0 / 2 + q, square.lanes[q]);
  }
}

// The even columns of a panel of B for its first half, the odd ones for the second: of 32 values of g in one load,
// a shift makes floats of the even ones and a mask of the odd ones.
template <class Store>
void for_even_and_odd(View<BFloat16> source, int64_t count, int64_t k, const Store& store_lanes) {
  for (int64_t half = 0; half < 2; ++half)
    for_pair_depths({source.data + half * source.row, 2 * source.row, source.depth}, ceil_div(count - half, 2), k,
                    [&](int64_t q, VecU pairs) { store_lanes(q, half, pairs); });
}
inline int64_t even_or_odd_column(int64_t x) { return x % PairSquare::W * 2 + x / PairSquare::W; }
inline void add_even_and_odd(const BFloat16* g, const float* row, VecF* sum) {
  VecU pairs;
  std::memcpy(&pairs, g, sizeof(pairs));
  *sum += bits_as<VecF>(pairs << 16) * load(row);
  *sum += bits_as<VecF>(pairs & 0xffff0000u) * load(row + PairSquare::W);
}

// The W floats of `high` behind those of `low`, rounded.
inline VecU rounded(VecF low, VecF high) { return bits_as<VecU>(_mm512_cvtne2ps_pbh((__m512)high, (__m512)low)); }

// Rows 2 q and 2 q + 1 of `count` rows, `stride` apart, rounded and joined to pairs; a row beyond them is zero.
inline VecU rounded_pairs(const float* rows, int64_t stride, int64_t q, int64_t count) {
  const float* even = rows + 2 * q * stride;
  const VecF low = 2 * q < count ? load(even) : VecF{};
  const VecF high = 2 * q + 1 < count ? load(even + stride) : VecF{};
  VecU order{};
  for (uint32_t i = 0; i < kLanes<float>; ++i) order[i] = i | (i + kLanes<float>) << 16;
  return bits_as<VecU>(_mm512_permutexvar_epi16((__m512i)order, (__m512i)rounded(low, high)));
}

// 2 W sums in order, rounded.
inline VecU rounded_row(const float* row) { return rounded(load(row), load(row + kLanes<float>)); }

}  // namespace
}  // namespace u2a
