// ghost_dot: <V_k, G_i> = sum over the example's tokens t and over o of g[t, o] (V_k a_t)[o].
//
// Tiles of V_k a_t are dotted with g as they are made. A token's sum runs over o in a fixed order, an example's over
// its tokens in order, both in double where that costs nothing.
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

template <class T, class S>
S dot_row(const T* g, const S* u, int64_t columns) {
  constexpr int64_t W = kLanes<S>;
  const int64_t half = columns / (2 * W) * W;
  Vec<S> low{}, high{};
  for (int64_t c = 0; c < half; c += W) {
    low += load(g + c) * load(u + c);
    high += load(g + half + c) * load(u + half + c);
  }
  const S rest = add_products(g + 2 * half, u + 2 * half, columns - 2 * half, &low);
  return sum_lanes<S>(low + high) + rest;
}

inline double segment_sum(const double* rows, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t t = begin; t < end; ++t) sum += rows[t];
  return sum;
}

// Asks the level-2 cache for a matrix's rows that are needed next, a share of them at a time: memory answers while the
// current rows are being multiplied, and a burst of requests would hold up the multiplication's own loads.
template <class T>
struct Prefetch {
  View<T> rows;
  int64_t count, columns, share, done = 0;

  Prefetch(View<T> matrix, int64_t first, int64_t end, int64_t most, int64_t width, int64_t shares)
      : rows(matrix.from_row(first)),
        count(larger<int64_t>(0, smaller(most, end - first))),
        columns(width),
        share(ceil_div(count, shares)) {}

  void next_share() {
    for (int64_t t = done; t < smaller(done + share, count); ++t)
      for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(rows.from_row(t).data + c, 0, 2);
    done += share;
  }
};

// Row sums of a panel's tiles times g, in vectors until the last tile is in.
template <class E, class T>
struct RowDots {
  using S = typename E::Accumulate;
  const T* g;
  int64_t stride, count;
  Vec<S> sum[E::MR] = {};
  S rest[E::MR] = {};

  void add(const S* tile, int64_t column, int64_t columns) {
    const T* from = g + column;
    if (columns == E::NR) {
      for (int64_t t = 0; t < count; ++t, from += stride, tile += E::NR) add_products<T, S>(from, tile, E::NR, sum + t);
    } else {
      for (int64_t t = 0; t < count; ++t, from += stride, tile += E::NR)
        rest[t] += add_products<T, S>(from, tile, columns, sum + t);
    }
  }
};

// Dots of all tokens with one direction.
template <class E, class T>
class TokenDots {
  using S = typename E::Accumulate;

 public:
  TokenDots(const GhostDot& op, const Parallel& parallel, double* rows)
      : op_(op), parallel_(parallel), blocking_(op.o, op.i, 1), a_(view<T>(op.a)), g_(view<T>(op.g)), rows_(rows) {}

  // rows[t] = g_t^T V a_t
  void run(View<T> v) {
    for (int64_t t = 0; t < op_.n; ++t) rows_[t] = 0;
    Panels<E> b(smaller(op_.o, blocking_.packed), op_.i, false);
    for (int64_t o = 0; o < op_.o; o += blocking_.packed) {
      const int64_t packed = smaller(blocking_.packed, op_.o - o);
      b.pack_b(v.from_row(o), packed, parallel_);
      for_row_blocks<E>(op_.n, parallel_, [&](int64_t first, int64_t count) { add_block(first, count, b, o, packed); });
    }
  }

 private:
  void add_block(int64_t first, int64_t count, const Panels<E>& b, int64_t o, int64_t packed) {
    Panels<E> a(E::MR, op_.i, true);
    for (int64_t c = 0; c < packed; c += blocking_.cached) {
      for (int64_t r = 0; r < count; r += E::MR) {
        E::pack_a(a_.from_row(first + r), count - r, op_.i, a.at(0));
        add_panel(a.at(0), first + r, smaller<int64_t>(E::MR, count - r), b, c, smaller(c + blocking_.cached, packed),
                  o);
      }
    }
  }

  // rows[t] += g_t^T B a_t for the `count` rows of a panel of A and rows `first` to `end` of B, which are features `o`
  // on. Tiles are one panel wide, so that they and both panels stay in the level-1 cache; a tile is dotted with g while
  // the next is being multiplied.
  void add_panel(const typename E::Packed* a, int64_t row, int64_t count, const Panels<E>& b, int64_t first,
                 int64_t end, int64_t o) {
    const int64_t tiles = ceil_div(end - first, E::NR);
    Prefetch<T> next_a(a_, row + count, op_.n, E::MR, op_.i, tiles);
    Prefetch<T> next_g(View<T>{g_.data + o + first, g_.row, 1}, row + count, op_.n, E::MR, end - first, tiles);
    RowDots<E, T> dots{g_.from_row(row).data + o, g_.row, count};
    alignas(64) S tile[2][E::MR * E::NR];
    for (int64_t j = 0; j < tiles; ++j) {
      const int64_t c = first + j * E::NR;
      E::multiply(a, b.at(c), b.depth(), tile[j % 2], E::NR, false);
      next_a.next_share();
      next_g.next_share();
      if (j > 0) dots.add(tile[1 - j % 2], c - E::NR, E::NR);
    }
    const int64_t last = first + (tiles - 1) * E::NR;
    dots.add(tile[(tiles - 1) % 2], last, end - last);
    for (int64_t t = 0; t < count; ++t) rows_[row + t] += double(sum_lanes<S>(dots.sum[t])) + double(dots.rest[t]);
  }

  const GhostDot& op_;
  const Parallel& parallel_;
  Blocking<E> blocking_;
  View<T> a_, g_;
  double* rows_;
};

template <class E, class T>
void ghost_dot_with(const GhostDot& op, const Parallel& parallel) {
  using S = typename E::Accumulate;
  Buffer rows(op.n * sizeof(double));
  S* out = static_cast<S*>(op.out);
  for (int64_t k = 0; k < op.k; ++k) {
    TokenDots<E, T>(op, parallel, rows.as<double>()).run(view<T>(op.v).from_row(k * op.o));
    for (int64_t i = 0; i < op.b; ++i)
      out[k * op.b + i] = S(segment_sum(rows.as<double>(), op.cu_seqlens[i], op.cu_seqlens[i + 1]));
  }
}

}  // namespace
}  // namespace u2a
