// ghost_dot: <V_k, G_i> of K directions and the examples' gradients G_i = sum_t g_t a_t^T.
#pragma once

#include "ghost_dot_rows.h"
#include "ghost_dot_tile.h"

namespace u2a {
namespace {

template <class T, class S>
S dot_row(const T* g, const S* u, int64_t columns) {
  constexpr int64_t W = kLanes<S>;
  const int64_t half = columns / (2 * W) * W;
  Vec<S> low{}, high{};
  for (int64_t c = 0; c < half; c += W) {
    low += load(g + c) * load(u + c);
    high += load(g + half + c) * load(u + half + c);
  }
  const S rest = add_products(g + 2 * half, u + 2 * half, columns - 2 * half, &low);
  return sum_lanes<S>(low + high) + rest;
}

inline double segment_sum(const double* rows, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t t = begin; t < end; ++t) sum += rows[t];
  return sum;
}

// Each example takes the form that is cheaper for it alone, so that its bits do not depend on what it is batched with.
// Directions that lie side by side have no rows to multiply by. The tile form may have an engine of its own.
template <class E, class T, class Tile = E>
void ghost_dot_with(const GhostDot& op, const Parallel& parallel) {
  using S = typename E::Accumulate;
  Buffer sums(op.k * op.b * sizeof(double)), rows(op.k * op.n * sizeof(double)), tiled(op.b * sizeof(int32_t));
  Buffer wanted(ceil_div(op.n, E::MR));
  std::memset(sums.as<double>(), 0, op.k * op.b * sizeof(double));
  std::memset(wanted.as<bool>(), 0, ceil_div(op.n, E::MR));
  int64_t count = 0;
  for (int64_t i = 0; i < op.b; ++i) {
    const int64_t begin = op.cu_seqlens[i], end = op.cu_seqlens[i + 1];
    if (op.v.stride.side_by_side() || tile_form_is_cheaper<E>(end - begin, op.k)) {
      tiled.as<int32_t>()[count++] = static_cast<int32_t>(i);
    } else {
      for (int64_t panel = begin / E::MR; panel < ceil_div(end, E::MR); ++panel) wanted.as<bool>()[panel] = true;
    }
  }
  if (count > 0) add_tile_dots<Tile, T>(op, parallel, tiled.as<int32_t>(), count, sums.as<double>());
  if (count < op.b) TokenDots<E, T>(op, parallel, wanted.as<bool>(), rows.as<double>()).run();
  S* out = static_cast<S*>(op.out);
  for (int64_t k = 0; k < op.k; ++k) {
    for (int64_t i = 0, next = 0; i < op.b; ++i) {
      const bool by_tile = next < count && tiled.as<int32_t>()[next] == i;
      next += by_tile;
      out[k * op.b + i] =
          S(by_tile ? sums.as<double>()[k * op.b + i]
                    : segment_sum(rows.as<double>() + k * op.n, op.cu_seqlens[i], op.cu_seqlens[i + 1]));
    }
  }
}

}  // namespace
}  // namespace u2a
