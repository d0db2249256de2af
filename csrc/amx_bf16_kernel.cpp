#if defined(__x86_64__)
#include "target.h"
U2A_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16,avx512bf16")
#define U2A_VECTOR_BYTES 64
#define U2A_ROUNDS_BF16
#include "bf16_pack.h"
#include "kernel_set.h"
#include "tiles.h"

namespace u2a {
namespace {

// 2 x 2 sums of 16 x 16 from two tiles of A and two of B: each loaded tile is used twice.
// A panel: per 32 depths two tiles of 16 rows x 16 pairs. B panel: per 32 depths two tiles of 16 pairs x 16 columns.
struct TileEngine {
  using Accumulate = float;
  using Intermediate = BFloat16;
  using Packed = uint32_t;
  static constexpr int MR = 32, NR = 32, W = 16, kTile = 16 * 16, kShares = 8;
  static constexpr int kDepth = 32, kProductThirds = 6, kDirectionTokens = 20;
  using Scope = TileScope;

  static int64_t a_panel_size(int64_t k) { return ceil_div(k, 2 * W) * 2 * kTile; }
  static int64_t b_panel_size(int64_t k) { return a_panel_size(k); }

  static void pack_a(View<BFloat16> source, int64_t count, int64_t k, Packed* panel) {
    int64_t k0 = 0;
    if (source.depth == 1 && count >= MR) {
      // Row after row, not square after square: the hardware prefetches what is read in order.
      k0 = k / (2 * W) * (2 * W);
      for (int64_t i = 0; i < MR; ++i)
        for (int64_t j = 0; j < k0; j += 2 * W)
          std::memcpy(panel + (j / W + i / W) * kTile + i % W * W, source.data + i * source.row + j, 64);
    }
    for (; k0 < k; k0 += 2 * W) {
      for (int64_t half = 0; half < 2; ++half) {
        PairSquare square;
        if (!square.load(source.from_row(half * W), count - half * W, k0, k)) transpose(square.lanes);
        for (int i = 0; i < W; ++i) store(panel + (k0 / W + half) * kTile + i * W, square.lanes[i]);
      }
    }
  }
  static void pack_b(View<BFloat16> source, int64_t count, int64_t k, Packed* panel) {
    for (int64_t half = 0; half < 2; ++half) {
      for_pair_depths(source.from_row(half * W), count - half * W, k,
                      [&](int64_t q, VecU pairs) { store(b_row(panel, q, half), pairs); });
    }
  }
  static void pack_dotted(View<BFloat16> source, int64_t count, int64_t k, Packed* panel) {
    for_even_and_odd(source, count, k,
                     [&](int64_t q, int64_t half, VecU pairs) { store(b_row(panel, q, half), pairs); });
  }
  static int64_t column_of(int64_t x) { return even_or_odd_column(x); }
  static void add_dot(const BFloat16* g, const float* row, VecF* sum) { add_even_and_odd(g, row, sum); }

  // A panel of B from `count` rows of NR sums, one a depth.
  static const Packed* pack_rows(const float* rows, int64_t count, Packed* panel) {
    for (int64_t q = 0; q < round_up(count, 2 * W) / 2; ++q)
      for (int64_t half = 0; half < 2; ++half)
        store(b_row(panel, q, half), rounded_pairs(rows + half * W, NR, q, count));
    return panel;
  }

  // A panel of A from MR rows of NR sums, the depths.
  static const Packed* pack_a_rows(const float* rows, Packed* panel) {
    for (int64_t r = 0; r < MR; ++r) store(panel + r * W, rounded_row(rows + r * NR));
    return panel;
  }
  static void multiply_rows(const Packed* a, const Packed* b, int64_t k, float* c, int64_t ldc, bool add) {
    multiply(a, b, k, c, ldc, add);
  }

  // The vector units are free while the tile unit multiplies: its first steps have a share of `beside` each.
  template <class Beside = NothingBeside>
  static void multiply(const Packed* a, const Packed* b, int64_t k, float* c, int64_t ldc, bool add,
                       const Beside& beside = {}) {
    multiply_tiles(a, a + kTile, 2 * kTile, 64, b, k, c, ldc, add, beside);
  }

  // The tiles of A's upper and lower 16 rows, their rows `stride` bytes apart, each `next` elements before its next.
  template <class T, class Beside = NothingBeside>
  static void multiply_tiles(const T* upper, const T* lower, int64_t next, int64_t stride, const Packed* b, int64_t k,
                             float* c, int64_t ldc, bool add, const Beside& beside = {}) {
    start_sums(c, ldc, add);
    const int64_t steps = ceil_div(k, 2 * W);
    for (int64_t step = 0; step < steps; ++step, upper += next, lower += next, b += 2 * kTile) {
      add_step(upper, lower, stride, b);
      if (step < kShares) beside(step);
    }
    for (int64_t share = steps; share < kShares; ++share) beside(share);
    store_sums(c, ldc);
  }

  // The same for tiles one after the other: c, its rows NR apart, receives the sums of the call before, each register
  // while the one before it is already multiplied again, and is then what `beside` works on. These sums are stored by
  // the next call or by store_sums.
  template <class T, class Beside>
  static void multiply_next(const T* upper, const T* lower, int64_t next, int64_t stride, const Packed* b, int64_t k,
                            float* c, const Beside& beside) {
    constexpr int64_t kRowBytes = NR * sizeof(float);
    memory_fence();
    _tile_loadd(4, upper, stride);
    _tile_loadd(6, b, 64);
    _tile_stored(0, c, kRowBytes);
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, 64);
    _tile_stored(1, c + W, kRowBytes);
    _tile_zero(1);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, stride);
    _tile_stored(2, c + W * NR, kRowBytes);
    _tile_zero(2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_stored(3, c + W * NR + W, kRowBytes);
    _tile_zero(3);
    _tile_dpbf16ps(3, 5, 7);
    memory_fence();
    beside(0);
    const int64_t steps = ceil_div(k, 2 * W);
    for (int64_t step = 1; step < steps; ++step) {
      upper += next, lower += next, b += 2 * kTile;
      add_step(upper, lower, stride, b);
      if (step < kShares) beside(step);
    }
    for (int64_t share = larger<int64_t>(1, steps); share < kShares; ++share) beside(share);
  }

 private:
  template <class T>
  static void add_step(const T* upper, const T* lower, int64_t stride, const Packed* b) {
    _tile_loadd(4, upper, stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  static Packed* b_row(Packed* panel, int64_t q, int64_t half) {
    return panel + (q / W * 2 + half) * kTile + q % W * W;
  }
};

// Tiles are loaded from the rows themselves where these are whole.
template <>
class RowBlock<TileEngine, BFloat16> {
  using E = TileEngine;

 public:
  RowBlock() : panel_(E::MR, kStretch<BFloat16>, true) {}

  void load(View<BFloat16> rows, int64_t count, int64_t k) {
    rows_ = rows;
    whole_ = count >= E::MR && k % (2 * E::W) == 0;
    if (!whole_) E::pack_a(rows, count, k, panel_.at(0));
  }

  void multiply(const uint32_t* b, int64_t k, float* c, int64_t ldc, bool add) const {
    if (whole_)
      E::multiply_tiles(rows_.data, rows_.data + E::W * rows_.row, 2 * E::W, rows_.row * sizeof(BFloat16), b, k, c, ldc,
                        add);
    else
      E::multiply(panel_.at(0), b, k, c, ldc, add);
  }

 private:
  Panels<E> panel_;
  View<BFloat16> rows_{nullptr, 0, 1};
  bool whole_ = false;
};

// Tiles are loaded from the rows themselves, or from a copy where 32 rows would split lines or evict each other from
// the level-1 cache: it holds 8 lines of each where their distance is no multiple of 2 KiB.
template <>
class LongRows<TileEngine, BFloat16> {
  using E = TileEngine;

 public:
  LongRows(View<BFloat16> a, int64_t rows, int64_t depth, bool kept)
      : a_(a),
        rows_(rows),
        depth_(depth),
        stride_(round_up(depth, kLine) + kLine),
        in_place_(depth % kLine == 0 && a.row % kLine == 0 && a.row % (32 * kLine) != 0 &&
                  reinterpret_cast<uintptr_t>(a.data) % 64 == 0),
        kept_(kept && !in_place_),
        copy_((kept_ ? round_up(rows, E::MR) : E::MR) * stride_ * sizeof(BFloat16)) {}

  void load(int64_t r) {
    next_ = {a_.data + (r + E::MR) * a_.row, a_.row, E::MR, depth_};
    if (reads_in_place(r)) return;
    BFloat16* to = copy_.as<BFloat16>() + copied(r) * stride_;
    for (int64_t i = 0; i < E::MR; ++i, to += stride_) {
      const int64_t kept = i < rows_ - r ? depth_ : 0;
      std::memcpy(to, a_.data + (kept ? r + i : r) * a_.row, kept * sizeof(BFloat16));
      std::memset(to + kept, 0, (stride_ - kept) * sizeof(BFloat16));
    }
  }

  template <class Beside>
  void multiply(int64_t r, int64_t depth, const uint32_t* b, int64_t k, float* c, const Beside& beside) {
    const bool here = reads_in_place(r);
    const int64_t row = here ? a_.row : stride_;
    const BFloat16* upper = (here ? a_.data + r * row : copy_.as<BFloat16>() + copied(r) * row) + depth;
    E::multiply_next(upper, upper + E::W * row, kLine, row * sizeof(BFloat16), b, k, c, [&](int64_t share) {
      beside(share);
      next_.ask(kLines);
    });
  }
  void finish(float* c) const { store_sums(c, E::NR); }

 private:
  // So many a share are all of the next panel where B has 256 columns.
  static constexpr int64_t kLine = 64 / sizeof(BFloat16), kLines = 4;

  bool reads_in_place(int64_t r) const { return in_place_ && r + E::MR <= rows_; }
  int64_t copied(int64_t r) const { return kept_ ? r : 0; }

  View<BFloat16> a_;
  int64_t rows_, depth_, stride_;
  bool in_place_, kept_;
  Buffer copy_;
  RowsAhead<BFloat16> next_;
};

}  // namespace
}  // namespace u2a

#include "amx_contraction.h"

namespace u2a {
const Kernels kAmxBf16 = kernel_set<Bf16Set<TileEngine>>("AMX BF16");
}  // namespace u2a
U2A_TARGET_END
#endif
