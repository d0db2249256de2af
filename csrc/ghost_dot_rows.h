// The row form of ghost_dot: tiles of V_k a_t are dotted with g as they are made, 2 K N I O flops.
//
// A dot with g is linear, so depths are blocked without ever adding up a tile: the tile of every block of depths is
// dotted on its own. A token's sum runs over o and i in a fixed order, in double between blocks.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// sum += products of whole vectors of columns; returns the products of the columns left over.
template <class T, class S>
inline S add_products(const T* g, const S* u, int64_t columns, Vec<S>* sum) {
  constexpr int W = kLanes<S>;
  int64_t c = 0;
  for (; c + W <= columns; c += W) *sum += load(g + c) * load(u + c);
  S rest = 0;
  for (; c < columns; ++c) rest += scalar(g[c]) * u[c];
  return rest;
}

// Row sums of a panel's tiles times g, in vectors until the last tile is in.
template <class E, class T>
struct RowDots {
  using S = typename E::Accumulate;
  const T* g;
  int64_t stride, count;
  Vec<S> sum[E::MR] = {};
  S rest[E::MR] = {};

  // Takes in a share of the rows of a tile of `columns` columns from `column` on.
  void add(const S* tile, int64_t column, int64_t columns, int64_t share, int64_t shares) {
    const int64_t rows = ceil_div(E::MR, shares), first = share * rows, end = smaller(first + rows, count);
    const T* from = g + first * stride + column;
    const S* u = tile + first * E::NR;
    if (columns == E::NR) {
      for (int64_t t = first; t < end; ++t, from += stride, u += E::NR) add_products<T, S>(from, u, E::NR, sum + t);
    } else {
      for (int64_t t = first; t < end; ++t, from += stride, u += E::NR)
        rest[t] += add_products<T, S>(from, u, columns, sum + t);
    }
  }
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

  static constexpr int64_t kMostRows = 384;

 private:
  static constexpr int64_t kPanelBytes = 16 << 10, kColumnBytes = 512 << 10;
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
        v_(view<T>(op.v)),
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
      b.pack_b(View<T>{from.data + i, from.row, 1}, columns, parallel_, j * width);
    }
    const auto add_rows = [&](int64_t first, int64_t rows) {
      Panels<E> a(rows, b.depth(), true);
      for (int64_t r = 0; r < rows; r += E::MR)
        if (wanted_[(first + r) / E::MR])
          E::pack_a(View<T>{a_.from_row(first + r).data + i, a_.row, 1}, rows - r, b.depth(), a.at(r));
      for (int64_t j = 0; j < count; ++j)
        for (int64_t c = 0; c < columns; c += blocking_.cached)
          for (int64_t r = 0; r < rows; r += E::MR)
            if (wanted_[(first + r) / E::MR])
              add_panel(a.at(r), first + r, smaller<int64_t>(E::MR, rows - r), b, j * width + c,
                        smaller(blocking_.cached, columns - c), o + c, rows_ + (k + j) * op_.n);
    };
    for_row_blocks<E>(op_.n, parallel_, add_rows, RowBlocking<E>::kMostRows);
  }

  // rows[t] += g_t^T B a_t for the `count` rows of a panel of A and `columns` rows of B from `first` on, which are
  // features `o` on. Tiles are one panel wide, so that they and the panel of A stay in the level-1 cache; a tile is
  // dotted with g while the next is being multiplied.
  void add_panel(const Packed* a, int64_t row, int64_t count, const Panels<E>& b, int64_t first, int64_t columns,
                 int64_t o, double* rows) {
    RowDots<E, T> dots{g_.from_row(row).data + o, g_.row, count};
    alignas(64) S tile[2][E::MR * E::NR];
    int64_t previous = 0, made = 0;
    for (int64_t depth = 0; depth < b.depth(); depth += blocking_.step) {
      for (int64_t c = 0; c < columns; c += E::NR, ++made) {
        const S* finished = tile[1 - made % 2];
        E::multiply(a + E::a_panel_size(depth), b.at(first + c) + E::b_panel_size(depth),
                    smaller(blocking_.step, b.depth() - depth), tile[made % 2], E::NR, false,
                    [&](int64_t share, int64_t shares) {
                      if (made > 0)
                        dots.add(finished, previous, smaller<int64_t>(E::NR, columns - previous), share, shares);
                    });
        previous = c;
      }
    }
    dots.add(tile[1 - made % 2], previous, columns - previous, 0, 1);
    for (int64_t t = 0; t < count; ++t) rows[row + t] += double(sum_lanes<S>(dots.sum[t])) + double(dots.rest[t]);
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
