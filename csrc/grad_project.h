// grad_project: P_out^T G_i P_in = sum over the example's tokens t of y_t x_t^T with x_t = P_in^T a_t, y_t = P_out^T
// g_t.
//
// x and y of some tokens at a time are made and used while they are in the cache. Every entry of a result is one chain
// of fused multiply-adds over the example's tokens in order, so that neither the threads nor the neighbors show.
#pragma once

#include "narrow_product.h"

namespace u2a {
namespace {

// sums (R rows of 2 vectors) += sum over tokens t of y_t x_t^T, for R entries of y_t and 2 vectors of x_t.
template <int R, class S>
void add_outer_products(const S* y, int64_t y_stride, const S* x, int64_t x_stride, int64_t tokens, S* sums) {
  constexpr int W = kLanes<S>;
  Vec<S> sum[R][2];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) sum[r][v] = load(sums + (r * 2 + v) * W);
  for (int64_t t = 0; t < tokens; ++t, x += x_stride, y += y_stride) {
    const Vec<S> low = load(x), high = load(x + W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<S> row = splat(y[r]);
      sum[r][0] += row * low;
      sum[r][1] += row * high;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(sums + (r * 2 + v) * W, sum[r][v]);
}

template <class E, class T>
class GradientProjection {
  using S = typename E::Accumulate;

 public:
  GradientProjection(const GradProject& op, const Parallel& parallel)
      : op_(op),
        parallel_(parallel),
        x_stride_(larger(round_up(op.p, E::NR), round_up(op.p, kColumns))),
        y_stride_(larger(round_up(op.q, E::NR), round_up(op.q, kRows))),
        tokens_(tokens_at_once()),
        p_in_(op.p, op.i, false),
        p_out_(op.q, op.o, false),
        x_(tokens_ * x_stride_ * sizeof(S)),
        y_(tokens_ * y_stride_ * sizeof(S)) {}

  void run() {
    std::memset(op_.out, 0, op_.b * op_.q * op_.p * sizeof(S));
    p_in_.pack_b(transposed(view<T>(op_.p_in)), op_.p, parallel_);
    p_out_.pack_b(transposed(view<T>(op_.p_out)), op_.q, parallel_);
    const int64_t tokens = op_.cu_seqlens[op_.b];
    int64_t example = 0;
    for (int64_t first = 0; first < tokens; first += tokens_) {
      const int64_t end = smaller(first + tokens_, tokens);
      project_tokens(first, end);
      while (op_.cu_seqlens[example + 1] <= first) ++example;
      int64_t last = example;
      while (op_.cu_seqlens[last + 1] < end) ++last;
      add_examples(example, last + 1, first, end);
    }
  }

 private:
  // Sums that registers hold: 12 x 2 vectors of 32 registers, 6 x 2 or 4 x 2 of 16.
  static constexpr int kRows = U2A_VECTOR_BYTES == 64 ? 12 : U2A_VECTOR_BYTES == 32 ? 6 : 4;
  static constexpr int64_t kColumns = 2 * kLanes<S>;

  // A multiple of the tile's rows; half of each thread's cache for x and y.
  int64_t tokens_at_once() const {
    const int64_t row_bytes = larger<int64_t>(1, (x_stride_ + y_stride_) * int64_t(sizeof(S)));
    const int64_t most = kCachedBytes / 2 / row_bytes * parallel_.threads;
    return round_up(larger<int64_t>(1, smaller(most, op_.n)), E::MR);
  }

  void project_tokens(int64_t first, int64_t end) {
    for_row_blocks<E>(end - first, parallel_, [&](int64_t row, int64_t count) {
      multiply_rows(view<T>(op_.a).from_row(first + row), count, p_in_, op_.p, x_.as<S>() + row * x_stride_, x_stride_);
      multiply_rows(view<T>(op_.g).from_row(first + row), count, p_out_, op_.q, y_.as<S>() + row * y_stride_,
                    y_stride_);
    });
  }

  // Adds the tokens from `first` to `end` to the examples that they belong to.
  void add_examples(int64_t example, int64_t last, int64_t first, int64_t end) {
    const int64_t panels = ceil_div(op_.q, kRows);
    parallel_for(parallel_, (last - example) * panels, [&](int64_t begin_task, int64_t end_task) {
      for (int64_t task = begin_task; task < end_task; ++task) {
        const int64_t i = example + task / panels, q = task % panels * kRows;
        const int64_t from = larger<int64_t>(op_.cu_seqlens[i], first) - first;
        const int64_t to = smaller<int64_t>(op_.cu_seqlens[i + 1], end) - first;
        for (int64_t p = 0; p < op_.p; p += kColumns) add_tile(i, q, p, from, to - from);
      }
    });
  }

  void add_tile(int64_t example, int64_t q, int64_t p, int64_t from, int64_t tokens) {
    const int64_t rows = smaller<int64_t>(kRows, op_.q - q), columns = smaller(kColumns, op_.p - p);
    S* out = static_cast<S*>(op_.out) + (example * op_.q + q) * op_.p + p;
    alignas(64) S sums[kRows * kColumns] = {};
    for (int64_t r = 0; r < rows; ++r) std::memcpy(sums + r * kColumns, out + r * op_.p, columns * sizeof(S));
    add_outer_products<kRows>(y_.as<S>() + from * y_stride_ + q, y_stride_, x_.as<S>() + from * x_stride_ + p,
                              x_stride_, tokens, sums);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * op_.p, sums + r * kColumns, columns * sizeof(S));
  }

  const GradProject& op_;
  const Parallel& parallel_;
  int64_t x_stride_, y_stride_, tokens_;
  Panels<E> p_in_, p_out_;
  Buffer x_, y_;
};

template <class E, class T>
void grad_project_with(const GradProject& op, const Parallel& parallel) {
  for_columns<E>(larger(op.p, op.q), [&](auto e) { GradientProjection<decltype(e), T>(op, parallel).run(); });
}

}  // namespace
}  // namespace u2a
