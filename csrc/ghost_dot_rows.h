// The row form of ghost_dot: tiles of V_k a_t are dotted with g as they are made, 2 K N I O flops.
//
// A dot with g is linear, so depths are blocked without ever adding up a tile: the tile of every block of depths is
// dotted on its own. A token's sum runs over o and i in a fixed order, in double between blocks.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// Asks memory for rows that are needed next, in the order of memory, in which the hardware reads on by itself. Behind
// the last row of a matrix there may be anything, since nothing is read.
template <class T>
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const T* first, int64_t stride, int64_t rows, int64_t columns)
      : row_(first), stride_(stride), rows_(rows), columns_(columns) {}

  void ask(int64_t lines) {
    for (int64_t line = 0; line < lines && rows_ > 0; ++line) {
      __builtin_prefetch(row_ + column_, 0, 2);
      column_ += 64 / sizeof(T);
      if (column_ < columns_) continue;
      column_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const T* row_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, columns_ = 0, column_ = 0;
};

// Rows of A, each `depth` long, as the row form multiplies them. Where no other pass needs them they are not kept: MR
// rows take the place of those before, which the caches still hold. This one packs; engines that need not have their
// own.
template <class E, class T>
class LongRows {
 public:
  LongRows(View<T> a, int64_t rows, int64_t depth, bool kept)
      : a_(a), rows_(rows), kept_(kept), panels_(kept ? rows : E::MR, depth, true) {}

  // Comes before the first product of the MR rows from r on.
  void load(int64_t r) {
    E::pack_a(a_.from_row(r), rows_ - r, panels_.depth(), panel(r));
    next_ = {a_.data + (r + E::MR) * a_.row, a_.row, E::MR, panels_.depth()};
  }

  // Those rows, k of their depths from `depth` on, times a panel of B. A tile may reach c (MR x NR) as late as in the
  // next call, which calls beside(share) for each of kShares while c holds it; finish(c) brings the last.
  template <class Beside>
  void multiply(int64_t r, int64_t depth, const typename E::Packed* b, int64_t k, typename E::Accumulate* c,
                const Beside& beside) {
    next_.ask(2 * E::MR);
    const auto* rows = panel(r) + E::a_panel_size(depth);
    if constexpr (E::kShares == 1) {
      beside(0);  // such a product writes c before it would call
      E::multiply(rows, b, k, c, E::NR, false);
    } else {
      E::multiply(rows, b, k, c, E::NR, false, beside);
    }
  }
  void finish(typename E::Accumulate*) const {}

 private:
  typename E::Packed* panel(int64_t r) const { return panels_.at(kept_ ? r : 0); }

  View<T> a_;
  int64_t rows_;
  bool kept_;
  Panels<E> panels_;
  RowsAhead<T> next_;
};

// Row sums of a panel's tiles times g, in vectors until the last tile is in.
template <class E, class T>
class RowDots {
  using S = typename E::Accumulate;
  using Mask = decltype(Vec<S>{} < Vec<S>{});
  static constexpr int W = kLanes<S>, kRows = E::MR / E::kShares;
  // The next panel is asked for in shares as large as those of this one: row after row beside the tile unit, which is
  // fast enough to wait for memory, else column after column, as it will be read.
  static constexpr bool kInOrder = E::kShares > 1;
  static constexpr int64_t kLines = kRows * (E::NR * int64_t(sizeof(T)) + 63) / 64;
  static_assert(E::MR % E::kShares == 0, "shares are equal");

 public:
  // Of rows `first` to first + count - 1 of g, `columns` of each from `column` on.
  RowDots(const View<T>& g, int64_t first, int64_t count, int64_t column, int64_t columns)
      : g_(g.from_row(first).data + column),
        stride_(g.row),
        count_(count),
        next_(g_ + E::MR * stride_, stride_, E::MR, columns) {}

  // Takes in a share of the rows of a tile of `columns` columns from `column` on.
  void add(const S* tile, int64_t column, int64_t columns, int64_t share) {
    const int64_t first = share * kRows, end = smaller(first + kRows, count_);
    const T* from = g_ + first * stride_ + column;
    const S* row = tile + first * E::NR;
    if constexpr (kInOrder) next_.ask(kLines);
    if (columns < E::NR) return add_part(from, row, columns, first, end);
    for (int64_t t = first; t < end; ++t, from += stride_, row += E::NR) {
      if constexpr (!kInOrder)
        for (int64_t c = 0; c < E::NR; c += 64 / sizeof(T)) __builtin_prefetch(from + E::MR * stride_ + c, 0, 2);
      E::add_dot(from, row, sum_ + t);
    }
  }

  double sum(int64_t t) const { return sum_lanes<S>(sum_[t]); }

 private:
  // Panels are padded with zeros, whose product with an infinity is not 0.
  void add_part(const T* from, const S* row, int64_t columns, int64_t first, int64_t end) {
    Mask inside[E::NR / W] = {};
    for (int v = 0; v < E::NR / W; ++v)
      for (int x = 0; x < W; ++x) inside[v][x] = E::column_of(v * W + x) < columns ? -1 : 0;
    T g[E::NR] = {};
    S kept[E::NR];
    for (int64_t t = first; t < end; ++t, from += stride_, row += E::NR) {
      std::memcpy(g, from, columns * sizeof(T));
      for (int v = 0; v < E::NR / W; ++v) store(kept + v * W, inside[v] ? load(row + v * W) : Vec<S>{});
      E::add_dot(g, kept, sum_ + t);
    }
  }

  const T* g_;
  int64_t stride_, count_;
  RowsAhead<T> next_;
  Vec<S> sum_[E::MR] = {};
};

// Sizes of blocks, from the bytes that each should take of a level-2 cache of 2 MiB and a level-1 cache of 32 KiB.
template <class E>
struct RowBlocking {
  static constexpr int64_t kUnit = 32;  // depths that every engine's panels can be cut at
  int64_t depth;                        // packed at once: 2 KiB a row, so that g is read rarely
  int64_t step;                         // multiplied at once: 16 KiB of a panel of A, which stays in the level-1 cache
  int64_t packed, cached;               // columns of B in all, and those that many rows use before the next

  RowBlocking(int64_t columns, int64_t i)
      : depth(even_share(i, 2048 / row_bytes())), step(even_share(depth, kPanelBytes / (E::MR * row_bytes()))) {
    const int64_t bytes = depth * row_bytes();
    packed = larger<int64_t>(E::NR, smaller(round_up(columns, E::NR), kSharedBytes / bytes / E::NR * E::NR));
    cached = larger<int64_t>(E::NR, smaller(packed, kColumnBytes / bytes / E::NR * E::NR));
  }

  static constexpr int64_t kMostRows = 512;

 private:
  static constexpr int64_t kPanelBytes = 16 << 10, kColumnBytes = 768 << 10;
  static int64_t row_bytes() { return E::b_panel_size(kUnit) * sizeof(typename E::Packed) / (E::NR * kUnit); }
  // At most `most`, as even as whole units allow.
  static int64_t even_share(int64_t whole, int64_t most) {
    const int64_t blocks = larger<int64_t>(1, ceil_div(whole, most / kUnit * kUnit));
    return larger<int64_t>(kUnit, round_up(ceil_div(whole, blocks), kUnit));
  }
};

// Dots of tokens with every direction: rows[k * n + t] = g_t^T V_k a_t for the tokens t of panels that are wanted.
template <class E, class T>
class TokenDots {
  using S = typename E::Accumulate;
  using Packed = typename E::Packed;

 public:
  TokenDots(const GhostDot& op, const Parallel& parallel, const bool* wanted, double* rows)
      : op_(op),
        parallel_(parallel),
        blocking_(op.o, op.i),
        a_(view<T>(op.a)),
        g_(view<T>(op.g)),
        v_{static_cast<const T*>(op.v.data), op.v.stride.row, 1},
        wanted_(wanted),
        rows_(rows) {}

  void run() {
    for (int64_t t = 0; t < op_.k * op_.n; ++t) rows_[t] = 0;
    const int64_t width = round_up(op_.o, E::NR), together = larger<int64_t>(1, blocking_.packed / width);
    for (int64_t i = 0; i < op_.i; i += blocking_.depth) {
      const int64_t depth = smaller(blocking_.depth, op_.i - i);
      Panels<E> b(together > 1 ? smaller(together, op_.k) * width : smaller(blocking_.packed, width), depth, false);
      for (int64_t k = 0; k < op_.k; k += together)
        for (int64_t o = 0; o < op_.o; o += blocking_.packed) add_part(b, i, k, smaller(together, op_.k - k), o);
    }
  }

 private:
  // Columns `o` on, as many as fit, of directions k to k + count - 1, at depths `i` on.
  void add_part(Panels<E>& b, int64_t i, int64_t k, int64_t count, int64_t o) {
    const int64_t columns = smaller(blocking_.packed, op_.o - o), width = round_up(columns, E::NR);
    for (int64_t j = 0; j < count; ++j) {
      const View<T> from = v_.from_row((k + j) * op_.o + o);
      b.pack_dotted(View<T>{from.data + i, from.row, 1}, columns, parallel_, j * width);
    }
    const auto add_rows = [&](int64_t first, int64_t rows) {
      LongRows<E, T> a({a_.from_row(first).data + i, a_.row, 1}, rows, b.depth(),
                       count > 1 || columns > blocking_.cached);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t c = 0; c < columns; c += blocking_.cached)
          for (int64_t r = 0; r < rows; r += E::MR) {
            if (!wanted_[(first + r) / E::MR]) continue;
            if (j == 0 && c == 0) a.load(r);
            const int64_t some = smaller(blocking_.cached, columns - c);
            RowDots<E, T> dots(g_, first + r, smaller<int64_t>(E::MR, rows - r), o + c, some);
            add_panel(a, r, b, j * width + c, some, dots);
            for (int64_t t = r; t < smaller(r + E::MR, rows); ++t)
              rows_[(k + j) * op_.n + first + t] += dots.sum(t - r);
          }
    };
    for_row_blocks<E>(op_.n, parallel_, add_rows, RowBlocking<E>::kMostRows);
  }

  // dots += g_t^T B a_t for the MR rows of A from r on and `columns` rows of B from `first` on. Tiles are one panel
  // wide, so that they and a step of the rows stay in the level-1 cache; a tile is dotted while the next is being
  // multiplied.
  void add_panel(LongRows<E, T>& a, int64_t r, const Panels<E>& b, int64_t first, int64_t columns,
                 RowDots<E, T>& dots) {
    constexpr int64_t kNone = -1;
    alignas(64) S tile[E::MR * E::NR];
    int64_t previous = kNone;
    const auto dot_previous = [&](int64_t share) {
      if (previous != kNone) dots.add(tile, previous, smaller<int64_t>(E::NR, columns - previous), share);
    };
    for (int64_t depth = 0; depth < b.depth(); depth += blocking_.step) {
      const int64_t k = smaller(blocking_.step, b.depth() - depth);
      for (int64_t c = 0; c < columns; c += E::NR) {
        a.multiply(r, depth, b.at(first + c) + E::b_panel_size(depth), k, tile, dot_previous);
        previous = c;
      }
    }
    a.finish(tile);
    for (int64_t share = 0; share < E::kShares; ++share) dot_previous(share);
  }

  const GhostDot& op_;
  const Parallel& parallel_;
  RowBlocking<E> blocking_;
  View<T> a_, g_, v_;
  const bool* wanted_;
  double* rows_;
};

}  // namespace
}  // namespace u2a
