// The tile engine: C = A B^T for packed panels, MR rows of A by NR rows of B at a time, in registers.
//
// Operands are repacked into panels that the inner loop reads once, in order: element (r, k) of a panel of width P lies
// at k * P + r. An engine is a type that says how panels look and how two of them are multiplied; ops are written once
// over any engine. Rows beyond the matrix are packed as zeros, so that a row's arithmetic never depends on its
// neighbors.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace u2a {
namespace {

// Element (i, k) of an operand is data[i * row + k * depth]; one of the strides is 1.
template <class T>
struct View {
  const T* data;
  int64_t row, depth;
  View from_row(int64_t i) const { return {data + i * row, row, depth}; }
};

template <class T>
View<T> view(const Matrix& m) {
  return {static_cast<const T*>(m.data), m.stride, 1};
}

template <class Body>
void parallel_for(const Parallel& parallel, int64_t count, const Body& body) {
  if (count == 0) return;
  parallel.run(count, const_cast<Body*>(&body),
               [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); });
}

// Packs the first P of the `count` rows that are left into one panel of width P. Where P is no multiple of the vector
// width, whole vectors are stored in order of k and each overwrites what the one before it stored beyond its row; a
// panel therefore needs one vector of room behind it.
template <int P, class T, class S>
void pack_panel(View<T> source, int64_t count, int64_t k, S* panel) {
  constexpr int W = kLanes<S>;
  static_assert(P % W == 0 || P < W, "wider panels hold whole vectors");
  int64_t j = 0;
  if (source.depth == 1) {
    for (; j + W <= k; j += W) {
      for (int first = 0; first < P; first += W) {
        Vec<S> square[W];
        for (int r = 0; r < W; ++r) {
          square[r] =
              first + r < smaller<int64_t>(P, count) ? load(source.data + (first + r) * source.row + j) : Vec<S>{};
        }
        transpose(square);
        for (int c = 0; c < W; ++c) store(panel + (j + c) * P + first, square[c]);
      }
    }
  } else if (source.row == 1 && count >= round_up(P, W)) {
    for (; j < k; ++j) {
      for (int r = 0; r < P; r += W) store(panel + j * P + r, load(source.data + j * source.depth + r));
    }
  }
  for (; j < k; ++j) {
    for (int r = 0; r < P; ++r) {
      panel[j * P + r] = r < count ? S(scalar(source.data[r * source.row + j * source.depth])) : S(0);
    }
  }
}

// Work that shares no data with a multiplication and can fill what it leaves of the processor, a share at a time.
struct NothingBeside {
  void operator()(int64_t) const {}
};

// sum += products of whole vectors of columns; returns the products of the columns left over.
template <class T, class S>
inline S add_products(const T* g, const S* u, int64_t columns, Vec<S>* sum) {
  constexpr int W = kLanes<S>;
  int64_t c = 0;
  for (; c + W <= columns; c += W) *sum += load(g + c) * load(u + c);
  S rest = 0;
  for (; c < columns; ++c) rest += scalar(g[c]) * u[c];
  return rest;
}

// Multiplies in S, which is also the type of the sums.
// 12 x 2 vectors of sums keep both FMA ports busy through their latency (2 x 4 in flight) and leave room in 32
// registers for two vectors of B and a broadcast of A; 16 registers hold 6 x 2, the baseline's 4 x 2.
template <class S, int Rows, int Vectors>
struct VectorEngine {
  using Accumulate = S;
  using Intermediate = S;  // what products of products are packed from
  using Packed = S;
  static constexpr int MR = Rows, NR = Vectors * kLanes<S>, kShares = 1;
  static constexpr int kDepth = 1, kProductThirds = 4, kDirectionTokens = 9;
  struct Scope {};

  static int64_t a_panel_size(int64_t k) { return k * MR; }
  static int64_t b_panel_size(int64_t k) { return k * NR; }

  template <class T>
  static void pack_a(View<T> source, int64_t count, int64_t k, Packed* panel) {
    pack_panel<MR>(source, count, k, panel);
  }
  template <class T>
  static void pack_b(View<T> source, int64_t count, int64_t k, Packed* panel) {
    pack_panel<NR>(source, count, k, panel);
  }

  // Rows of NR sums, one a depth, are a panel of B as they are, and MR of them the rows of A for multiply_rows.
  static const Packed* pack_rows(const S* rows, int64_t, Packed*) { return rows; }
  static const Packed* pack_a_rows(const S* rows, Packed*) { return rows; }

  // A panel of B for tiles that are dotted with add_dot, in whose rows entry x is of column column_of(x).
  template <class T>
  static void pack_dotted(View<T> source, int64_t count, int64_t k, Packed* panel) {
    pack_b(source, count, k, panel);
  }
  static int64_t column_of(int64_t x) { return x; }
  // sum += NR values of g times such a row.
  template <class T>
  static void add_dot(const T* g, const S* row, Vec<S>* sum) {
    add_products<T, S>(g, row, NR, sum);
  }

  // c (MR x NR, rows ldc apart) = or += a b^T; beside(share) is called for each of kShares along the way.
  template <class Beside = NothingBeside>
  static void multiply(const Packed* a, const Packed* b, int64_t k, S* c, int64_t ldc, bool add,
                       const Beside& beside = {}) {
    product(a, 1, MR, b, k, c, ldc, add);
    beside(0);
  }
  // The same for a from pack_a_rows.
  static void multiply_rows(const Packed* a, const Packed* b, int64_t k, S* c, int64_t ldc, bool add) {
    product(a, NR, 1, b, k, c, ldc, add);
  }

 private:
  // Element (r, j) of a is a[r * row + j * depth].
  static inline __attribute__((always_inline)) void product(const Packed* a, int64_t row, int64_t depth,
                                                            const Packed* b, int64_t k, S* c, int64_t ldc, bool add) {
    constexpr int W = kLanes<S>;
    Vec<S> sum[MR][Vectors];
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? load(c + r * ldc + v * W) : Vec<S>{};
    for (int64_t j = 0; j < k; ++j) {
      Vec<S> column[Vectors];
      for (int v = 0; v < Vectors; ++v) column[v] = load(b + j * NR + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const Vec<S> element = splat(a[r * row + j * depth]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] += element * column[v];
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < Vectors; ++v) store(c + r * ldc + v * W, sum[r][v]);
  }
};

using Avx512FloatEngine = VectorEngine<float, 12, 2>;

// Packed panels of all rows of an operand; pack_* may place them from row `first` (a multiple of the width) on.
template <class E>
class Panels {
 public:
  using Packed = typename E::Packed;

  Panels(int64_t rows, int64_t k, bool is_a)
      : k_(k),
        is_a_(is_a),
        size_(is_a ? E::a_panel_size(k) + kLanes<Packed> : E::b_panel_size(k)),
        buffer_(ceil_div(rows, is_a ? E::MR : E::NR) * size_ * sizeof(Packed)) {}

  template <class T>
  void pack_a(View<T> source, int64_t rows, int64_t first = 0) {
    for (int64_t r = 0; r < rows; r += E::MR) E::pack_a(source.from_row(r), rows - r, k_, at(first + r));
  }
  template <class T>
  void pack_b(View<T> source, int64_t rows, const Parallel& parallel, int64_t first = 0) {
    for_panels(rows, parallel, [&](int64_t r) { E::pack_b(source.from_row(r), rows - r, k_, at(first + r)); });
  }
  template <class T>
  void pack_dotted(View<T> source, int64_t rows, const Parallel& parallel, int64_t first) {
    for_panels(rows, parallel, [&](int64_t r) { E::pack_dotted(source.from_row(r), rows - r, k_, at(first + r)); });
  }
  // The panel that starts with `row`, a multiple of the width.
  Packed* at(int64_t row) const { return buffer_.template as<Packed>() + (is_a_ ? row / E::MR : row / E::NR) * size_; }
  int64_t depth() const { return k_; }

 private:
  template <class Body>
  static void for_panels(int64_t rows, const Parallel& parallel, const Body& body) {
    parallel_for(parallel, ceil_div(rows, E::NR), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * E::NR; r < smaller(end * E::NR, rows); r += E::NR) body(r);
    });
  }

  int64_t k_;
  bool is_a_;
  int64_t size_;
  Buffer buffer_;
};

// Bytes of packed B that all threads share, and that one thread reads again and again from its level-2 cache.
constexpr int64_t kSharedBytes = 8 << 20, kCachedBytes = 1 << 20;
// Most columns of a tile: 12 x 256 floats and the panels being read fit the level-1 cache together.
constexpr int64_t kTileColumns = 256;

// How many columns of B to pack at once, how many of these to use on many rows before the next, and a tile's share.
template <class E>
struct Blocking {
  int64_t packed, cached, tile;
  Blocking(int64_t columns, int64_t k, int64_t operands) {
    const int64_t bytes = larger<int64_t>(1, operands * k * sizeof(typename E::Packed));
    packed = fit(smaller(round_up(columns, E::NR), kSharedBytes / bytes));
    cached = fit(smaller(packed, kCachedBytes / bytes));
    tile = fit(smaller(cached, kTileColumns));
  }

 private:
  static int64_t fit(int64_t columns) { return larger<int64_t>(E::NR, columns / E::NR * E::NR); }
};

// Runs body(first_row, rows) over blocks of rows, in parallel: `most` rows use each column of B often, fewer give every
// thread work.
template <class E, class Body>
void for_row_blocks(int64_t rows, const Parallel& parallel, const Body& body, int64_t most = 96) {
  const int64_t wanted = smaller(most / E::MR * E::MR, round_up(ceil_div(rows, 4 * parallel.threads), E::MR));
  const int64_t step = larger<int64_t>(E::MR, wanted);
  parallel_for(parallel, ceil_div(rows, step), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename E::Scope scope;
    for (int64_t block = begin; block < end; ++block) body(block * step, smaller(step, rows - block * step));
  });
}

// One tile: MR rows by `columns` columns (rounded up to NR) of a b^T, b starting at `first`.
template <class E>
void tile_product(const typename E::Packed* a, const Panels<E>& b, int64_t first, int64_t columns,
                  typename E::Accumulate* tile, int64_t ld, bool add) {
  for (int64_t c = 0; c < columns; c += E::NR) E::multiply(a, b.at(first + c), b.depth(), tile + c, ld, add);
}

}  // namespace
}  // namespace u2a
