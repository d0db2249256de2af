// ghost_dot_lowrank: <L_k R_k^T, G_i> = sum over the example's tokens t of (L_k^T g_t) . (R_k^T a_t).
//
// A block of rows is multiplied by several directions' factors at once, so that a and g are read once for all of them,
// and its products are dotted while they are in the level-2 cache. A token's sum runs over the rank in a fixed order,
// an example's over its tokens in order, the latter in double.
#pragma once

#include "ghost_dot.h"
#include "narrow_product.h"

namespace u2a {
namespace {

template <class E, class T>
class LowRankDots {
  using S = typename E::Accumulate;

 public:
  LowRankDots(const GhostDotLowRank& op, const Parallel& parallel, double* rows)
      : op_(op), parallel_(parallel), rows_(rows), width_(round_up(op.r, E::NR)) {}

  // rows[k][t] = (L_k^T g_t) . (R_k^T a_t)
  void run() {
    const int64_t step = directions_per_pass();
    for (int64_t k = 0; k < op_.k; k += step) {
      const int64_t directions = smaller(step, op_.k - k);
      Panels<E> left(directions * width_, op_.o, false), right(directions * width_, op_.i, false);
      for (int64_t j = 0; j < directions; ++j) {
        left.pack_b(transposed(view<T>(op_.left).from_row((k + j) * op_.o)), op_.r, parallel_, j * width_);
        right.pack_b(transposed(view<T>(op_.right).from_row((k + j) * op_.i)), op_.r, parallel_, j * width_);
      }
      for_row_blocks<E>(op_.n, parallel_,
                        [&](int64_t first, int64_t count) { add_block(first, count, k, directions, left, right); });
    }
  }

 private:
  // As many as keep a pass's factors and a block's products in the level-2 cache.
  int64_t directions_per_pass() const {
    const int64_t column_bytes = larger(op_.i, op_.o) * int64_t(sizeof(typename E::Packed));
    const int64_t columns = smaller(kTileColumns, kCachedBytes / larger<int64_t>(1, column_bytes));
    return larger<int64_t>(1, smaller(op_.k, columns / larger<int64_t>(1, width_)));
  }

  void add_block(int64_t first, int64_t count, int64_t k, int64_t directions, const Panels<E>& left,
                 const Panels<E>& right) {
    const int64_t columns = directions * width_;
    Buffer x(round_up(count, E::MR) * columns * sizeof(S)), y(round_up(count, E::MR) * columns * sizeof(S));
    multiply_rows(view<T>(op_.a).from_row(first), count, right, columns, x.as<S>(), columns);
    multiply_rows(view<T>(op_.g).from_row(first), count, left, columns, y.as<S>(), columns);
    for (int64_t j = 0; j < directions; ++j)
      for (int64_t t = 0; t < count; ++t)
        rows_[(k + j) * op_.n + first + t] =
            double(dot_row(x.as<S>() + t * columns + j * width_, y.as<S>() + t * columns + j * width_, op_.r));
  }

  const GhostDotLowRank& op_;
  const Parallel& parallel_;
  double* rows_;
  int64_t width_;
};

template <class E, class T>
void ghost_dot_lowrank_with(const GhostDotLowRank& op, const Parallel& parallel) {
  Buffer rows(op.k * op.n * sizeof(double));
  for_columns<E>(op.r, [&](auto e) { LowRankDots<decltype(e), T>(op, parallel, rows.as<double>()).run(); });
  for (int64_t k = 0; k < op.k; ++k)
    for (int64_t i = 0; i < op.b; ++i)
      static_cast<typename E::Accumulate*>(op.out)[k * op.b + i] =
          typename E::Accumulate(segment_sum(rows.as<double>() + k * op.n, op.cu_seqlens[i], op.cu_seqlens[i + 1]));
}

}  // namespace
}  // namespace u2a
