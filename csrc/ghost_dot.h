// ghost_dot: <V_k, G_i> of K directions and the examples' gradients G_i = sum_t g_t a_t^T.
#pragma once

#include "ghost_dot_rows.h"

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

template <class E, class T>
void ghost_dot_with(const GhostDot& op, const Parallel& parallel) {
  using S = typename E::Accumulate;
  Buffer rows(op.k * op.n * sizeof(double)), wanted(ceil_div(op.n, E::MR));
  std::memset(wanted.as<bool>(), 1, ceil_div(op.n, E::MR));
  S* out = static_cast<S*>(op.out);
  TokenDots<E, T>(op, parallel, wanted.as<bool>(), rows.as<double>()).run();
  for (int64_t k = 0; k < op.k; ++k) {
    for (int64_t i = 0; i < op.b; ++i)
      out[k * op.b + i] = S(segment_sum(rows.as<double>() + k * op.n, op.cu_seqlens[i], op.cu_seqlens[i + 1]));
  }
}

}  // namespace
}  // namespace u2a
