// attention and attention_jvp: softmax(c(scale q . k)) v over packed segments, and K tangents, one block of keys at a
// time.
//
// Scores are made transposed: rows are keys, columns NR queries, so that the softmax runs along vectors of queries, and
// the weights are, as they are made, the operand of the product with v^T. A query keeps the running maximum m of its
// scores, the sum of e^(s - m), the sum of e^(s - m) v, and for each tangent the sums of e^(s - m) ds and of
// e^(s - m) (ds v + dv), all rescaled when m grows (Milakov and Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include "attention_plan.h"

namespace u2a {
namespace {

// Keys and values of one segment and key head, and their tangents, packed; kept until another is asked for.
template <class E, class T>
class PackedKeys {
 public:
  PackedKeys(const Attention& op, int64_t most)
      : op_(op),
        key_rows_(round_up(most, kKeyBlock)),
        value_rows_(round_up(op.f, E::MR)),
        keys_((1 + op.k_directions) * key_rows_, op.e, true),
        values_((1 + op.k_directions) * key_rows_ / kKeyBlock * value_rows_, kKeyBlock, true) {}

  void pack(int64_t first, int64_t tokens, int64_t head) {
    if (first == first_ && tokens == tokens_ && head == head_) return;
    first_ = first, tokens_ = tokens, head_ = head;
    for (int64_t j = 0; j <= op_.k_directions; ++j) {
      keys_.pack_a(head_rows<T>(j == 0 ? op_.k : op_.dk, j - 1, first, head), tokens, j * key_rows_);
      const View<T> v = head_rows<T>(j == 0 ? op_.v : op_.dv, j - 1, first, head);
      for (int64_t t = 0; t < tokens; t += kKeyBlock) {
        const View<T> columns = {v.data + t * v.row, 1, v.row};
        for (int64_t f = 0; f < op_.f; f += E::MR)
          E::pack_a(columns.from_row(f), op_.f - f, smaller(kKeyBlock, tokens - t), value_panel(j, t, f));
      }
    }
  }
  // Panels of direction j (0: the keys themselves): keys from t on; features from f on of the values of t's block.
  typename E::Packed* key_panel(int64_t j, int64_t t) const { return keys_.at(j * key_rows_ + t); }
  typename E::Packed* value_panel(int64_t j, int64_t t, int64_t f) const {
    return values_.at((j * key_rows_ + t) / kKeyBlock * value_rows_ + f);
  }

 private:
  const Attention& op_;
  int64_t key_rows_, value_rows_, first_ = -1, tokens_ = -1, head_ = -1;
  Panels<E> keys_, values_;
};

template <class E, class T>
class AttentionPass {
  using S = typename E::Accumulate;
  using Packed = typename E::Packed;
  static constexpr int W = kLanes<S>, NR = E::NR, V = NR / W;

 public:
  AttentionPass(const Attention& op, int64_t most)
      : op_(op),
        out_size_((round_up(op.f, E::MR) + W) * NR),
        base_(op, op.parent ? most : 0),
        own_(op, most),
        queries_((1 + op.k_directions) * NR, op.e, false),
        scores_((1 + op.k_directions) * kScores * sizeof(S)),
        weights_(2 * E::b_panel_size(kKeyBlock) * sizeof(Packed)),
        out_((1 + op.k_directions) * out_size_ * sizeof(S)),
        mean_(op.k_directions * NR * sizeof(S)) {}

  void run(const QueryBlock& block, int64_t group) {
    // Of a root, the keys lie where those that continue it look for them.
    const bool continues = block.before > 0;
    PackedKeys<E, T>& own = op_.parent && !block.continues ? base_ : own_;
    if (continues) base_.pack(block.base, block.before, group);
    own.pack(block.own, block.tokens, group);
    const int64_t per_group = op_.h / op_.g;
    for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
      for (int64_t j = 0; j <= op_.k_directions; ++j) {
        const View<T> rows = head_rows<T>(j == 0 ? op_.q : op_.dq, j - 1, block.first, head);
        E::pack_b(rows, block.count, op_.e, queries_.at(j * NR));
      }
      start();
      if (continues) attend(base_, 0, block.before, block);
      attend(own, block.before, block.tokens, block);
      write(block, head);
    }
  }

 private:
  static constexpr int64_t kScores = kKeyBlock * NR;

  void start() {
    fresh_ = true;
    for (int v = 0; v < V; ++v) {
      store(max_ + v * W, splat(-S(INFINITY)));
      store(sum_ + v * W, Vec<S>{});
    }
    std::memset(mean_.template as<S>(), 0, op_.k_directions * NR * sizeof(S));
  }

  void attend(const PackedKeys<E, T>& keys, int64_t position, int64_t tokens, const QueryBlock& block) {
    for_key_ranges(op_, block, position, tokens, [&](const KeyRange& at) { add_block(keys, at); });
  }

  S* scores(int64_t j) { return scores_.template as<S>() + j * kScores; }
  S* out(int64_t j) { return out_.template as<S>() + j * out_size_; }
  S* mean(int64_t k) { return mean_.template as<S>() + k * NR; }

  void add_block(const PackedKeys<E, T>& keys, const KeyRange& at) {
    for (int64_t r = at.lo; r < at.hi; r += E::MR) {
      const int64_t row = (r - at.lo) * NR;
      E::multiply(keys.key_panel(0, at.t + r), queries_.at(0), op_.e, scores(0) + row, NR, false);
      for (int64_t j = 1; j <= op_.k_directions; ++j) {
        E::multiply(keys.key_panel(0, at.t + r), queries_.at(j * NR), op_.e, scores(j) + row, NR, false);
        E::multiply(keys.key_panel(j, at.t + r), queries_.at(0), op_.e, scores(j) + row, NR, true);
      }
    }
    if (op_.softcap != 0 || op_.scale <= 0) finish_scores(at.hi - at.lo);
    for (int64_t r = at.lo; r < at.hi; ++r) hide(op_, at.offset + r, scores(0) + (r - at.lo) * NR, NR, -S(INFINITY));
    exponentiate(at.hi - at.lo);
    for (int64_t j = 1; j <= op_.k_directions; ++j) weigh_tangent(j, at.hi - at.lo);
    add_values(keys, at);
    fresh_ = false;
  }

  // Scores become c(scale s), the tangents' c'(scale s) ds. A scale > 0 alone waits for the exponential.
  void finish_scores(int64_t rows) {
    const S scale = S(op_.scale), softcap = S(op_.softcap);
    for (int64_t c = 0; c < rows * NR; c += W) {
      const Vec<S> x = load(scores(0) + c) * scale;
      if (softcap == 0) {
        store(scores(0) + c, x);
        continue;
      }
      const Vec<S> t = tanh_lanes(Vec<S>(x / softcap));
      store(scores(0) + c, Vec<S>(t * softcap));
      for (int64_t j = 1; j <= op_.k_directions; ++j) store(scores(j) + c, Vec<S>(load(scores(j) + c) * (1 - t * t)));
    }
  }

  // Scores become e^(s - max), by powers of 2; all sums so far are rescaled to the new maximum.
  void exponentiate(int64_t rows) {
    const S factor = S(op_.softcap != 0 || op_.scale <= 0 ? kLog2E : op_.scale * kLog2E);
    Vec<S> high[V], total[V] = {}, shift[V];
    for (int v = 0; v < V; ++v) high[v] = splat(-S(INFINITY));
    S* s = scores(0);
    for (int64_t c = 0; c < rows * NR; c += NR) {
      for (int v = 0; v < V; ++v) {
        const Vec<S> x = load(s + c + v * W);
        high[v] = x > high[v] ? x : high[v];
      }
    }
    bool grew = false;
    for (int v = 0; v < V; ++v) {
      const Vec<S> before = load(max_ + v * W);
      high[v] = high[v] * factor;
      high[v] = before > high[v] ? before : high[v];
      // a query that has seen no key yet has no maximum to subtract
      shift[v] = high[v] == -S(INFINITY) ? Vec<S>{} : high[v];
      const Vec<S> scale = exp2_lanes(Vec<S>(before - shift[v]));
      store(rescale_ + v * W, scale);
      for (int lane = 0; lane < W; ++lane) grew = grew || scale[lane] != 1;
      store(max_ + v * W, high[v]);
    }
    for (int64_t c = 0; c < rows * NR; c += NR) {
      for (int v = 0; v < V; ++v) {
        const Vec<S> x = exp2_lanes(Vec<S>(load(s + c + v * W) * factor - shift[v]));
        store(s + c + v * W, x);
        total[v] += x;
      }
    }
    for (int v = 0; v < V; ++v) store(sum_ + v * W, Vec<S>(load(sum_ + v * W) * load(rescale_ + v * W) + total[v]));
    if (grew && !fresh_) rescale();
  }

  void rescale() {
    const int64_t rows = round_up(op_.f, E::MR);
    for (int64_t j = 0; j <= op_.k_directions; ++j)
      for (int64_t r = 0; r < rows; ++r) rescale_row(out(j) + r * NR);
    for (int64_t k = 0; k < op_.k_directions; ++k) rescale_row(mean(k));
  }
  void rescale_row(S* row) const {
    for (int c = 0; c < NR; c += W) store(row + c, Vec<S>(load(row + c) * load(rescale_ + c)));
  }

  // ds become e^(s - max) scale ds.
  void weigh_tangent(int64_t j, int64_t rows) {
    const S scale = S(op_.scale);
    Vec<S> total[V];
    for (int v = 0; v < V; ++v) total[v] = load(mean(j - 1) + v * W);
    const S* p = scores(0);
    S* ds = scores(j);
    for (int64_t c = 0; c < rows * NR; c += NR) {
      for (int v = 0; v < V; ++v) {
        const Vec<S> x = load(p + c + v * W) * (load(ds + c + v * W) * scale);
        store(ds + c + v * W, x);
        total[v] += x;
      }
    }
    for (int v = 0; v < V; ++v) store(mean(j - 1) + v * W, total[v]);
  }

  void add_values(const PackedKeys<E, T>& keys, const KeyRange& at) {
    const int64_t rows = at.hi - at.lo, skipped = E::a_panel_size(at.lo);
    Packed* room = weights_.template as<Packed>();
    const Packed* p = E::pack_rows(scores(0), rows, room);
    for (int64_t f = 0; f < op_.f; f += E::MR)
      E::multiply(keys.value_panel(0, at.t, f) + skipped, p, rows, out(0) + f * NR, NR, !fresh_);
    for (int64_t j = 1; j <= op_.k_directions; ++j) {
      const Packed* dp = E::pack_rows(scores(j), rows, room + E::b_panel_size(kKeyBlock));
      for (int64_t f = 0; f < op_.f; f += E::MR) {
        E::multiply(keys.value_panel(0, at.t, f) + skipped, dp, rows, out(j) + f * NR, NR, !fresh_);
        E::multiply(keys.value_panel(j, at.t, f) + skipped, p, rows, out(j) + f * NR, NR, true);
      }
    }
  }

  void write(const QueryBlock& block, int64_t head) {
    S* lse = static_cast<S*>(op_.lse) + block.first * op_.h + head;
    for (int64_t t = 0; t < block.count; ++t) lse[t * op_.h] = S(max_[t] / kLog2E + std::log(double(sum_[t])));
    for (int64_t j = 0; j <= op_.k_directions; ++j) {
      const int64_t row = ((j == 0 ? 0 : (j - 1) * op_.n) + block.first) * op_.h + head;
      T* to = static_cast<T*>(j == 0 ? op_.out : op_.dout) + row * op_.f;
      write_transposed<S, NR>(out(j), op_.f, block.count, to, op_.h * op_.f, [&](Vec<S> x, int c, int64_t f) {
        const Vec<S> inverse = 1 / load(sum_ + c);
        if (j > 0) x -= load(mean(j - 1) + c) * (load(out(0) + f * NR + c) * inverse);
        return Vec<S>(x * inverse);
      });
    }
  }

  const Attention& op_;
  int64_t out_size_;
  PackedKeys<E, T> base_, own_;
  Panels<E> queries_;
  Buffer scores_, weights_, out_, mean_;
  bool fresh_ = true;
  alignas(64) S max_[NR] /* in powers of 2 */, sum_[NR], rescale_[NR];
};

template <class E, class T>
void attention_with(const Attention& op, const Parallel& parallel) {
  const AttentionPlan plan(op, E::NR);
  plan.run(parallel, op.g, [&](const auto& blocks) {
    [[maybe_unused]] typename E::Scope scope;
    AttentionPass<E, T> pass(op, plan.longest());
    blocks([&](const QueryBlock& block, int64_t group) { pass.run(block, group); });
  });
}

}  // namespace
}  // namespace u2a
