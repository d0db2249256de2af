// The tile form of ghost_dot: tiles of an example's gradient G_i = sum_t g_t a_t^T, contracted at once with all K
// directions: 2 T I O + 2 K I O flops an example, where the row form takes 2 K T I O.
//
// Directions are reused from the level-2 cache by every example of a group, and examples from registers by every
// direction: the contraction of a few tiles with a few directions is itself a small matrix product over tile entries.
// How directions lie decides which operand's vectors it multiplies: entries of a direction, or directions of an entry.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// In tokens of the row form with one direction: the tile form's product, whose panels are only T deep, takes as long as
// E::kProductThirds / 3 T, and each direction as long as E::kDirectionTokens (benchmarks.crossover measures both).
template <class E>
bool tile_form_is_cheaper(int64_t tokens, int64_t directions) {
  return round_up(tokens, E::kDepth) * E::kProductThirds / 3 + directions * E::kDirectionTokens < directions * tokens;
}

// Some directions of a stack: the entries of `count` rows and `columns` columns of each.
template <class T>
struct DirectionBlock {
  const T* data;
  Strides stride;
  int64_t some, count, columns;
  const T* at(int64_t j, int64_t r) const { return data + j * stride.direction + r * stride.row; }
};

// Contracts tiles of a few examples' gradients with tiles of a few directions, on the vector units: directions by
// examples, kAtOnce by kExamples sums stay in registers.
template <class E, class T>
class VectorContraction {
  using S = typename E::Accumulate;
  static constexpr int64_t kArea = E::MR * E::NR, W = kLanes<S>, kAtOnce = 4;

 public:
  static constexpr int64_t kExamples = U2A_VECTOR_BYTES == 64 ? 4 : 2;
  static constexpr int64_t kDirectionBytes = kArea * sizeof(S);  // of a tile of one direction
  static constexpr int64_t kColumnPanels = 1;                    // loaded at once

  VectorContraction(int64_t directions, int64_t row_panels)
      : directions_(directions * row_panels * kDirectionBytes),
        sums_(round_up(directions, kAtOnce) * kExamples * sizeof(Vec<S>)),
        tiles_(kExamples * kArea * sizeof(S)) {
    std::memset(tiles_.as<S>(), 0, kExamples * kArea * sizeof(S));
  }

  void load_directions(const DirectionBlock<T>& v) {
    some_ = v.some;
    S* tiles = directions_.as<S>();
    for (int64_t r = 0; r < round_up(v.count, E::MR); ++r) {
      for (int64_t j = 0; j < v.some; ++j) {
        S* to = tiles + (r / E::MR * v.some + j) * kArea + r % E::MR * E::NR;
        const T* from = v.at(j, r);
        int64_t c = 0;
        if (r < v.count) {
          // The next panel's turn comes when this one is contracted.
          for (int64_t x = 0; x < E::NR; x += 64 / sizeof(T)) __builtin_prefetch(from + E::NR + x, 0, 2);
          for (; c + W <= v.columns; c += W) store(to + c, load(from + c));
          for (; c < v.columns; ++c) to[c] = scalar(from[c]);
        }
        for (; c < E::NR; ++c) to[c] = 0;
      }
    }
  }

  void start() { std::memset(sums_.as<S>(), 0, round_up(some_, kAtOnce) * kExamples * sizeof(Vec<S>)); }

  // Where the tile of example x is to be made; it is taken in by shares once it is there.
  S* tile(int64_t x) { return tiles_.as<S>() + x * kArea; }
  void take(int64_t, int64_t) {}

  // Adds the products of the tiles of row panel q and column panel p.
  void add_panel(int64_t, int64_t q) {
    for (int64_t j = 0; j < some_; j += kAtOnce)
      contract(directions_.as<S>() + (q * some_ + j) * kArea, smaller(kAtOnce, some_ - j), tiles_.as<S>(),
               sums_.as<S>() + j * kExamples * W);
  }

  double sum(int64_t j, int64_t x) const { return sum_lanes<S>(load(sums_.as<S>() + (j * kExamples + x) * W)); }

 private:
  // sums[j][x] += direction j * tile x, vector by vector.
  static void contract(const S* directions, int64_t some, const S* tiles, S* sums) {
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

  int64_t some_ = 0;
  Buffer directions_, sums_, tiles_;  // directions: (row panel, direction, tile)
};

// The same for at least kLeastSideBySide directions that lie side by side, entry by entry: a vector of directions by
// kExamples sums. Directions are read where they are, in the order they lie in.
template <class E, class T>
class SideBySideContraction {
  using S = typename E::Accumulate;
  static constexpr int64_t kArea = E::MR * E::NR, W = kLanes<S>;
  static_assert(W <= kLeastSideBySide && E::kShares == 1);

 public:
  static constexpr int64_t kExamples = U2A_VECTOR_BYTES == 64 ? 16 : 8;
  static constexpr int64_t kDirectionBytes = 0, kColumnPanels = 1;  // nothing is packed

  SideBySideContraction(int64_t directions, int64_t)
      : sums_(ceil_div(directions, W) * kExamples * W * sizeof(double)), tiles_(kExamples * kArea * sizeof(S)) {
    std::memset(tiles_.as<S>(), 0, kExamples * kArea * sizeof(S));
  }

  void load_directions(const DirectionBlock<T>& v) {
    v_ = v;
    ask_for(1);
  }
  void start() { std::memset(sums_.as<double>(), 0, ceil_div(v_.some, W) * kExamples * W * sizeof(double)); }

  // While tiles are being made, the level-2 cache is asked for the directions of the next.
  S* tile(int64_t x) { return tiles_.as<S>() + x * kArea; }
  void take(int64_t x, int64_t) {
    int64_t line = lines_ * x / kExamples;
    const int64_t end = lines_ * (x + 1) / kExamples;
    for (int64_t r = line / row_lines_; line < end; ++r) {
      const T* from = next_ + r * v_.stride.row + line % row_lines_ * kLine;
      for (; line < smaller(end, (r + 1) * row_lines_); ++line, from += kLine) __builtin_prefetch(from, 0, 2);
    }
  }

  void add_panel(int64_t, int64_t q) {
    const int64_t rows = smaller<int64_t>(E::MR, v_.count - q * E::MR);
    for (int64_t b = 0; b < ceil_div(v_.some, W); ++b)
      contract(v_.at(first_of(b), q * E::MR), rows, sums_.as<double>() + b * kExamples * W);
    ask_for(q + 2);
  }

  double sum(int64_t j, int64_t x) const {
    const int64_t b = j / W;
    return sums_.as<double>()[(b * kExamples + x) * W + j - first_of(b)];
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  // The tiles of row panel q; behind the last, of the first in the next column panel, if there is one.
  void ask_for(int64_t q) {
    const bool here = q * E::MR < v_.count;
    next_ = v_.at(0, here ? q * E::MR : 0) + (here ? 0 : E::NR * v_.stride.column);
    row_lines_ = ceil_div(v_.columns * v_.some, kLine);
    lines_ = row_lines_ * smaller<int64_t>(E::MR, here ? v_.count - q * E::MR : v_.count);
  }
  // A last block that is not whole shares directions with the one before it.
  int64_t first_of(int64_t b) const { return smaller(b * W, v_.some - W); }

  // sums[x] += tile x times W directions; entries are added in S, tiles in double.
  void contract(const T* directions, int64_t rows, double* sums) const {
    const int64_t row = v_.stride.row, entry = v_.stride.column, columns = v_.columns;
    Vec<S> sum[kExamples] = {};
    const S* tile = tiles_.as<S>();
    for (int64_t r = 0; r < rows; ++r, directions += row, tile += E::NR) {
      const T* v = directions;
      for (int64_t c = 0; c < columns; ++c, v += entry) {
        const Vec<S> some = load(v);
#pragma GCC unroll 16
        for (int x = 0; x < kExamples; ++x) sum[x] += some * splat(tile[x * kArea + c]);
      }
    }
    alignas(64) S lanes[W];
    for (int x = 0; x < kExamples; ++x, sums += W) {
      store(lanes, sum[x]);
      for (int64_t i = 0; i < W; ++i) sums[i] += lanes[i];
    }
  }

  DirectionBlock<T> v_{};
  const T* next_ = nullptr;  // what is asked for, in lines
  int64_t row_lines_ = 1, lines_ = 0;
  Buffer sums_, tiles_;  // sums: (block, example, W)
};

// What contracts directions that lie one after the other, fewer than kMany of them and more, and what others.
template <class E, class T>
struct Contractions {
  static constexpr int64_t kMany = 1;
  using Few = VectorContraction<E, T>;
  using Many = VectorContraction<E, T>;
  using SideBySide = SideBySideContraction<E, T>;
};

template <class E, class T, class Contraction>
class TileDots {
  using S = typename E::Accumulate;
  static constexpr int64_t kExamples = Contraction::kExamples, kColumnPanels = Contraction::kColumnPanels;
  // What a thread takes of its level-2 cache: row panels of G at a time, their tiles of directions, their rows of g.
  static constexpr int64_t kRowPanels = 96 / E::MR, kDirectionBytes = 512 << 10, kGradientBytes = 1280 << 10;

 public:
  // Contracts the examples listed in `chosen`; sums (K x B) receives their results and is added to.
  TileDots(const GhostDot& op, const Parallel& parallel, const int32_t* chosen, int64_t count, double* sums)
      : op_(op), parallel_(parallel), chosen_(chosen), count_(count), sums_(sums), together_(most_directions(op.k)) {}

  void run() {
    for (int64_t first = 0, end; first < count_; first = end) {
      int64_t bytes = 0;
      for (end = first; end < count_ && (end == first || bytes < kGradientBytes); ++end)
        bytes += kRowPanels * E::a_panel_size(tokens(end)) * sizeof(typename E::Packed);
      add_group(first, end);
    }
  }

 private:
  static int64_t most_directions(int64_t k) {
    if constexpr (Contraction::kDirectionBytes == 0)
      return k;
    else
      return smaller(k, kDirectionBytes / (kRowPanels * kColumnPanels * Contraction::kDirectionBytes));
  }
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
    const Strides& by = op_.v.stride;
    const T* v = static_cast<const T*>(op_.v.data) + o * by.row;
    Contraction contraction(together_, g.panels);
    for (int64_t k = 0; k < op_.k; k += together_) {
      const int64_t some = smaller(together_, op_.k - k);
      for (int64_t p = 0; p < a.panels; p += kColumnPanels) {
        contraction.load_directions({v + k * by.direction + p * E::NR * by.column, by, some, count,
                                     smaller<int64_t>(kColumnPanels * E::NR, op_.i - p * E::NR)});
        for (int64_t c = p; c < smaller(p + kColumnPanels, a.panels); ++c)
          add_column(first, end, a, c, g, count, some, part + k * examples, contraction);
      }
    }
  }

  // Column panel p of all the examples' G, whose rows are those of g.
  void add_column(int64_t first, int64_t end, const GroupPanels<false>& a, int64_t p, const GroupPanels<true>& g,
                  int64_t count, int64_t some, double* part, Contraction& contraction) {
    const int64_t examples = end - first, columns = smaller<int64_t>(E::NR, op_.i - p * E::NR);
    for (int64_t e = 0; e < examples; e += kExamples) {
      const int64_t few = smaller(kExamples, examples - e);
      contraction.start();
      for (int64_t q = 0; q < g.panels; ++q) {
        const auto panels_of = [&](int64_t x, int64_t t) { return Operands{g.at(e + x, q, t), a.at(e + x, p, t)}; };
        make_tiles(first + e, few, panels_of, smaller<int64_t>(E::MR, count - q * E::MR), columns, contraction);
        contraction.add_panel(p % kColumnPanels, q);
      }
      for (int64_t j = 0; j < some; ++j)
        for (int64_t x = 0; x < few; ++x) part[j * examples + e + x] += contraction.sum(j, x);
    }
  }

  struct Operands {
    const typename E::Packed *g, *a;
  };

  // The tiles of examples e to e + few - 1; each is taken in while the next is being made.
  template <class PanelsOf>
  void make_tiles(int64_t e, int64_t few, const PanelsOf& panels_of, int64_t rows, int64_t columns,
                  Contraction& contraction) const {
    for (int64_t x = 0; x < few; ++x) {
      const int64_t t = tokens(e + x);
      const Operands panels = panels_of(x, t);
      E::multiply(panels.g, panels.a, t, contraction.tile(x), E::NR, false, [&](int64_t share) {
        if (x > 0) contraction.take(x - 1, share);
      });
      clear_outside(contraction.tile(x), rows, columns);
    }
    for (int64_t share = 0; share < E::kShares; ++share) contraction.take(few - 1, share);
  }

  // Panels are padded with zeros, whose product with an infinity is not 0.
  static void clear_outside(S* tile, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < E::MR; ++r)
      for (int64_t c = r < rows ? columns : 0; c < E::NR; ++c) tile[r * E::NR + c] = 0;
  }

  const GhostDot& op_;
  const Parallel& parallel_;
  const int32_t* chosen_;
  int64_t count_;
  double* sums_;
  int64_t together_;  // directions at a time
};

template <class E, class T>
void add_tile_dots(const GhostDot& op, const Parallel& parallel, const int32_t* chosen, int64_t count, double* sums) {
  using With = Contractions<E, T>;
  if (op.v.stride.side_by_side())
    TileDots<E, T, typename With::SideBySide>(op, parallel, chosen, count, sums).run();
  else if (op.k < With::kMany)
    TileDots<E, T, typename With::Few>(op, parallel, chosen, count, sums).run();
  else
    TileDots<E, T, typename With::Many>(op, parallel, chosen, count, sums).run();
}

}  // namespace
}  // namespace u2a
