// Values and tangents of what lies between a decoder's matrix products, each in one pass over its operands: RMS norm,
// gated linear unit, rotary embedding. All are bound by memory; arithmetic is float (double for double).
#pragma once

#include <type_traits>

#include "engine.h"

namespace u2a {
namespace {

inline void store_as(float* p, VecF x) { store(p, x); }
inline void store_as(double* p, Vec<double> x) { store(p, x); }
inline void store_as(BFloat16* p, VecF x) {
  const HalfVecU16 half = __builtin_convertvector(round_to_bf16(x), HalfVecU16);
  std::memcpy(p, &half, sizeof(half));
}
inline void store_as(Float16* p, VecF x) {
  for (int j = 0; j < kLanes<float>; ++j) convert(x[j], p + j);
}

// Calls step(column, load, store) for every vector of a row of `columns`; the last one may be partial, and then passes
// through memory of its own, with zeros behind the row's end.
template <class T, class Step>
inline void for_vectors(int64_t columns, const Step& step) {
  using S = typename AccumulateIn<T>::type;
  constexpr int W = kLanes<S>;
  int64_t c = 0;
  for (; c + W <= columns; c += W)
    step(c, [](const auto* p) { return load(p); }, [](T* p, Vec<S> x) { store_as(p, x); });
  const int64_t rest = columns - c;
  if (rest <= 0) return;
  const auto part = [=](const auto* p) {
    std::remove_const_t<std::remove_pointer_t<decltype(p)>> padded[W] = {};
    std::memcpy(padded, p, rest * sizeof(*p));
    return load(padded);
  };
  step(c, part, [=](T* p, Vec<S> x) {
    T padded[W];
    store_as(padded, x);
    std::memcpy(p, padded, rest * sizeof(T));
  });
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

template <class S>
inline Activated<Vec<S>> silu(Vec<S> x) {
  // e^-|x| cannot overflow; sigmoid(-x) = e^-x sigmoid(x)
  const Vec<S> magnitude = x < 0 ? -x : x, e = exp_lanes(Vec<S>(-magnitude));
  const Vec<S> sigmoid = (x < 0 ? e : splat(S(1))) / (1 + e);
  return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
}

template <class S>
inline Activated<Vec<S>> gelu_tanh(Vec<S> x) {
  constexpr S kRoot = S(0.79788456080286535588), kCubic = S(0.044715);
  const Vec<S> square = x * x, t = tanh_lanes(Vec<S>(kRoot * x * (1 + kCubic * square)));
  const Vec<S> half = S(0.5) * (1 + t);
  return {x * half, half + S(0.5) * x * (1 - t * t) * kRoot * (1 + 3 * kCubic * square)};
}

template <class T>
void glu_jvp_with(const GluJvp& op, const Parallel& parallel) {
  using S = typename AccumulateIn<T>::type;
  using V = Vec<S>;
  parallel_for(parallel, op.n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T *gate = view<T>(op.gate).from_row(t).data, *up = view<T>(op.up).from_row(t).data;
      const T *dgate = view<T>(op.dgate).from_row(t).data, *dup = view<T>(op.dup).from_row(t).data;
      T *y = static_cast<T*>(op.y) + t * op.i, *dy = static_cast<T*>(op.dy) + t * op.i;
      for_vectors<T>(op.i, [&](int64_t c, const auto& read, const auto& write) {
        const V x = read(gate + c), u = read(up + c);
        const Activated<V> a = op.gelu ? gelu_tanh<S>(x) : silu<S>(x);
        write(y + c, a.value * u);
        write(dy + c, a.slope * read(dgate + c) * u + a.value * read(dup + c));
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
