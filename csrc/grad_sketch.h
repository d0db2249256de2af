// grad_sketch: out[(place(o, i) + shift(block)) mod dim] += +-G_i[o, i], with tiles of G_i = sum_t g_t a_t^T added as
// they are made. The map from coordinates to entries and signs is that of u2a_fast/reference.py.
//
// Along a row, 32 coordinates that share a word of sign bits go to 32 entries in a row, so a tile's rows are added as
// vectors. The sketch's definition is generated for a band of rows at a time and used by all examples; one thread adds
// all of an example, in one order.
#pragma once

#include "engine.h"
#include "philox.h"

namespace u2a {
namespace {

// Neighbors along a row that share a word of signs.
constexpr int64_t kSignBits = 32;

// Where `kSignBits` coordinates go, from entry `start` on, and which of them (set bits) change sign.
struct SketchRun {
  uint32_t signs, start;
};

// Coordinates in blocks of rows x columns are shifted as one, so that no two of a block meet.
struct SketchBlock {
  int64_t rows, columns;
  explicit SketchBlock(int64_t dim) {
    int64_t entries = kSignBits;
    while (2 * entries <= dim) entries *= 2;
    rows = smaller<int64_t>(entries / kSignBits, 128);
    columns = entries / rows;
  }
};

// The runs of a band of rows.
class SketchTable {
 public:
  SketchTable(const GradSketch& op, int64_t most_rows)
      : op_(op), block_(op.dim), runs_(ceil_div(op.i, kSignBits)), buffer_(most_rows * runs_ * sizeof(SketchRun)) {}

  // Generates rows [first, first + rows); `first` is a multiple of four and of the block's rows.
  void generate(int64_t first, int64_t rows, const Parallel& parallel) {
    first_ = first;
    parallel_for(parallel, ceil_div(rows, 4), [&](int64_t begin, int64_t end) {
      for (int64_t o = 4 * begin; o < smaller(4 * end, rows); o += 4)
        for (int64_t run = 0; run < runs_; run += kPhiloxLanes) generate_signs(first + o, rows - o, run);
    });
    parallel_for(parallel, ceil_div(rows, block_.rows), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin * block_.rows; o < smaller(end * block_.rows, rows); o += block_.rows)
        for (int64_t column = 0; column * block_.columns < op_.i; column += kPhiloxLanes)
          generate_starts(first + o, rows - o, column);
    });
  }

  const SketchRun* row(int64_t o) const { return buffer_.as<SketchRun>() + (o - first_) * runs_; }

 private:
  SketchRun* mutable_row(int64_t o) { return const_cast<SketchRun*>(row(o)); }

  void generate_signs(int64_t o, int64_t rows, int64_t run) {
    uint32_t words[4][kPhiloxLanes];
    philox(op_.seed, static_cast<uint32_t>(o / 4), static_cast<uint32_t>(run), 0, words);
    for (int64_t r = 0; r < smaller<int64_t>(4, rows); ++r)
      for (int64_t l = 0; l < smaller<int64_t>(kPhiloxLanes, runs_ - run); ++l)
        mutable_row(o + r)[run + l].signs = words[r][l];
  }

  void generate_starts(int64_t o, int64_t rows, int64_t column) {
    uint32_t words[4][kPhiloxLanes];
    philox(op_.seed, static_cast<uint32_t>(o / block_.rows), static_cast<uint32_t>(column), 1, words);
    const int64_t width = block_.columns / kSignBits;
    for (int64_t r = 0; r < smaller(block_.rows, rows); ++r) {
      SketchRun* run = mutable_row(o + r) + column * width;
      const SketchRun* const end = mutable_row(o + r) + smaller((column + kPhiloxLanes) * width, runs_);
      for (int64_t l = 0; run < end; ++l) {
        int64_t place = r * block_.columns + static_cast<int64_t>(uint64_t{words[0][l]} * op_.dim >> 32);
        for (int64_t unit = 0; unit < width && run < end; ++unit, ++run, place += kSignBits)
          run->start = static_cast<uint32_t>(place < op_.dim ? place : place - op_.dim);
      }
    }
  }

  const GradSketch& op_;
  SketchBlock block_;
  int64_t runs_, first_ = 0;
  Buffer buffer_;
};

template <class S>
struct SignWord {
  using type = uint32_t;
};
template <>
struct SignWord<double> {
  using type = uint64_t;
};

// y[q] += x[q], or -= where bit q of `signs` is set, for q < count.
template <class S>
inline void add_signed(const S* x, uint32_t signs, int64_t count, S* y) {
  constexpr int W = kLanes<S>;
  using Word = typename SignWord<S>::type;
  using Words = typename VectorOf<Word, W>::type;
  constexpr Word kSign = Word{1} << (8 * sizeof(Word) - 1);
  Words to_sign;
  for (int l = 0; l < W; ++l) to_sign[l] = 8 * sizeof(Word) - 1 - l;
  int64_t q = 0;
  for (; q + W <= count; q += W) {
    const Words flip = ((Words{} + Word{signs >> q}) << to_sign) & kSign;
    store(y + q, load(y + q) + bits_as<Vec<S>>(bits_as<Words>(load(x + q)) ^ flip));
  }
  for (; q < count; ++q) y[q] += signs >> q & 1 ? -x[q] : x[q];
}

// One example's sketch, with room behind it for runs that pass its end.
template <class E, class T>
class ExampleSketch {
  using S = typename E::Accumulate;
  static constexpr int64_t kColumns = kSignBits % E::NR == 0 ? kSignBits : 3 * kSignBits;
  static_assert(kColumns % E::NR == 0, "a tile holds whole panels and whole runs");

 public:
  ExampleSketch(const GradSketch& op, S* out)
      : op_(op), out_(out), buffer_((op.dim + kSignBits) * sizeof(S)), y_(buffer_.as<S>()) {}

  // Adds rows [first, first + rows) of sum_t g_t a_t^T.
  void add_band(View<T> a, View<T> g, int64_t tokens, const SketchTable& table, int64_t first, int64_t rows,
                const Parallel& serial) {
    std::memcpy(y_, out_, op_.dim * sizeof(S));
    for (int64_t q = 0; q < kSignBits; ++q) y_[op_.dim + q] = S(0);
    Panels<E> panels(rows, tokens, true), columns(op_.i, tokens, false);
    panels.pack_a(View<T>{g.data + first, 1, g.row}, rows);
    columns.pack_b(View<T>{a.data, 1, a.row}, op_.i, serial);
    for (int64_t r = 0; r < rows; r += E::MR)
      add_panel(panels.at(r), columns, table, first + r, smaller<int64_t>(E::MR, rows - r));
    for (int64_t q = 0; q < kSignBits; ++q) y_[q] += y_[op_.dim + q];
    std::memcpy(out_, y_, op_.dim * sizeof(S));
  }

 private:
  // A tile is added while the next is being multiplied.
  void add_panel(const typename E::Packed* panel, const Panels<E>& columns, const SketchTable& table, int64_t o,
                 int64_t rows) {
    alignas(64) S tile[2][E::MR * kColumns];
    const int64_t tiles = ceil_div(op_.i, kColumns);
    for (int64_t j = 0; j <= tiles; ++j) {
      const int64_t c = j * kColumns;
      if (j < tiles) tile_product<E>(panel, columns, c, smaller(kColumns, op_.i - c), tile[j % 2], kColumns, false);
      if (j > 0) add_tile(tile[1 - j % 2], table, o, rows, c - kColumns);
    }
  }

  void add_tile(const S* tile, const SketchTable& table, int64_t o, int64_t rows, int64_t column) {
    for (int64_t r = 0; r < rows; ++r, tile += kColumns) {
      const SketchRun* runs = table.row(o + r) + column / kSignBits;
      for (int64_t c = 0; c < smaller(kColumns, op_.i - column); c += kSignBits, ++runs) {
        const int64_t count = op_.i - column - c;
        if (count >= kSignBits)
          add_signed(tile + c, runs->signs, kSignBits, y_ + runs->start);
        else
          add_signed(tile + c, runs->signs, count, y_ + runs->start);
      }
    }
  }

  const GradSketch& op_;
  S* out_;
  Buffer buffer_;
  S* y_;
};

template <class E, class T>
void grad_sketch_with(const GradSketch& op, const Parallel& parallel) {
  using S = typename E::Accumulate;
  // whole blocks of the sketch (128 rows at most) and whole panels of every engine
  constexpr int64_t kBandRows = 384;
  static_assert(kBandRows % E::MR == 0, "a band holds whole panels");
  const View<T> a = view<T>(op.a), g = view<T>(op.g);
  const Parallel serial = {[](int64_t count, void* context, Parallel::Body body) { body(context, 0, count); }, 1};
  const int64_t row_bytes = larger<int64_t>(1, ceil_div(op.i, kSignBits) * sizeof(SketchRun));
  const int64_t band = larger<int64_t>(1, kCachedBytes / row_bytes / kBandRows) * kBandRows;
  SketchTable table(op, smaller(band, op.o));
  S* out = static_cast<S*>(op.out);
  for (int64_t j = 0; j < op.b * op.dim; ++j) out[j] = S(0);
  for (int64_t first = 0; first < op.o; first += band) {
    const int64_t rows = smaller(band, op.o - first);
    table.generate(first, rows, parallel);
    parallel_for(parallel, op.b, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename E::Scope scope;
      for (int64_t example = begin; example < end; ++example) {
        const int64_t row = op.cu_seqlens[example], tokens = op.cu_seqlens[example + 1] - row;
        if (tokens == 0) continue;
        ExampleSketch<E, T>(op, out + example * op.dim)
            .add_band(a.from_row(row), g.from_row(row), tokens, table, first, rows, serial);
      }
    });
  }
}

}  // namespace
}  // namespace u2a
