// linear_logprob_backward: with p the softmax and y the target, dz = c'(z) ((grad_lse - grad_logp) p + grad_logp e_y),
// then dh = dz W, dW = dz^T h and db = sum_t dz. The targets' terms are added last.
//
// Logits are recomputed for kTileColumns columns and at most kChunkRows rows at a time; a tile of dz goes at once into
// dh, and the block's dz, all that is ever stored, into dW and db. Sums over rows and columns run in a fixed order.
#pragma once

#include "linear_logprob.h"

namespace u2a {
namespace {

constexpr int64_t kChunkRows = 2048;

template <class E, class T>
class HeadBackward {
  using S = typename E::Accumulate;
  using Z = typename E::Intermediate;

 public:
  HeadBackward(const LinearLogprobBackward& op, const Parallel& parallel)
      : op_(op),
        parallel_(parallel),
        bias_(op.head.bias, 1, op.head.v),
        padded_d_(round_up(op.head.d, E::NR)),
        dz_(smaller(kChunk, op.head.n) * kTileColumns * sizeof(Z)),
        target_(smaller(kChunk, op.head.n) * sizeof(S)),
        grad_h_(op.grad_h ? round_up(smaller(kChunk, op.head.n), E::MR) * padded_d_ * sizeof(S) : 0) {}

  void run() {
    if (op_.grad_weight) clear_weight_gradients();
    for (int64_t first = 0; first < op_.head.n; first += kChunk) run_chunk(first, smaller(kChunk, op_.head.n - first));
  }

 private:
  static constexpr int64_t kChunk = kChunkRows / E::MR * E::MR;

  void clear_weight_gradients() {
    S *weight = static_cast<S*>(op_.grad_weight), *bias = static_cast<S*>(op_.grad_bias);
    std::memset(weight, 0, op_.head.v * op_.head.d * sizeof(S));
    std::memset(bias, 0, op_.head.v * sizeof(S));
  }

  void run_chunk(int64_t first, int64_t rows) {
    const Head& head = op_.head;
    Panels<E> h(rows, head.d, true), h_columns(op_.grad_weight ? head.d : 0, rows, false);
    const View<T> source = view<T>(head.h).from_row(first);
    h.pack_a(source, rows);
    if (op_.grad_weight) h_columns.pack_b(View<T>{source.data, 1, source.row}, head.d, parallel_);
    if (op_.grad_h) std::memset(grad_h_.as<S>(), 0, round_up(rows, E::MR) * padded_d_ * sizeof(S));
    const int64_t step = smaller(kTileColumns / E::NR * E::NR, round_up(head.v, E::NR));
    Panels<E> weight(step, head.d, false);
    for (int64_t v = 0; v < head.v; v += step) {
      const int64_t columns = smaller(step, head.v - v);
      const View<T> block = view<T>(head.weight).from_row(v);
      weight.pack_b(block, columns, parallel_);
      Panels<E> weight_columns(op_.grad_h ? head.d : 0, columns, false);
      if (op_.grad_h) weight_columns.pack_b(View<T>{block.data, 1, block.row}, head.d, parallel_);
      for_row_blocks<E>(rows, parallel_, [&](int64_t row, int64_t count) {
        for (int64_t r = row; r < row + count; r += E::MR) {
          logit_gradients(first, r, smaller<int64_t>(E::MR, rows - r), v, columns, h, weight);
          if (op_.grad_h) add_hidden_gradient(r, rows - r, columns, weight_columns);
        }
      });
      if (op_.grad_weight) add_weight_gradient(rows, v, columns, h_columns);
    }
    add_targets(first, rows);
    if (op_.grad_h) write_hidden_gradient(first, rows);
  }

  // dz of `count` rows from chunk row r on.
  void logit_gradients(int64_t first, int64_t r, int64_t count, int64_t v, int64_t columns, const Panels<E>& h,
                       const Panels<E>& weight) {
    alignas(64) S tile[E::MR * kTileColumns], slopes[kTileColumns];
    const S *grad_logp = static_cast<const S*>(op_.grad_logp), *grad_lse = static_cast<const S*>(op_.grad_lse);
    const S *lse = static_cast<const S*>(op_.lse), softcap = S(op_.head.softcap);
    tile_product<E>(h.at(r), weight, 0, columns, tile, kTileColumns, false);
    for (int64_t t = 0; t < count; ++t) {
      S* z = tile + t * kTileColumns;
      const int64_t row = first + r + t;
      finish_logits(z, columns, bias_.at(0, v), softcap, slopes);
      const S shared = grad_lse[row] - grad_logp[row];
      for (int64_t c = 0; c < columns; c += kLanes<S>)
        store(z + c, Vec<S>(shared * exp_lanes(Vec<S>(load(z + c) - lse[row]))));
      const int64_t target = op_.head.target[row] - v;
      if (target >= 0 && target < columns) target_.template as<S>()[r + t] = grad_logp[row] * slopes[target];
      Z* dz = dz_.template as<Z>() + (r + t) * kTileColumns;
      for (int64_t c = 0; c < columns; c += kLanes<S>) store_rounded(dz + c, Vec<S>(load(z + c) * load(slopes + c)));
    }
  }

  void add_hidden_gradient(int64_t r, int64_t rows_left, int64_t columns, const Panels<E>& weight_columns) {
    Panels<E> dz(E::MR, columns, true);
    E::pack_a(View<Z>{dz_.template as<Z>() + r * kTileColumns, kTileColumns, 1}, rows_left, columns, dz.at(0));
    tile_product<E>(dz.at(0), weight_columns, 0, op_.head.d, grad_h_.as<S>() + r * padded_d_, padded_d_, true);
  }

  void add_weight_gradient(int64_t rows, int64_t v, int64_t columns, const Panels<E>& h_columns) {
    const Z* dz = dz_.template as<Z>();
    parallel_for(parallel_, ceil_div(columns, E::MR), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename E::Scope scope;
      Panels<E> panel(E::MR, rows, true);
      Buffer product(E::MR * padded_d_ * sizeof(S));
      for (int64_t c = begin * E::MR; c < smaller(end * E::MR, columns); c += E::MR) {
        E::pack_a(View<Z>{dz + c, 1, kTileColumns}, columns - c, rows, panel.at(0));
        tile_product<E>(panel.at(0), h_columns, 0, op_.head.d, product.as<S>(), padded_d_, false);
        for (int64_t j = 0; j < smaller<int64_t>(E::MR, columns - c); ++j) {
          S* out = static_cast<S*>(op_.grad_weight) + (v + c + j) * op_.head.d;
          for (int64_t d = 0; d < op_.head.d; ++d) out[d] += product.as<S>()[j * padded_d_ + d];
        }
      }
    });
    S* bias = static_cast<S*>(op_.grad_bias) + v;
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t c = 0; c < columns; ++c) bias[c] += S(scalar(dz[t * kTileColumns + c]));
  }

  // The targets' own terms, last: where grad_lse is near grad_logp they dwarf all others, which a sum that held them
  // from the start would round away one by one.
  void add_targets(int64_t first, int64_t rows) {
    const Head& head = op_.head;
    const View<T> h = view<T>(head.h), weight = view<T>(head.weight);
    S *grad_weight = static_cast<S*>(op_.grad_weight), *grad_bias = static_cast<S*>(op_.grad_bias);
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t y = head.target[first + t];
      const S dz = target_.template as<S>()[t];
      const T *h_row = h.data + (first + t) * h.row, *weight_row = weight.data + y * weight.row;
      if (op_.grad_h) {
        S* out = grad_h_.as<S>() + t * padded_d_;
        for (int64_t d = 0; d < head.d; ++d) out[d] += dz * S(scalar(weight_row[d * weight.depth]));
      }
      if (op_.grad_weight) {
        for (int64_t d = 0; d < head.d; ++d) grad_weight[y * head.d + d] += dz * S(scalar(h_row[d * h.depth]));
        grad_bias[y] += dz;
      }
    }
  }

  void write_hidden_gradient(int64_t first, int64_t rows) {
    const int64_t d = op_.head.d;
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t j = 0; j < d; ++j)
        convert(grad_h_.as<S>()[t * padded_d_ + j], static_cast<T*>(op_.grad_h) + (first + t) * d + j);
  }

  const LinearLogprobBackward& op_;
  const Parallel& parallel_;
  PaddedRows<T, S> bias_;
  int64_t padded_d_;
  Buffer dz_, target_, grad_h_;
};

template <class E, class T>
void linear_logprob_backward_with(const LinearLogprobBackward& op, const Parallel& parallel) {
  HeadBackward<E, T>(op, parallel).run();
}

}  // namespace
}  // namespace u2a
