// Products of many rows by few columns. Their rows are used so little that packing them would take as long as the
// product: they are read where they lie, a stretch of each at a time, while the next stretch is fetched.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// Elements of a row that are read at a time: 8 cache lines, of which a tile's rows leave room in the level-1 cache.
template <class T>
constexpr int64_t kStretch = 512 / sizeof(T);

// A stretch of E::MR rows as an engine multiplies it. This one packs; engines that need not have their own.
template <class E, class T>
class RowBlock {
 public:
  RowBlock() : panel_(E::MR, kStretch<T>, true) {}

  void load(View<T> rows, int64_t count, int64_t k) { E::pack_a(rows, count, k, panel_.at(0)); }

  // c (MR x NR, rows ldc apart) = or += the stretch times a panel's k rows. Rows beyond `count` may hold anything.
  void multiply(const typename E::Packed* b, int64_t k, typename E::Accumulate* c, int64_t ldc, bool add) const {
    E::multiply(panel_.at(0), b, k, c, ldc, add);
  }

 private:
  Panels<E> panel_;
};

// Copies (and widens) without transposing: rows of models lie a power of two apart, where a tile's worth of them would
// evict each other from the level-1 cache.
template <class S, int Rows, int Vectors, class T>
class RowBlock<VectorEngine<S, Rows, Vectors>, T> {
 public:
  void load(View<T> rows, int64_t count, int64_t k) {
    constexpr int W = kLanes<S>;
    for (int64_t r = 0; r < smaller<int64_t>(Rows, count); ++r) {
      const T* from = rows.data + r * rows.row;
      int64_t j = 0;
      for (; j + W <= k; j += W) store(rows_[r] + j, u2a::load(from + j));
      for (; j < k; ++j) rows_[r][j] = scalar(from[j]);
    }
  }

  void multiply(const S* b, int64_t k, S* c, int64_t ldc, bool add) const {
    constexpr int W = kLanes<S>;
    Vec<S> sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? u2a::load(c + r * ldc + v * W) : Vec<S>{};
    for (int64_t j = 0; j < k; ++j) {
      Vec<S> column[Vectors];
      for (int v = 0; v < Vectors; ++v) column[v] = u2a::load(b + (j * Vectors + v) * W);
#pragma GCC unroll 24
      for (int r = 0; r < Rows; ++r) {
        const Vec<S> row = splat(rows_[r][j]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] += row * column[v];
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) store(c + r * ldc + v * W, sum[r][v]);
  }

 private:
  alignas(64) S rows_[Rows][kStretch<T>] = {};
};

// The engine for products of at most one vector of columns, which would waste half of a wider tile: as many sums, of
// more rows. AMX keeps its own: at so few columns its time is that of reading the rows.
template <class E>
struct NarrowEngine {
  using type = E;
};
template <class S, int Rows, int Vectors>
struct NarrowEngine<VectorEngine<S, Rows, Vectors>> {
  using type = VectorEngine<S, Rows * Vectors, 1>;
};

// Runs body(engine) with the engine that suits products of so many columns.
template <class E, class Body>
void for_columns(int64_t columns, const Body& body) {
  using N = typename NarrowEngine<E>::type;
  return columns <= N::NR ? body(N{}) : body(E{});
}

// A depth x columns matrix seen as the rows of its transpose, which is what engines multiply by.
template <class T>
View<T> transposed(View<T> m) {
  return {m.data, m.depth, m.row};
}

// Asks the level-2 cache for the stretch that follows the one at (row, depth): of the same rows, or of the next.
template <class E, class T>
void prefetch_next(View<T> a, int64_t rows, int64_t row, int64_t depth, int64_t end) {
  depth += kStretch<T>;
  if (depth >= end) {
    depth = 0;
    row += E::MR;
  }
  const int64_t columns = smaller(kStretch<T>, end - depth);
  for (int64_t r = row; r < smaller(row + E::MR, rows); ++r)
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) __builtin_prefetch(a.data + r * a.row + depth + j, 0, 2);
}

// out (rows x columns, each rounded up to the engine's tile; rows ld apart) = a b^T, where a's rows are contiguous.
template <class E, class T>
void multiply_rows(View<T> a, int64_t rows, const Panels<E>& b, int64_t columns, typename E::Accumulate* out,
                   int64_t ld) {
  RowBlock<E, T> block;
  const int64_t depth = b.depth(), step = Blocking<E>(columns, depth, 1).cached;
  if (depth == 0) std::memset(out, 0, round_up(rows, E::MR) * ld * sizeof(*out));
  for (int64_t first = 0; first < columns; first += step) {
    for (int64_t r = 0; r < rows; r += E::MR) {
      for (int64_t d = 0; d < depth; d += kStretch<T>) {
        const int64_t k = smaller(kStretch<T>, depth - d);
        block.load({a.data + r * a.row + d, a.row, 1}, rows - r, k);
        prefetch_next<E>(a, rows, r, d, depth);
        for (int64_t c = first; c < smaller(first + step, columns); c += E::NR)
          block.multiply(b.at(c) + E::b_panel_size(d), k, out + r * ld + c, ld, d > 0);
      }
    }
  }
}

}  // namespace
}  // namespace u2a
