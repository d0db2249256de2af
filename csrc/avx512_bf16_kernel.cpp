#if defined(__x86_64__)
#include "target.h"
U2A_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define U2A_VECTOR_BYTES 64
#define U2A_ROUNDS_BF16
#include "bf16_pack.h"
#include "kernel_set.h"

namespace u2a {
namespace {

// The float engine's tile, two depths an instruction.
struct PairEngine {
  using Accumulate = float;
  using Intermediate = BFloat16;
  using Packed = uint32_t;
  static constexpr int MR = 12, NR = 32, W = 16, kShares = 1;
  static constexpr int kDepth = 2, kProductThirds = 4, kDirectionTokens = 15;
  struct Scope {};

  static int64_t a_panel_size(int64_t k) { return round_up(k, 2 * W) / 2 * MR; }
  static int64_t b_panel_size(int64_t k) { return round_up(k, 2 * W) / 2 * NR; }

  static void pack_a(View<BFloat16> source, int64_t count, int64_t k, Packed* panel) {
    for_pair_depths(source, count, k, [&](int64_t q, VecU pairs) { store(panel + q * MR, pairs); });
  }
  static void pack_b(View<BFloat16> source, int64_t count, int64_t k, Packed* panel) {
    for (int64_t half = 0; half < NR; half += W) {
      for_pair_depths(source.from_row(half), count - half, k,
                      [&](int64_t q, VecU pairs) { store(panel + q * NR + half, pairs); });
    }
  }

  static void pack_dotted(View<BFloat16> source, int64_t count, int64_t k, Packed* panel) {
    for_even_and_odd(source, count, k,
                     [&](int64_t q, int64_t half, VecU pairs) { store(panel + q * NR + half * W, pairs); });
  }
  static int64_t column_of(int64_t x) { return even_or_odd_column(x); }
  static void add_dot(const BFloat16* g, const float* row, VecF* sum) { add_even_and_odd(g, row, sum); }

  // A panel of B from `count` rows of NR sums, one a depth.
  static const Packed* pack_rows(const float* rows, int64_t count, Packed* panel) {
    for (int64_t q = 0; q < round_up(count, 2) / 2; ++q)
      for (int half = 0; half < NR; half += W) store(panel + q * NR + half, rounded_pairs(rows + half, NR, q, count));
    return panel;
  }

  // A panel of A from MR rows of NR sums, the depths.
  static const Packed* pack_a_rows(const float* rows, Packed* panel) {
    PairSquare square;
    for (int r = 0; r < W; ++r) square.lanes[r] = r < MR ? rounded_row(rows + r * NR) : VecU{};
    transpose(square.lanes);
    for (int q = 0; q < W; ++q) store(panel + q * MR, square.lanes[q]);
    return panel;
  }
  static void multiply_rows(const Packed* a, const Packed* b, int64_t k, float* c, int64_t ldc, bool add) {
    multiply(a, b, k, c, ldc, add);
  }

  template <class Beside = NothingBeside>
  static void multiply(const Packed* a, const Packed* b, int64_t k, float* c, int64_t ldc, bool add,
                       const Beside& beside = {}) {
    __m512 sum[MR][2];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      sum[r][0] = add ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
      sum[r][1] = add ? _mm512_loadu_ps(c + r * ldc + W) : _mm512_setzero_ps();
    }
    for (int64_t q = 0; q < (k + 1) / 2; ++q) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + q * NR), b1 = (__m512bh)_mm512_loadu_si512(b + q * NR + W);
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[q * MR + r]));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, b1);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      _mm512_storeu_ps(c + r * ldc, sum[r][0]);
      _mm512_storeu_ps(c + r * ldc + W, sum[r][1]);
    }
    beside(0);
  }
};

}  // namespace

const Kernels kAvx512Bf16 = kernel_set<Bf16Set<PairEngine>>("AVX-512 BF16");
}  // namespace u2a
U2A_TARGET_END
#endif
