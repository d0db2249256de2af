// The tile form of ghost_dot: tiles of an example's gradient G_i = sum_t g_t a_t^T, contracted at once with all K
// directions: 2 T I O + 2 K I O flops an example, where the row form takes 2 K T I O.
//
// Directions are reused from the level-2 cache by every example of a group, and examples from registers by every
// direction: the contraction of a few tiles with a few directions is itself a small matrix product over tile entries.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// In tokens of the row form with one direction: the tile form's product, whose panels are only T deep, takes 4/3 T, and
// each direction as long as E::kDirectionTokens tokens (N 2048, T 128, I = O = 1024, K 1, 2 and 16, one thread).
template <class E>
bool tile_form_is_cheaper(int64_t tokens, int64_t directions) {
  return round_up(tokens, E::kDepth) * 4 / 3 + directions * E::kDirectionTokens < directions * tokens;
}

template <class E, class T>
class TileDots {
  using S = typename E::Accumulate;
  static constexpr int64_t kArea = E::MR * E::NR, kVectors = kArea / kLanes<S>;
  // Directions by examples whose sums are kept in registers: 16 of 32, or 8 of 16.
  static constexpr int64_t kAtOnce = 4, kExamples = U2A_VECTOR_BYTES == 64 ? 4 : 2;
  // What a thread takes of its level-2 cache: row panels of G at a time, their tiles of directions, their rows of g.
  static constexpr int64_t kRowPanels = 128 / E::MR, kDirectionBytes = 512 << 10, kGradientBytes = 768 << 10;

 public:
  // Contracts the examples listed in `chosen`; sums (K x B) receives their results and is added to.
  TileDots(const GhostDot& op, const Parallel& parallel, const int32_t* chosen, int64_t count, double* sums)
      : op_(op),
        parallel_(parallel),
        chosen_(chosen),
        count_(count),
        sums_(sums),
        together_(smaller(op.k, kDirectionBytes / int64_t(kRowPanels * kArea * sizeof(S)))) {}

  void run() {
    for (int64_t first = 0, end; first < count_; first = end) {
      int64_t bytes = 0;
      for (end = first; end < count_ && (end == first || bytes < kGradientBytes); ++end)
        bytes += kRowPanels * E::a_panel_size(tokens(end)) * sizeof(typename E::Packed);
      add_group(first, end);
    }
  }

 private:
  int64_t begin(int64_t e) const { return op_.cu_seqlens[chosen_[e]]; }
  int64_t tokens(int64_t e) const { return op_.cu_seqlens[chosen_[e] + 1] - begin(e); }

  // Panels of one operand for several examples, each as deep as its example is long.
  template <bool IsA>
  struct GroupPanels {
    int64_t panels;
    Buffer offsets, packed;
    GroupPanels(const TileDots& dots, int64_t first, int64_t end, int64_t width)
        : panels(ceil_div(width, IsA ? E::MR : E::NR)),
          offsets((end - first + 1) * sizeof(int64_t)),
          packed(place(dots, first, end) * sizeof(typename E::Packed)) {}
    int64_t place(const TileDots& dots, int64_t first, int64_t end) {
      int64_t* at = offsets.as<int64_t>();
      at[0] = 0;
      for (int64_t e = first; e < end; ++e) {
        const int64_t t = dots.tokens(e);
        const int64_t size = IsA ? E::a_panel_size(t) : E::b_panel_size(t);
        at[e - first + 1] = at[e - first] + panels * size + kLanes<typename E::Packed>;
      }
      return at[end - first];
    }
    typename E::Packed* at(int64_t e, int64_t panel, int64_t tokens) const {
      const int64_t size = IsA ? E::a_panel_size(tokens) : E::b_panel_size(tokens);
      return packed.template as<typename E::Packed>() + offsets.as<int64_t>()[e] + panel * size;
    }
  };

  void add_group(int64_t first, int64_t end) {
    GroupPanels<false> a(*this, first, end, op_.i);
    const View<T> source = view<T>(op_.a);
    parallel_for(parallel_, end - first, [&](int64_t from, int64_t to) {
      for (int64_t e = from; e < to; ++e)
        for (int64_t p = 0; p < a.panels; ++p)
          E::pack_b(View<T>{source.from_row(begin(first + e)).data + p * E::NR, 1, source.row}, op_.i - p * E::NR,
                    tokens(first + e), a.at(e, p, tokens(first + e)));
    });
    // One block of rows of G a task: its sums are kept apart and added in order, whatever the number of threads.
    const int64_t blocks = ceil_div(op_.o, kRowPanels * E::MR), size = op_.k * (end - first);
    Buffer parts(blocks * size * sizeof(double));
    std::memset(parts.as<double>(), 0, blocks * size * sizeof(double));
    parallel_for(parallel_, blocks, [&](int64_t from, int64_t to) {
      [[maybe_unused]] typename E::Scope scope;
      for (int64_t block = from; block < to; ++block)
        add_block(first, end, block * kRowPanels * E::MR, a, parts.as<double>() + block * size);
    });
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < op_.k; ++k)
        for (int64_t e = 0; e < end - first; ++e)
          sums_[k * op_.b + chosen_[first + e]] += parts.as<double>()[block * size + k * (end - first) + e];
  }

  void add_block(int64_t first, int64_t end, int64_t o, const GroupPanels<false>& a, double* part) {
    const int64_t count = smaller(kRowPanels * E::MR, op_.o - o), examples = end - first;
    GroupPanels<true> g(*this, first, end, count);
    const View<T> source = view<T>(op_.g);
    for (int64_t e = 0; e < examples; ++e)
      for (int64_t p = 0; p < g.panels; ++p)
        E::pack_a(View<T>{source.from_row(begin(first + e)).data + o + p * E::MR, 1, source.row}, count - p * E::MR,
                  tokens(first + e), g.at(e, p, tokens(first + e)));
    Buffer directions(together_ * g.panels * kArea * sizeof(S));
    for (int64_t k = 0; k < op_.k; k += together_) {
      const int64_t some = smaller(together_, op_.k - k);
      for (int64_t p = 0; p < a.panels; ++p) {
        lay_out(k, some, o, count, p * E::NR, directions.as<S>());
        for (int64_t e = 0; e < examples; e += kExamples)
          add_tiles(first, e, smaller(kExamples, examples - e), a, p, g, count, directions.as<S>(), some,
                    part + k * examples + e, examples);
      }
    }
  }

  // Tiles of directions k on, one behind the other, zero outside of the matrix: (row panel, direction, tile).
  void lay_out(int64_t k, int64_t some, int64_t o, int64_t count, int64_t i, S* tiles) const {
    constexpr int64_t W = kLanes<S>;
    const View<T> v = view<T>(op_.v);
    const int64_t columns = smaller<int64_t>(E::NR, op_.i - i);
    for (int64_t r = 0; r < round_up(count, E::MR); ++r) {
      for (int64_t j = 0; j < some; ++j) {
        S* to = tiles + (r / E::MR * some + j) * kArea + r % E::MR * E::NR;
        const T* from = v.data + ((k + j) * op_.o + o + r) * v.row + i;
        int64_t c = 0;
        if (r < count) {
          // The next panel's turn comes when this one is contracted.
          for (int64_t x = 0; x < E::NR; x += 64 / sizeof(T)) __builtin_prefetch(from + E::NR + x, 0, 2);
          for (; c + W <= columns; c += W) store(to + c, load(from + c));
          for (; c < columns; ++c) to[c] = scalar(from[c]);
        }
        for (; c < E::NR; ++c) to[c] = 0;
      }
    }
  }

  // part[j * stride + x] += <direction j, column panel p of G> of the examples e + x.
  void add_tiles(int64_t first, int64_t e, int64_t few, const GroupPanels<false>& a, int64_t p,
                 const GroupPanels<true>& g, int64_t count, const S* directions, int64_t some, double* part,
                 int64_t stride) const {
    alignas(64) S tiles[kExamples][kArea];
    Buffer sums(round_up(some, kAtOnce) * kExamples * sizeof(Vec<S>));
    std::memset(sums.as<S>(), 0, round_up(some, kAtOnce) * kExamples * sizeof(Vec<S>));
    std::memset(tiles, 0, sizeof(tiles));
    const int64_t columns = smaller<int64_t>(E::NR, op_.i - p * E::NR);
    for (int64_t q = 0; q < g.panels; ++q) {
      for (int64_t x = 0; x < few; ++x) {
        const int64_t t = tokens(first + e + x);
        E::multiply(g.at(e + x, q, t), a.at(e + x, p, t), t, tiles[x], E::NR, false);
        clear_outside(tiles[x], smaller<int64_t>(E::MR, count - q * E::MR), columns);
      }
      for (int64_t j = 0; j < some; j += kAtOnce)
        contract(directions + (q * some + j) * kArea, smaller(kAtOnce, some - j), tiles[0],
                 sums.as<S>() + j * kExamples * kLanes<S>);
    }
    for (int64_t j = 0; j < some; ++j)
      for (int64_t x = 0; x < few; ++x)
        part[j * stride + x] += double(sum_lanes<S>(load(sums.as<S>() + (j * kExamples + x) * kLanes<S>)));
  }

  // Panels are padded with zeros, whose product with an infinity is not 0.
  static void clear_outside(S* tile, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < E::MR; ++r)
      for (int64_t c = r < rows ? columns : 0; c < E::NR; ++c) tile[r * E::NR + c] = 0;
  }

  // sums[j][x] += direction j * tile x, vector by vector.
  static void contract(const S* directions, int64_t some, const S* tiles, S* sums) {
    constexpr int64_t W = kLanes<S>;
    // Missing directions repeat the last; nothing reads their sums.
    const S* direction[kAtOnce];
    for (int64_t j = 0; j < kAtOnce; ++j) direction[j] = directions + smaller(j, some - 1) * kArea;
    Vec<S> sum[kAtOnce][kExamples];
    for (int j = 0; j < kAtOnce; ++j)
      for (int x = 0; x < kExamples; ++x) sum[j][x] = load(sums + (j * kExamples + x) * W);
    for (int64_t c = 0; c < kArea; c += W) {
      Vec<S> entries[kExamples];
#pragma GCC unroll 4
      for (int x = 0; x < kExamples; ++x) entries[x] = load(tiles + x * kArea + c);
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) {
        const Vec<S> v = load(direction[j] + c);
#pragma GCC unroll 4
        for (int x = 0; x < kExamples; ++x) sum[j][x] += v * entries[x];
      }
    }
    for (int j = 0; j < kAtOnce; ++j)
      for (int x = 0; x < kExamples; ++x) store(sums + (j * kExamples + x) * W, sum[j][x]);
  }

  const GhostDot& op_;
  const Parallel& parallel_;
  const int32_t* chosen_;
  int64_t count_;
  double* sums_;
  int64_t together_;  // directions at a time
};

}  // namespace
}  // namespace u2a
