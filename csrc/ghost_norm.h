// ghost_norm: ||G_i||^2 of the example's gradient G_i = sum_t g_t a_t^T, by the cheaper of two exact forms:
//   Gram: sum_{t,s} (a_t . a_s)(g_t . g_s), of which the half above the diagonal is computed: T^2 (I + O) flops;
//   tile: the entries of G_i, tile by tile, squared: 2 T I O flops.
#pragma once

#include "ghost_dot.h"

namespace u2a {
namespace {

// Sum over rows t and columns s >= t of x[t][s] y[t][s], off-diagonal entries twice; tiles start at (row, column).
template <class S>
double upper_triangle_sum(const S* x, const S* y, int64_t ld, int64_t row, int64_t rows, int64_t column,
                          int64_t columns) {
  double sum = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t diagonal = row + t - column;
    const S *xs = x + t * ld, *ys = y + t * ld;
    if (diagonal >= 0 && diagonal < columns) sum += double(xs[diagonal]) * ys[diagonal];
    const int64_t first = larger<int64_t>(0, diagonal + 1);
    if (first < columns) sum += 2 * double(dot_row(xs + first, ys + first, columns - first));
  }
  return sum;
}

template <class E, class T>
double gram_norm(View<T> a, View<T> g, int64_t tokens, int64_t i, int64_t o, const Parallel& serial) {
  using S = typename E::Accumulate;
  Panels<E> a_rows(tokens, i, true), g_rows(tokens, o, true), a_columns(tokens, i, false), g_columns(tokens, o, false);
  a_rows.pack_a(a, tokens);
  g_rows.pack_a(g, tokens);
  a_columns.pack_b(a, tokens, serial);
  g_columns.pack_b(g, tokens, serial);
  const int64_t width = Blocking<E>(tokens, i + o, 1).tile;
  alignas(64) S x[E::MR * kTileColumns], y[E::MR * kTileColumns];
  double sum = 0;
  for (int64_t r = 0; r < tokens; r += E::MR) {
    const int64_t rows = smaller<int64_t>(E::MR, tokens - r);
    for (int64_t c = r / E::NR * E::NR; c < tokens; c += width) {
      const int64_t columns = smaller(width, tokens - c);
      tile_product<E>(a_rows.at(r), a_columns, c, columns, x, width, false);
      tile_product<E>(g_rows.at(r), g_columns, c, columns, y, width, false);
      sum += upper_triangle_sum(x, y, width, r, rows, c, columns);
    }
  }
  return sum;
}

template <class E, class T>
double tile_norm(View<T> a, View<T> g, int64_t tokens, int64_t i, int64_t o, const Parallel& serial) {
  using S = typename E::Accumulate;
  Panels<E> rows(o, tokens, true), columns(i, tokens, false);
  rows.pack_a(View<T>{g.data, 1, g.row}, o);
  columns.pack_b(View<T>{a.data, 1, a.row}, i, serial);
  const int64_t width = Blocking<E>(i, tokens, 1).tile;
  alignas(64) S tile[E::MR * kTileColumns];
  double sum = 0;
  for (int64_t r = 0; r < o; r += E::MR) {
    for (int64_t c = 0; c < i; c += width) {
      const int64_t count = smaller(width, i - c);
      tile_product<E>(rows.at(r), columns, c, count, tile, width, false);
      for (int64_t j = 0; j < smaller<int64_t>(E::MR, o - r); ++j)
        sum += dot_row(tile + j * width, tile + j * width, count);
    }
  }
  return sum;
}

template <class E, class T>
void ghost_norm_with(const GhostNorm& op, const Parallel& parallel) {
  using S = typename E::Accumulate;
  const View<T> a = view<T>(op.a), g = view<T>(op.g);
  const Parallel serial = {[](int64_t count, void* context, Parallel::Body body) { body(context, 0, count); }, 1};
  parallel_for(parallel, op.b, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename E::Scope scope;
    for (int64_t example = begin; example < end; ++example) {
      const int64_t first = op.cu_seqlens[example], tokens = op.cu_seqlens[example + 1] - first;
      const bool gram = tokens * (op.i + op.o) < 2 * op.i * op.o;
      const auto norm = gram ? gram_norm<E, T> : tile_norm<E, T>;
      static_cast<S*>(op.out)[example] = S(norm(a.from_row(first), g.from_row(first), tokens, op.i, op.o, serial));
    }
  });
}

}  // namespace
}  // namespace u2a
