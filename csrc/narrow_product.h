// Products of many rows by few columns, of which a task makes one block: its rows by all columns.
#pragma once

#include "engine.h"

namespace u2a {
namespace {

// The engine for products of at most one vector of columns, which would waste half of a wider tile. AMX keeps its own:
// at so few columns its time is that of reading the rows.
template <class E>
struct NarrowEngine {
  using type = E;
};
template <class S, int Rows, int Vectors>
struct NarrowEngine<VectorEngine<S, Rows, Vectors>> {
  using type = VectorEngine<S, Rows, 1>;
};

// Runs body(engine) with the engine that suits products of so many columns.
template <class E, class Body>
void for_columns(int64_t columns, const Body& body) {
  using N = typename NarrowEngine<E>::type;
  return columns <= N::NR ? body(N{}) : body(E{});
}

// A depth x columns matrix seen as the rows of its transpose, which is what engines multiply by.
template <class T>
View<T> transposed(View<T> m) {
  return {m.data, m.depth, m.row};
}

// out (rows x columns, each rounded up to the engine's tile; rows ld apart) = a b^T.
template <class E, class T>
void multiply_rows(View<T> a, int64_t rows, const Panels<E>& b, int64_t columns, typename E::Accumulate* out,
                   int64_t ld) {
  Panels<E> panel(E::MR, b.depth(), true);
  const int64_t step = Blocking<E>(columns, b.depth(), 1).cached;
  for (int64_t c = 0; c < columns; c += step) {
    for (int64_t r = 0; r < rows; r += E::MR) {
      E::pack_a(a.from_row(r), rows - r, b.depth(), panel.at(0));
      tile_product<E>(panel.at(0), b, c, smaller(step, columns - c), out + r * ld + c, ld, false);
    }
  }
}

}  // namespace
}  // namespace u2a
