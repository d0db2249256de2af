// float32 on the tile unit: a float is the sum of three bfloat16, of whose nine products six are added up.
//
// With parts rounded to nearest, |x - high| <= 2^-9 |x| and so on: the three products left out are below 2^-25 of a
// product, less than a float's own rounding (Henry, Tang and Heinecke 2019, arXiv:1904.06376). Values below 2^-102 lose
// the parts that would be denormal; an infinity gives NaN where it would give an infinity.
#if defined(__x86_64__)
#include "target.h"
U2A_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,avx512bf16")
#define U2A_VECTOR_BYTES 64
#include "ghost_dot.h"
#include "linear_logprob.h"
#include "tiles.h"

namespace u2a {
namespace {

// The first `count` of 16 values, zeros for the others, which are not read.
inline __m512 load_first(const float* from, int64_t count) {
  if (count >= 16) return _mm512_loadu_ps(from);
  return _mm512_maskz_loadu_ps(count > 0 ? (1u << count) - 1 : 0, from);
}

inline VecU upper_half(VecU bits) { return bits & 0xffff0000u; }

// From here on the nearest bfloat16 is an infinity.
constexpr float kLargeFloat = 0x1.ffp127f;

// The nearest bfloat16, of two the one away from zero; of a large float the next smaller one, of an infinity itself, of
// a NaN a NaN or an infinity. Where kNormal there is none of these.
template <bool kNormal>
inline __m512 nearest(__m512 x) {
  const VecU bits = bits_as<VecU>(x);
  const __m512 near = bits_as<__m512>(upper_half(bits + 0x8000u));
  if constexpr (kNormal) return near;
  const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(kLargeFloat), _CMP_NLT_UQ);
  return _mm512_mask_mov_ps(near, large, bits_as<__m512>(upper_half(bits)));
}

// x less its part; 0 where that is an infinity.
template <bool kNormal>
inline __m512 rest_of(__m512 x, __m512 part) {
  if constexpr (kNormal) return _mm512_sub_ps(x, part);
  const __mmask16 other = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return _mm512_maskz_sub_ps(other, x, part);
}

constexpr int kParts = 3;

// 16 rows by 32 depths in three parts; depths j and j + 16 are a pair.
struct SplitSquare {
  static constexpr int W = kLanes<float>;
  VecU lanes[kParts][W];

  // lanes[.][i]: row i's pairs where `by_row`, else pair i of every row; zeros outside count and k.
  void load(View<float> source, int64_t count, int64_t k0, int64_t k, bool by_row) {
    const bool along_depth = source.depth == 1;
    VecF halves[2][W];
    VecU largest{};
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = k0 + half * W, vectors = along_depth ? count : k - first;
      const int64_t step = along_depth ? source.row : source.depth, length = along_depth ? k - first : count;
      const float* from = source.data + first * source.depth;
      for (int64_t i = 0; i < W; ++i, from += step) {
        const __m512 x = load_first(from, i < vectors ? length : 0);
        const VecU magnitude = bits_as<VecU>(x) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
        halves[half][i] = bits_as<VecF>(x);
      }
      if (along_depth != by_row) transpose(halves[half]);
    }
    // The bits of positive floats have the order of the floats.
    if (_mm512_cmplt_epu32_mask((__m512i)largest, _mm512_castps_si512(_mm512_set1_ps(kLargeFloat))) == 0xffff)
      split<true>(halves);
    else
      split<false>(halves);
  }

 private:
  template <bool kNormal>
  void split(const VecF (&halves)[2][W]) {
    for (int i = 0; i < W; ++i) {
      __m512 first = (__m512)halves[0][i], second = (__m512)halves[1][i];
      for (int part = 0; part + 1 < kParts; ++part) {
        const __m512 x = nearest<kNormal>(first), y = nearest<kNormal>(second);
        lanes[part][i] = joined(x, y);
        first = rest_of<kNormal>(first, x);
        second = rest_of<kNormal>(second, y);
      }
      lanes[kParts - 1][i] = joined(first, second);  // at most 8 bits are left
    }
  }
  static VecU joined(__m512 x, __m512 y) { return bits_as<VecU>(x) >> 16 | upper_half(bits_as<VecU>(y)); }
};

// Panels: per 32 depths the tiles of the three parts, two a part, laid out as TileEngine's.
struct SplitEngine {
  using Accumulate = float;
  using Packed = uint32_t;
  static constexpr int MR = 32, NR = 32, W = 16, kTile = 16 * 16, kShares = 8;
  static constexpr int kDepth = 1, kProductThirds = 6, kDirectionTokens = 7;  // of the tile form beside it
  using Scope = TileScope;

  static int64_t a_panel_size(int64_t k) { return ceil_div(k, 2 * W) * kParts * 2 * kTile; }
  static int64_t b_panel_size(int64_t k) { return a_panel_size(k); }

  static void pack_a(View<float> source, int64_t count, int64_t k, Packed* panel) {
    pack(source, count, k, panel, true);
  }
  static void pack_b(View<float> source, int64_t count, int64_t k, Packed* panel) {
    pack(source, count, k, panel, false);
  }
  static void pack_dotted(View<float> source, int64_t count, int64_t k, Packed* panel) {
    pack_b(source, count, k, panel);
  }
  static int64_t column_of(int64_t x) { return x; }
  static void add_dot(const float* g, const float* row, VecF* sum) { add_products(g, row, NR, sum); }

  // The vector units are free while the tile unit multiplies: `beside` has its shares between products.
  template <class Beside = NothingBeside>
  static void multiply(const Packed* a, const Packed* b, int64_t k, float* c, int64_t ldc, bool add,
                       const Beside& beside = {}) {
    start_sums(c, ldc, add);
    int64_t share = 0;
    const auto add_parts = [&] {
      add_tiles();
      if (share < kShares) beside(share++);
    };
    // Parts 0 to 2 are high, middle and low. In this order all steps but the first load the tiles of one operand only.
    for (int64_t j = 0; j < k; j += 2 * W, a += kParts * 2 * kTile, b += kParts * 2 * kTile) {
      load_a(a, 2);
      load_b(b, 0);
      add_parts();
      load_a(a, 1);
      add_parts();
      load_b(b, 1);
      add_parts();
      load_a(a, 0);
      add_parts();
      load_b(b, 2);
      add_parts();
      load_b(b, 0);
      add_parts();
    }
    while (share < kShares) beside(share++);
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
  static void add_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  static void pack(View<float> source, int64_t count, int64_t k, Packed* panel, bool by_row) {
    for (int64_t k0 = 0; k0 < k; k0 += 2 * W, panel += kParts * 2 * kTile)
      for (int64_t half = 0; half < 2; ++half) {
        SplitSquare square;
        square.load(source.from_row(half * W), count - half * W, k0, k, by_row);
        for (int part = 0; part < kParts; ++part)
          for (int64_t i = 0; i < W; ++i) store(panel + (part * 2 + half) * kTile + i * W, square.lanes[part][i]);
      }
  }
};

}  // namespace

// The tile form stays with the vector units: its panels, half as large again in three parts, come from the level-2
// cache for every tile, and that is what it then waits for.
void ghost_dot_on_tiles(const GhostDot& op, const Parallel& parallel) {
  ghost_dot_with<SplitEngine, float, Avx512FloatEngine>(op, parallel);
}
void linear_logprob_on_tiles(const LinearLogprob& op, const Parallel& parallel) {
  linear_logprob_with<SplitEngine, float>(op, parallel);
}
}  // namespace u2a
U2A_TARGET_END
#endif
