// attention_backward: with p = e^(s - lse), dp = grad v^T and ds = scale c' p (dp - grad . out), dq = ds k, dk = ds^T q
// and dv = p^T grad, one block of queries by one of keys at a time.
//
// Scores are made transposed as in attention.h: p and ds are at once the operand of the product over keys, dq, and the
// rows of those over queries, dk and dv. One thread takes a root with all that continues it, so that the gradients of
// its keys are summed in order.
#pragma once

#include "attention_plan.h"

namespace u2a {
namespace {

// Keys and values of one segment and key head, packed, and their gradients.
template <class E, class T>
class KeyGradients {
  using S = typename E::Accumulate;

 public:
  using Packed = typename E::Packed;

  KeyGradients(const AttentionBackward& op, int64_t most)
      : op_(op),
        key_width_(round_up(op.attention.e, E::NR)),
        value_width_(round_up(op.attention.f, E::NR)),
        rows_(round_up(most, kKeyBlock)),
        features_(round_up(op.attention.e, E::MR)),
        keys_(rows_, op.attention.e, true),
        values_(rows_, op.attention.f, true),
        columns_(rows_ / kKeyBlock * features_, kKeyBlock, true),
        dk_(rows_ * key_width_ * sizeof(S)),
        dv_(rows_ * value_width_ * sizeof(S)) {}

  // Packs a segment and clears its gradients.
  void start(int64_t first, int64_t tokens, int64_t head) {
    const Attention& op = op_.attention;
    first_ = first, tokens_ = tokens, head_ = head;
    const View<T> k = head_rows<T>(op.k, 0, first, head);
    keys_.pack_a(k, tokens);
    values_.pack_a(head_rows<T>(op.v, 0, first, head), tokens);
    for (int64_t t = 0; t < tokens; t += kKeyBlock) {
      const View<T> columns = {k.data + t * k.row, 1, k.row};
      for (int64_t e = 0; e < op.e; e += E::MR)
        E::pack_a(columns.from_row(e), op.e - e, smaller(kKeyBlock, tokens - t), column_panel(t, e));
    }
    std::memset(dk(0), 0, round_up(tokens, kKeyBlock) * key_width_ * sizeof(S));
    std::memset(dv(0), 0, round_up(tokens, kKeyBlock) * value_width_ * sizeof(S));
  }

  void write() const {
    const Attention& op = op_.attention;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t row = (first_ + t) * op.g + head_;
      write_row(dk(t), op.e, static_cast<T*>(op_.dk) + row * op.e);
      write_row(dv(t), op.f, static_cast<T*>(op_.dv) + row * op.f);
    }
  }

  int64_t tokens() const { return tokens_; }
  Packed* key_panel(int64_t t) const { return keys_.at(t); }
  Packed* value_panel(int64_t t) const { return values_.at(t); }
  // Features from e on of the keys of t's block.
  Packed* column_panel(int64_t t, int64_t e) const { return columns_.at(t / kKeyBlock * features_ + e); }
  S* dk(int64_t t) const { return dk_.template as<S>() + t * key_width_; }
  S* dv(int64_t t) const { return dv_.template as<S>() + t * value_width_; }
  int64_t key_width() const { return key_width_; }
  int64_t value_width() const { return value_width_; }

 private:
  static void write_row(const S* from, int64_t width, T* to) {
    for (int64_t c = 0; c < width; c += kLanes<S>) store_rounded(to + c, load(from + c), width - c);
  }

  const AttentionBackward& op_;
  int64_t key_width_, value_width_, rows_, features_, first_ = 0, tokens_ = 0, head_ = 0;
  Panels<E> keys_, values_, columns_;
  Buffer dk_, dv_;
};

template <class E, class T>
class AttentionBackwardPass {
  using S = typename E::Accumulate;
  using Packed = typename E::Packed;
  using Keys = KeyGradients<E, T>;
  static constexpr int W = kLanes<S>, NR = E::NR;

 public:
  AttentionBackwardPass(const AttentionBackward& op, int64_t most)
      : op_(op),
        root_(op, most),
        own_(op, op.attention.parent ? most : 0),
        queries_(NR, op.attention.e, false),
        grads_(NR, op.attention.f, false),
        query_columns_(op.attention.e, NR, false),
        grad_columns_(op.attention.f, NR, false),
        p_(kKeyBlock * NR * sizeof(S)),
        ds_(kKeyBlock * NR * sizeof(S)),
        room_((E::b_panel_size(kKeyBlock) + E::a_panel_size(NR) + W) * sizeof(Packed)),
        dq_((round_up(op.attention.e, E::MR) + W) * NR * sizeof(S)) {}

  // A root segment and those up to `end` that continue it.
  void run(int64_t root, int64_t end, int64_t group) {
    const int32_t* starts = op_.attention.cu_seqlens;
    for (int64_t j = root; j < end; ++j) {
      Keys& keys = j == root ? root_ : own_;
      keys.start(starts[j], starts[j + 1] - starts[j], group);
      for (int64_t t = 0; t < keys.tokens(); t += NR) {
        const int64_t before = j == root ? 0 : root_.tokens(), count = smaller<int64_t>(NR, keys.tokens() - t);
        run_block({starts[j] + t, count, starts[j], keys.tokens(), starts[root], before, j > root, 0}, group, keys);
      }
      if (j > root) own_.write();
    }
    root_.write();
  }

 private:
  void run_block(const QueryBlock& block, int64_t group, Keys& own) {
    const int64_t per_group = op_.attention.h / op_.attention.g;
    for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
      pack(block, head);
      fresh_ = true;
      if (block.continues) attend(root_, 0, block);
      attend(own, block.before, block);
      write(block, head);
    }
  }

  void pack(const QueryBlock& block, int64_t head) {
    const Attention& op = op_.attention;
    const View<T> q = head_rows<T>(op.q, 0, block.first, head), grad = head_rows<T>(op_.grad, 0, block.first, head);
    E::pack_b(q, block.count, op.e, queries_.at(0));
    E::pack_b(grad, block.count, op.f, grads_.at(0));
    for (int64_t e = 0; e < op.e; e += E::NR)
      E::pack_b(View<T>{q.data + e, 1, q.row}, op.e - e, block.count, query_columns_.at(e));
    for (int64_t f = 0; f < op.f; f += E::NR)
      E::pack_b(View<T>{grad.data + f, 1, grad.row}, op.f - f, block.count, grad_columns_.at(f));
    const View<T> out = head_rows<T>(op_.out, 0, block.first, head);
    for (int64_t t = 0; t < NR; ++t) {
      // the weights of columns without a query are 0
      const int64_t row = (block.first + t) * op.h + head;
      lse_[t] = t < block.count ? S(static_cast<const S*>(op_.lse)[row] * kLog2E) : S(INFINITY);
      delta_[t] = t < block.count ? product(grad.data + t * grad.row, out.data + t * out.row, op.f) : S(0);
    }
  }

  static S product(const T* x, const T* y, int64_t count) {
    Vec<S> sum{};
    int64_t c = 0;
    for (; c + W <= count; c += W) sum += load(x + c) * load(y + c);
    S rest = 0;
    for (; c < count; ++c) rest += scalar(x[c]) * scalar(y[c]);
    return sum_lanes<S>(sum) + rest;
  }

  void attend(Keys& keys, int64_t position, const QueryBlock& block) {
    for_key_ranges(op_.attention, block, position, keys.tokens(), [&](const KeyRange& at) {
      const int64_t rows = at.hi - at.lo;
      S *p = p_.as<S>(), *ds = ds_.as<S>();
      for (int64_t r = 0; r < rows; r += E::MR) {
        E::multiply(keys.key_panel(at.t + at.lo + r), queries_.at(0), op_.attention.e, p + r * NR, NR, false);
        E::multiply(keys.value_panel(at.t + at.lo + r), grads_.at(0), op_.attention.f, ds + r * NR, NR, false);
      }
      differentiate(at, p, ds);
      add_query_gradient(keys, at, ds);
      add_key_gradients(keys, at.t + at.lo, rows, block.count, p, ds);
      fresh_ = false;
    });
  }

  // From the scores and dp, p and ds; both are 0 in the rows up to the next whole panel.
  void differentiate(const KeyRange& at, S* p, S* ds) const {
    const Attention& op = op_.attention;
    const S scale = S(op.scale), softcap = S(op.softcap), power = S((softcap != 0 ? softcap : op.scale) * kLog2E);
    const int64_t rows = at.hi - at.lo;
    for (int64_t r = 0; r < rows; ++r) {
      S *s = p + r * NR, *d = ds + r * NR;
      for (int c = 0; c < NR; c += W) {
        Vec<S> x = load(s + c), slope = splat(scale);
        if (softcap != 0) {
          x = tanh_lanes(Vec<S>(x * scale / softcap));
          slope *= 1 - x * x;
        }
        store(s + c, exp2_lanes(Vec<S>(x * power - load(lse_ + c))));
        store(d + c, Vec<S>((load(d + c) - load(delta_ + c)) * slope));
      }
      hide(op, at.offset + at.lo + r, s, NR, S(0));
      for (int c = 0; c < NR; c += W) store(d + c, Vec<S>(load(d + c) * load(s + c)));
    }
    const int64_t bytes = (round_up(rows, E::MR) - rows) * NR * sizeof(S);
    std::memset(p + rows * NR, 0, bytes);
    std::memset(ds + rows * NR, 0, bytes);
  }

  void add_query_gradient(const Keys& keys, const KeyRange& at, const S* ds) {
    const Packed* b = E::pack_rows(ds, at.hi - at.lo, room_.as<Packed>());
    for (int64_t e = 0; e < op_.attention.e; e += E::MR) {
      const Packed* a = keys.column_panel(at.t, e) + E::a_panel_size(at.lo);
      E::multiply(a, b, at.hi - at.lo, dq_.as<S>() + e * NR, NR, !fresh_);
    }
  }

  void add_key_gradients(Keys& keys, int64_t t, int64_t rows, int64_t count, const S* p, const S* ds) {
    Packed* room = room_.as<Packed>() + E::b_panel_size(kKeyBlock);
    const Attention& op = op_.attention;
    for (int64_t r = 0; r < rows; r += E::MR) {
      const Packed* a = E::pack_a_rows(ds + r * NR, room);
      for (int64_t e = 0; e < op.e; e += NR)
        E::multiply_rows(a, query_columns_.at(e), count, keys.dk(t + r) + e, keys.key_width(), true);
      a = E::pack_a_rows(p + r * NR, room);
      for (int64_t f = 0; f < op.f; f += NR)
        E::multiply_rows(a, grad_columns_.at(f), count, keys.dv(t + r) + f, keys.value_width(), true);
    }
  }

  void write(const QueryBlock& block, int64_t head) const {
    const Attention& op = op_.attention;
    T* to = static_cast<T*>(op_.dq) + (block.first * op.h + head) * op.e;
    write_transposed<S, NR>(dq_.as<S>(), op.e, block.count, to, op.h * op.e, [&](Vec<S> x, int, int64_t) { return x; });
  }

  const AttentionBackward& op_;
  Keys root_, own_;
  Panels<E> queries_, grads_, query_columns_, grad_columns_;
  Buffer p_, ds_, room_, dq_;
  bool fresh_ = true;
  alignas(64) S lse_[NR] /* in powers of 2 */, delta_[NR];
};

template <class E, class T>
void attention_backward_with(const AttentionBackward& op, const Parallel& parallel) {
  const Attention& shape = op.attention;
  Buffer roots((shape.b + 1) * sizeof(int64_t));
  int64_t count = 0, longest = 0;
  for (int64_t j = 0; j < shape.b; ++j) {
    if (!shape.parent || shape.parent[j] < 0) roots.as<int64_t>()[count++] = j;
    longest = larger<int64_t>(longest, shape.cu_seqlens[j + 1] - shape.cu_seqlens[j]);
  }
  roots.as<int64_t>()[count] = shape.b;
  parallel_for(parallel, count * shape.g, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename E::Scope scope;
    AttentionBackwardPass<E, T> pass(op, longest);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t* root = roots.as<int64_t>() + task % count;
      pass.run(root[0], root[1], task / count);
    }
  });
}

}  // namespace
}  // namespace u2a
