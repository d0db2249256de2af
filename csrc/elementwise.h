// Values and tangents of what lies between a decoder's matrix products, each in one pass over its operands: RMS norm,
// gated linear unit, rotary embedding. All are bound by memory; arithmetic is float (double for double).
#pragma once

#include <type_traits>

#include "engine.h"

namespace u2a {
namespace {

// Calls step(column, load, store) for every vector of a row of `columns`; the last one may be partial, and then passes
// through memory of its own, with zeros behind the row's end.
template <class T, class Step>
inline void for_vectors(int64_t columns, const Step& step) {
  using S = typename AccumulateIn<T>::type;
  constexpr int W = kLanes<S>;
  int64_t c = 0;
  for (; c + W <= columns; c += W)
    step(c, [](const auto* p) { return load(p); }, [](T* p, Vec<S> x) { store_rounded(p, x); });
  const int64_t rest = columns - c;
  if (rest <= 0) return;
  const auto part = [=](const auto* p) {
    std::remove_const_t<std::remove_pointer_t<decltype(p)>> padded[W] = {};
    std::memcpy(padded, p, rest * sizeof(*p));
    return load(padded);
  };
  step(c, part, [=](T* p, Vec<S> x) { store_rounded(p, x, rest); });
}

template <class T>
void rms_norm_jvp_with(const RmsNormJvp& op, const Parallel& parallel) {
  using S = typename AccumulateIn<T>::type;
  using V = Vec<S>;
  const S *scale = static_cast<const S*>(op.scale), *dscale = static_cast<const S*>(op.dscale);
  parallel_for(parallel, op.n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T *x = view<T>(op.x).from_row(t).data, *dx = view<T>(op.dx).from_row(t).data;
      T *y = static_cast<T*>(op.y) + t * op.d, *dy = static_cast<T*>(op.dy) + t * op.d;
      V squares{}, products{};
      for_vectors<T>(op.d, [&](int64_t c, const auto& read, const auto&) {
        const V value = read(x + c);
        squares += value * value;
        products += value * read(dx + c);
      });
      const S inverse = S(1) / std::sqrt(sum_lanes<S>(squares) / S(op.d) + S(op.eps));
      const S along = sum_lanes<S>(products) * inverse * inverse / S(op.d);
      for_vectors<T>(op.d, [&](int64_t c, const auto& read, const auto& write) {
        const V value = read(x + c), factor = read(scale + c) * inverse;
        V tangent = (read(dx + c) - value * along) * factor;
        if (dscale) tangent += value * inverse * read(dscale + c);
        write(y + c, value * factor);
        write(dy + c, tangent);
      });
    }
  });
}

// An activation and its derivative.
template <class V>
struct Activated {
  V value, slope;
};

// sigmoid(x) and sigmoid(-x), each to full relative precision; 0 and 1 where e^-x is no finite number.
template <class S>
inline void sigmoids(Vec<S> x, Vec<S>& there, Vec<S>& back) {
  constexpr S kLeast = sizeof(S) == sizeof(float) ? -86 : -708;
  const auto shut = x < kLeast;
  const Vec<S> e = exp_lanes(Vec<S>(shut ? splat(-kLeast) : -x)), inverse = reciprocal(Vec<S>(1 + e));
  there = shut ? Vec<S>{} : inverse;
  back = e * inverse;
}

template <class S>
inline Activated<Vec<S>> silu(Vec<S> x) {
  Vec<S> there, back;
  sigmoids<S>(x, there, back);
  return {x * there, there * (1 + x * back)};
}

// (1 + tanh z) / 2 is sigmoid(2 z).
template <class S>
inline Activated<Vec<S>> gelu_tanh(Vec<S> x) {
  constexpr S kTwiceRoot = S(1.59576912160573071176), kCubic = S(0.044715);
  // Far beyond where the sigmoid is 0 or 1 to every digit, and far from where the cube overflows.
  constexpr S kBound = 64;
  const Vec<S> z = x > kBound ? splat(kBound) : x < -kBound ? splat(-kBound) : x, square = kCubic * z * z;
  Vec<S> there, back;
  sigmoids<S>(kTwiceRoot * z * (1 + square), there, back);
  return {x * there, there * (1 + z * back * kTwiceRoot * (1 + 3 * square))};
}

template <class T>
void glu_jvp_with(const GluJvp& op, const Parallel& parallel) {
  using S = typename AccumulateIn<T>::type;
  using V = Vec<S>;
  parallel_for(parallel, op.n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T *gate = view<T>(op.gate).from_row(t).data, *up = view<T>(op.up).from_row(t).data;
      const T* dgate = view<T>(op.dgate).from_row(t).data;
      const T* dup = op.dup.data ? view<T>(op.dup).from_row(t).data : nullptr;
      T *y = static_cast<T*>(op.y) + t * op.i, *dy = static_cast<T*>(op.dy) + t * op.i;
      for_vectors<T>(op.i, [&](int64_t c, const auto& read, const auto& write) {
        const V x = read(gate + c), u = read(up + c);
        const Activated<V> a = op.gelu ? gelu_tanh<S>(x) : silu<S>(x);
        write(y + c, a.value * u);
        V tangent = a.slope * read(dgate + c) * u;
        if (dup) tangent += a.value * read(dup + c);
        write(dy + c, tangent);
      });
    }
  });
}

template <class T>
void rotary_with(const Rotary& op, const Parallel& parallel) {
  using S = typename AccumulateIn<T>::type;
  using V = Vec<S>;
  const int64_t half = op.e / 2;
  parallel_for(parallel, op.n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T *cosine = view<T>(op.cosine).from_row(t).data, *sine = view<T>(op.sine).from_row(t).data;
      for (int64_t h = 0; h < op.h; ++h) {
        const T* x = static_cast<const T*>(op.x.data) + t * op.x.token + h * op.x.head;
        T* y = static_cast<T*>(op.y) + (t * op.h + h) * op.e;
        for_vectors<T>(half, [&](int64_t c, const auto& read, const auto& write) {
          const V low = read(x + c), high = read(x + half + c);
          write(y + c, low * read(cosine + c) - high * read(sine + c));
          write(y + half + c, high * read(cosine + half + c) + low * read(sine + half + c));
        });
      }
    }
  });
}

}  // namespace
}  // namespace u2a
