// float32 on the tile unit: a float is the sum of three bfloat16, of whose nine products six are added up.
//
// With parts rounded to nearest, |x - high| <= 2^-9 |x| and so on: the three products left out are below 2^-25 of a
// product, less than a float's own rounding (Henry, Tang and Heinecke 2019, arXiv:1904.06376). Values below 2^-102 lose
// the parts that would be denormal; an infinity gives NaN where it would give an infinity.
#if defined(__x86_64__)
#include "target.h"
U2A_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,avx512bf16")
#define U2A_VECTOR_BYTES 64
#include "bf16_pack.h"
#include "linear_logprob.h"
#include "tiles.h"

namespace u2a {
namespace {

// x, or the next smaller bfloat16 where the nearest one would be an infinity.
inline __m512 without_overflow(__m512 x) {
  const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0x1.ffp127f), _CMP_GE_OQ);
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(_mm512_castps_si512(x), large, _mm512_castps_si512(x),
                                                   _mm512_set1_epi32(int(0xffff0000u))));
}

inline __m512 widened_half(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// x less its part; 0 where that is an infinity.
inline __m512 rest_of(__m512 x, __m512 part) {
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
  return _mm512_maskz_sub_ps(finite, x, part);
}

// 32 values as 16 pairs, in three parts.
inline void split(const float* from, VecU* high, VecU* middle, VecU* low) {
  __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
  const auto round_off = [&](__m512 x, __m512 y) {
    const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(y, x);
    first = rest_of(first, widened_half(_mm512_castsi512_si256(pairs)));
    second = rest_of(second, widened_half(_mm512_extracti64x4_epi64(pairs, 1)));
    return bits_as<VecU>(pairs);
  };
  *high = round_off(without_overflow(first), without_overflow(second));
  *middle = round_off(first, second);
  *low = round_off(first, second);
}

// Panels: per 32 depths the tiles of the three parts, two a part, laid out as TileEngine's.
struct SplitEngine {
  using Accumulate = float;
  using Packed = uint32_t;
  static constexpr int MR = 32, NR = 32, W = 16, kTile = 16 * 16, kParts = 3;
  using Scope = TileScope;

  static int64_t a_panel_size(int64_t k) { return ceil_div(k, 2 * W) * kParts * 2 * kTile; }
  static int64_t b_panel_size(int64_t k) { return a_panel_size(k); }

  static void pack_a(View<float> source, int64_t count, int64_t k, Packed* panel) {
    for_squares(source, count, k, panel, [](VecU(&)[W]) {});
  }
  static void pack_b(View<float> source, int64_t count, int64_t k, Packed* panel) {
    for_squares(source, count, k, panel, [](VecU(&lanes)[W]) { transpose(lanes); });
  }

  static void multiply(const Packed* a, const Packed* b, int64_t k, float* c, int64_t ldc, bool add) {
    start_sums(c, ldc, add);
    // Parts 0 to 2 are high, middle and low. In this order all steps but the first load the tiles of one operand only.
    for (int64_t j = 0; j < k; j += 2 * W, a += kParts * 2 * kTile, b += kParts * 2 * kTile) {
      load_a(a, 2);
      load_b(b, 0);
      add_products();
      load_a(a, 1);
      add_products();
      load_b(b, 1);
      add_products();
      load_a(a, 0);
      add_products();
      load_b(b, 2);
      add_products();
      load_b(b, 0);
      add_products();
    }
    store_sums(c, ldc);
  }

 private:
  static void load_a(const Packed* a, int64_t part) {
    _tile_loadd(4, a + part * 2 * kTile, 64);
    _tile_loadd(5, a + (part * 2 + 1) * kTile, 64);
  }
  static void load_b(const Packed* b, int64_t part) {
    _tile_loadd(6, b + part * 2 * kTile, 64);
    _tile_loadd(7, b + (part * 2 + 1) * kTile, 64);
  }
  static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // Squares of 16 rows and 16 pairs of depths, `arrange`d as a tile wants them.
  template <class Arrange>
  static void for_squares(View<float> source, int64_t count, int64_t k, Packed* panel, const Arrange& arrange) {
    for (int64_t k0 = 0; k0 < k; k0 += 2 * W, panel += kParts * 2 * kTile)
      for (int64_t half = 0; half < 2; ++half) {
        VecU parts[kParts][W];
        for (int64_t i = 0; i < W; ++i) {
          alignas(64) float copy[2 * W];
          const float* row = depths(source.from_row(half * W + i), half * W + i < count, k0, k, copy);
          split(row, &parts[0][i], &parts[1][i], &parts[2][i]);
        }
        for (int64_t part = 0; part < kParts; ++part) {
          arrange(parts[part]);
          for (int64_t i = 0; i < W; ++i) store(panel + (part * 2 + half) * kTile + i * W, parts[part][i]);
        }
      }
  }

  // 32 depths of a row from k0 on, in `copy` where they do not lie there; zeros outside the operand.
  static const float* depths(View<float> row, bool there, int64_t k0, int64_t k, float* copy) {
    if (there && row.depth == 1 && k0 + 2 * W <= k) return row.data + k0;
    for (int64_t j = 0; j < 2 * W; ++j) copy[j] = there && k0 + j < k ? row.data[(k0 + j) * row.depth] : 0;
    return copy;
  }
};

}  // namespace

void linear_logprob_on_tiles(const LinearLogprob& op, const Parallel& parallel) {
  linear_logprob_with<SplitEngine, float>(op, parallel);
}
}  // namespace u2a
U2A_TARGET_END
#endif
