// The work of attention: blocks of queries of one segment, and shares of about equal cost for the threads.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

constexpr double kLog2E = 1.44269504088896340736;

// Rows of one head as a matrix, from `token` on.
template <class T>
View<T> head_rows(const Heads& x, int64_t direction, int64_t token, int64_t head) {
  const int64_t skipped = x.direction * larger<int64_t>(0, direction) + x.token * token + x.head * head;
  return {static_cast<const T*>(x.data) + skipped, x.token, 1};
}

// Writes `count` of NR columns, `features` long, as rows `stride` apart; finish(x, column, row) has the last word on W
// lanes of columns from `column` on.
template <class S, int NR, class T, class Finish>
void write_transposed(const S* columns, int64_t features, int64_t count, T* to, int64_t stride, const Finish& finish) {
  constexpr int W = kLanes<S>;
  for (int c = 0; c < NR && c < count; c += W) {
    for (int64_t f = 0; f < features; f += W) {
      Vec<S> square[W];
      for (int r = 0; r < W; ++r) square[r] = finish(load(columns + (f + r) * NR + c), c, f + r);
      transpose(square);
      T* corner = to + c * stride + f;
      if (count - c >= W && features - f >= W) {
        for (int t = 0; t < W; ++t) store_rounded(corner + t * stride, square[t]);
      } else {
        for (int64_t t = 0; t < smaller<int64_t>(W, count - c); ++t)
          store_rounded(corner + t * stride, square[t], features - f);
      }
    }
  }
}

// Queries `first` to `first + count` of a segment that owns `tokens` rows from `own` on and continues one that owns
// `before` rows from `base` on.
struct QueryBlock {
  int64_t first, count, own, tokens, base, before;
  bool continues;
  int64_t cost;  // of all blocks up to this one
};

// Keys per step: a multiple of every engine's MR and of the 32 depths of a tile of pairs. With NR queries, scores and a
// tangent fit the level-1 cache.
constexpr int64_t kKeyBlock = 192, kKeyStep = 96;

// Rows `lo` to `hi` of the scores of a block of keys that starts with the segment's key t; row r's key lies `offset` +
// r tokens after the first query.
struct KeyRange {
  int64_t t, lo, hi, offset;
};

// Calls body for the ranges that some query of the block sees, out of `tokens` keys whose first lies at `position`.
template <class Body>
void for_key_ranges(const Attention& op, const QueryBlock& block, int64_t position, int64_t tokens, const Body& body) {
  const int64_t query = block.before + block.first - block.own;
  const int64_t end = smaller(tokens, query + block.count - position);
  const int64_t begin = op.window ? larger<int64_t>(0, query - op.window + 1 - position) : 0;
  for (int64_t t = begin / kKeyBlock * kKeyBlock; t < end; t += kKeyBlock) {
    const int64_t lo = larger<int64_t>(0, begin - t) / kKeyStep * kKeyStep;
    body(KeyRange{t, lo, smaller(kKeyBlock, end - t), position + t - query});
  }
}

// Gives `hidden` to the entries of a score row whose query does not see the row's key.
template <class S>
void hide(const Attention& op, int64_t offset, S* row, int64_t width, S hidden) {
  const int64_t last = op.window ? offset + op.window - 1 : width;
  if (offset <= 0 && last >= width - 1) return;
  constexpr int W = kLanes<S>;
  Vec<S> query{};
  for (int lane = 0; lane < W; ++lane) query[lane] = S(lane);
  for (int64_t c = 0; c < width; c += W, query += S(W))
    store(row + c, ((query < S(offset)) | (query > S(last))) ? splat(hidden) : load(row + c));
}

class AttentionPlan {
 public:
  AttentionPlan(const Attention& op, int64_t width) : count_(0), longest_(0), blocks_(bytes(op, width)) {
    int64_t cost = 0;
    for (int64_t j = 0; j < op.b; ++j) {
      const int64_t own = op.cu_seqlens[j], tokens = op.cu_seqlens[j + 1] - own, root = op.parent ? op.parent[j] : -1;
      const int64_t base = root < 0 ? 0 : op.cu_seqlens[root], before = root < 0 ? 0 : op.cu_seqlens[root + 1] - base;
      longest_ = larger(longest_, tokens);
      for (int64_t t = 0; t < tokens; t += width) {
        const int64_t count = smaller(width, tokens - t), seen = before + t + count;
        cost += width + (op.window ? smaller(seen, op.window + count) : seen);
        blocks_.as<QueryBlock>()[count_++] = {own + t, count, own, tokens, base, before, root >= 0, cost};
      }
    }
  }

  int64_t longest() const { return longest_; }

  // Runs share(blocks) on every thread, where blocks(body) calls body(block, group) for the thread's share of the
  // blocks of every group, group by group and block after block, so that neighbors find each other's keys packed.
  template <class Share>
  void run(const Parallel& parallel, int64_t groups, const Share& share) const {
    if (count_ == 0) return;
    const int64_t shares = smaller<int64_t>(parallel.threads, groups * count_);
    parallel_for(parallel, shares, [&](int64_t begin, int64_t end) {
      share([&](const auto& body) {
        const int64_t last = bound(end, shares, groups);
        for (int64_t task = bound(begin, shares, groups); task < last; ++task)
          body(blocks_.as<QueryBlock>()[task % count_], task / count_);
      });
    });
  }

 private:
  static size_t bytes(const Attention& op, int64_t width) {
    int64_t count = 0;
    for (int64_t j = 0; j < op.b; ++j) count += ceil_div(op.cu_seqlens[j + 1] - op.cu_seqlens[j], width);
    return count * sizeof(QueryBlock);
  }

  // The first task of a share.
  int64_t bound(int64_t share, int64_t shares, int64_t groups) const {
    const QueryBlock* blocks = blocks_.as<QueryBlock>();
    const int64_t whole = blocks[count_ - 1].cost, cost = whole * groups * share / shares;
    int64_t task = cost / larger<int64_t>(1, whole) * count_;
    while (task < groups * count_ && task / count_ * whole + blocks[task % count_].cost <= cost) ++task;
    return task;
  }

  int64_t count_, longest_;
  Buffer blocks_;
};

}  // namespace
}  // namespace u2a
