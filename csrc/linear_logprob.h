// linear_logprob and linear_logprob_jvp: log p(target), its log-sum-exp and K tangents in one pass over the vocabulary.
//
// Logits exist only as tiles. A row keeps the running maximum m, sum of e^(c - m), and for each tangent the sum of
// e^(c - m) dc, rescaled when m grows (Milakov and Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include "ghost_dot.h"

namespace u2a {
namespace {

// `rows` rows of `columns` values, converted and padded so that whole vectors can be read up to any column.
template <class T, class S>
class PaddedRows {
 public:
  PaddedRows(const void* source, int64_t rows, int64_t columns)
      : stride_(columns + kTileColumns), buffer_(source ? rows * stride_ * sizeof(S) : 0), given_(source != nullptr) {
    for (int64_t r = 0; given_ && r < rows; ++r) {
      const T* values = static_cast<const T*>(source) + r * columns;
      S* padded = buffer_.as<S>() + r * stride_;
      for (int64_t c = 0; c < stride_; ++c) padded[c] = c < columns ? S(scalar(values[c])) : S(0);
    }
  }
  const S* at(int64_t row, int64_t column) const { return given_ ? buffer_.as<S>() + row * stride_ + column : nullptr; }

 private:
  int64_t stride_;
  Buffer buffer_;
  bool given_;
};

// Logits of a tile's row in place of its products: adds the bias and caps; `slopes`, if given, receives c'(z).
// Columns from `columns` to the next whole vector get -inf, so that their probability is 0.
template <class S>
void finish_logits(S* z, int64_t columns, const S* bias, S softcap, S* slopes) {
  constexpr int W = kLanes<S>;
  for (int64_t c = 0; c < columns; c += W) {
    Vec<S> x = load(z + c), slope = splat(S(1));
    if (bias) x += load(bias + c);
    if (softcap != 0) {
      const Vec<S> t = tanh_lanes(Vec<S>(x / softcap));
      x = softcap * t;
      slope = 1 - t * t;
    }
    store(z + c, x);
    if (slopes) store(slopes + c, slope);
  }
  for (int64_t c = columns; c < round_up(columns, W); ++c) z[c] = -S(INFINITY);
}

// What a row remembers of the columns it has seen.
struct Softmax {
  double max = -INFINITY, sum = 0, target = 0, target_slope = 1;

  // Takes in the logits z, which become e^(z - max); returns what earlier sums must be multiplied by.
  template <class S>
  double add(S* z, int64_t columns) {
    constexpr int W = kLanes<S>;
    Vec<S> high = load(z);
    for (int64_t c = W; c < columns; c += W) {
      const Vec<S> x = load(z + c);
      high = x > high ? x : high;
    }
    const double before = max;
    max = larger(max, double(max_lanes<S>(high)));
    const S shift = max == -INFINITY ? S(0) : S(max);  // no word so far is possible
    Vec<S> total{};
    for (int64_t c = 0; c < columns; c += W) {
      const Vec<S> e = exp_lanes(Vec<S>(load(z + c) - shift));
      store(z + c, e);
      total += e;
    }
    const double scale = before == max ? 1 : std::exp(before - max);
    sum = sum * scale + double(sum_lanes<S>(total));
    return scale;
  }
};

struct Tangent {
  double sum = 0, target = 0;
};

template <class E, class T>
class HeadPass {
  using S = typename E::Accumulate;

 public:
  HeadPass(const LinearLogprob& op, const Parallel& parallel)
      : op_(op),
        parallel_(parallel),
        bias_(op.head.bias, 1, op.head.v),
        dbias_(op.dbias, op.k, op.head.v),
        softmax_(op.head.n * sizeof(Softmax)),
        tangents_(op.head.n * op.k * sizeof(Tangent)) {
    for (int64_t t = 0; t < op.head.n; ++t) softmax_.as<Softmax>()[t] = Softmax();
    for (int64_t t = 0; t < op.head.n * op.k; ++t) tangents_.as<Tangent>()[t] = Tangent();
  }

  void run() {
    const Head& head = op_.head;
    const int64_t weights = 1 + (op_.dweight.data ? op_.k : 0), hidden = 1 + (op_.dh.data ? op_.k : 0);
    const Blocking<E> blocking(head.v, head.d, weights);
    const int64_t room = round_up(smaller(head.v, blocking.packed), E::NR);
    Panels<E> b(weights * room, head.d, false);
    for (int64_t first = 0; first < head.v; first += blocking.packed) {
      const int64_t packed = smaller(blocking.packed, head.v - first);
      for (int64_t j = 0; j < weights; ++j) {
        const View<T> source = j == 0 ? view<T>(head.weight) : view<T>(op_.dweight).from_row((j - 1) * head.v);
        b.pack_b(source.from_row(first), packed, parallel_, j * room);
      }
      for_row_blocks<E>(head.n, parallel_, [&](int64_t row, int64_t rows) {
        const int64_t stride = round_up(rows, E::MR);
        Panels<E> a(hidden * stride, head.d, true);
        for (int64_t j = 0; j < hidden; ++j) {
          const View<T> source = j == 0 ? view<T>(head.h) : view<T>(op_.dh).from_row((j - 1) * head.n);
          a.pack_a(source.from_row(row), rows, j * stride);
        }
        for (int64_t c = 0; c < packed; c += blocking.tile) {
          const int64_t columns = smaller(blocking.tile, packed - c);
          for (int64_t r = 0; r < rows; r += E::MR)
            add_tile({a, r, stride, b, c, room, row + r, smaller<int64_t>(E::MR, rows - r), first + c, columns});
        }
      });
    }
    write_results();
  }

 private:
  // A tile's place: panels of A from row `r` (of tangent k, `a_step` rows on) and of B from column `c`, and the rows
  // and columns of the logits that they make.
  struct Place {
    const Panels<E>& a;
    int64_t r, a_step;
    const Panels<E>& b;
    int64_t c, b_step;
    int64_t row, rows, column, columns;
  };

  void add_tile(const Place& at) {
    alignas(64) S tile[E::MR * kTileColumns], slopes[E::MR * kTileColumns];
    double scale[E::MR];
    const bool capped = op_.head.softcap != 0 && op_.k > 0;
    tile_product<E>(at.a.at(at.r), at.b, at.c, at.columns, tile, kTileColumns, false);
    for (int64_t t = 0; t < at.rows; ++t) {
      Softmax& row = softmax_.as<Softmax>()[at.row + t];
      S *z = tile + t * kTileColumns, *slope = capped ? slopes + t * kTileColumns : nullptr;
      finish_logits(z, at.columns, bias_.at(0, at.column), S(op_.head.softcap), slope);
      const int64_t target = op_.head.target[at.row + t] - at.column;
      if (target >= 0 && target < at.columns) {
        row.target = z[target];
        if (capped) row.target_slope = slope[target];
      }
      scale[t] = row.add(z, at.columns);
      for (int64_t c = 0; capped && c < at.columns; c += kLanes<S>) store(z + c, Vec<S>(load(z + c) * load(slope + c)));
    }
    for (int64_t k = 0; k < op_.k; ++k) add_tangent(at, k, tile, scale);
  }

  // `weights`: e^(c - max) c'(z) of the tile.
  void add_tangent(const Place& at, int64_t k, const S* weights, const double* scale) {
    alignas(64) S dz[E::MR * kTileColumns];
    if (op_.dh.data)
      tile_product<E>(at.a.at((k + 1) * at.a_step + at.r), at.b, at.c, at.columns, dz, kTileColumns, false);
    if (op_.dweight.data)
      tile_product<E>(at.a.at(at.r), at.b, (k + 1) * at.b_step + at.c, at.columns, dz, kTileColumns, op_.dh.data);
    const S* dbias = dbias_.at(k, at.column);
    for (int64_t t = 0; t < at.rows; ++t) {
      Tangent& tangent = tangents_.as<Tangent>()[k * op_.head.n + at.row + t];
      const S *row = dz + t * kTileColumns, *weight = weights + t * kTileColumns;
      double sum = dot_row(row, weight, at.columns);
      if (dbias) sum += dot_row(dbias, weight, at.columns);
      tangent.sum = tangent.sum * scale[t] + sum;
      const int64_t target = op_.head.target[at.row + t] - at.column;
      if (target >= 0 && target < at.columns) tangent.target = row[target] + (dbias ? dbias[target] : S(0));
    }
  }

  void write_results() {
    for (int64_t t = 0; t < op_.head.n; ++t) {
      const Softmax& row = softmax_.as<Softmax>()[t];
      const double lse = row.max + std::log(row.sum);
      static_cast<S*>(op_.logp)[t] = S(row.target - lse);
      static_cast<S*>(op_.lse)[t] = S(lse);
      for (int64_t k = 0; k < op_.k; ++k) {
        const Tangent& tangent = tangents_.as<Tangent>()[k * op_.head.n + t];
        static_cast<S*>(op_.jvp)[k * op_.head.n + t] = S(row.target_slope * tangent.target - tangent.sum / row.sum);
      }
    }
  }

  const LinearLogprob& op_;
  const Parallel& parallel_;
  PaddedRows<T, S> bias_, dbias_;
  Buffer softmax_, tangents_;
};

template <class E, class T>
void linear_logprob_with(const LinearLogprob& op, const Parallel& parallel) {
  HeadPass<E, T>(op, parallel).run();
}

}  // namespace
}  // namespace u2a
