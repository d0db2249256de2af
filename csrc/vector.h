// Vectors of U2A_VECTOR_BYTES bytes, and the elementwise functions that the kernels need.
//
// Each instruction set's file includes this and the op headers after it has switched the compiler's target. Everything
// sits in an unnamed namespace, and no standard container or algorithm is used: a function with external linkage,
// compiled for AVX-512 here and for the baseline there, would be merged into one by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace u2a {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Type in which T's values are summed.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};

template <class S, int W>
struct VectorOf {
  typedef S type __attribute__((vector_size(W * sizeof(S))));
};

template <class S>
constexpr int kLanes = U2A_VECTOR_BYTES / sizeof(S);

template <class S>
using Vec = typename VectorOf<S, kLanes<S>>::type;

using VecF = Vec<float>;
using VecI = Vec<int32_t>;
using VecU = Vec<uint32_t>;
using HalfVecU16 = VectorOf<uint16_t, kLanes<float>>::type;

template <int... J>
struct Indices {};
template <int Count, int... J>
struct IndicesUpTo : IndicesUpTo<Count - 1, Count - 1, J...> {};
template <int... J>
struct IndicesUpTo<0, J...> {
  using type = Indices<J...>;
};
template <int Count>
using MakeIndices = typename IndicesUpTo<Count>::type;

template <class A>
inline A smaller(A x, A y) {
  return y < x ? y : x;
}
template <class A>
inline A larger(A x, A y) {
  return x < y ? y : x;
}
inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

template <class S>
inline Vec<S> splat(S x) {
  return x - Vec<S>{};
}

inline VecU splat_bits(uint32_t x) { return x - VecU{}; }

// GCC before 13 converts half a vector of 64 bytes at a time.
inline VecU zero_extended(HalfVecU16 x) {
#if U2A_VECTOR_BYTES == 64
  return bits_as<VecU>(_mm512_cvtepu16_epi32((__m256i)x));
#else
  return __builtin_convertvector(x, VecU);
#endif
}

inline VecF widen(HalfVecU16 x, BFloat16) { return bits_as<VecF>(zero_extended(x) << 16); }

// Shifting a half into a float's place leaves an exponent that is 112 too small, which one exact product repairs for
// subnormals too; infinities and NaNs need the float's largest exponent.
inline VecF widen(HalfVecU16 x, Float16) {
  const VecU wide = zero_extended(x);
  const VecU magnitude = (wide & 0x7fffu) << 13;
  const VecF scaled = bits_as<VecF>(magnitude) * 0x1p112f;
  const VecU special = magnitude | 0x7f800000u;
  const VecU chosen = (wide & 0x7c00u) == 0x7c00u ? special : bits_as<VecU>(scaled);
  return bits_as<VecF>(chosen | ((wide & 0x8000u) << 16));
}

// W consecutive elements in their accumulation type.
inline VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline Vec<double> load(const double* p) {
  Vec<double> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <class H>
inline VecF load(const H* p) {
  HalfVecU16 x;
  std::memcpy(&x, p, sizeof(x));
  return widen(x, H{});
}

template <class V, class S>
inline void store(S* p, V x) {
  std::memcpy(p, &x, sizeof(x));
}

inline float scalar(float x) { return x; }
inline double scalar(double x) { return x; }
template <class H>
inline float scalar(H x) {
  HalfVecU16 lanes{};
  lanes[0] = x.bits;
  return widen(lanes, H{})[0];
}

// Rounds to nearest even; a NaN stays a NaN.
inline VecU round_to_bf16(VecF x) {
  const VecU bits = bits_as<VecU>(x);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

// W floats rounded to nearest even in a 16-bit type.
#if defined(U2A_ROUNDS_BF16)
// By one instruction, which takes subnormal numbers for 0.
inline HalfVecU16 narrow(VecF x, BFloat16) { return bits_as<HalfVecU16>(_mm512_cvtneps_pbh((__m512)x)); }
#else
inline HalfVecU16 narrow(VecF x, BFloat16) { return __builtin_convertvector(round_to_bf16(x), HalfVecU16); }
#endif
inline HalfVecU16 narrow(VecF x, Float16) {
  const VecU bits = bits_as<VecU>(x), magnitude = bits & 0x7fffffffu;
  const VecU special = magnitude > 0x7f800000u ? splat_bits(0x7e00u) : splat_bits(0x7c00u);
  const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the rounded subnormal (a multiple of 2^-24) into the low bits of the sum.
  const VecU subnormal = bits_as<VecU>(bits_as<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU finite = magnitude < 0x38800000u ? subnormal : normal > 0x7c00u ? splat_bits(0x7c00u) : normal;
  const VecU half = magnitude >= 0x7f800000u ? special : finite;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), HalfVecU16);
}

// W lanes, rounded to the type of the destination.
inline void store_rounded(float* p, VecF x) { store(p, x); }
inline void store_rounded(double* p, Vec<double> x) { store(p, x); }
template <class H>
inline void store_rounded(H* p, VecF x) {
  store(p, narrow(x, H{}));
}

// The first `count` of them.
template <class T, class V>
inline void store_rounded(T* p, V x, int64_t count) {
  constexpr int64_t W = sizeof(x) / sizeof(x[0]);
  if (count >= W) return store_rounded(p, x);
  T padded[W];
  store_rounded(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

inline void convert(float x, float* y) { *y = x; }
inline void convert(double x, double* y) { *y = x; }
template <class H>
inline void convert(float x, H* y) {
  y->bits = narrow(splat(x), H{})[0];
}

// Joins the upper half of the lanes to the lower until one is left.
template <class S, int W, class Join>
inline S fold(typename VectorOf<S, W>::type x, const Join& join) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    typename VectorOf<S, W / 2>::type half[2];
    std::memcpy(half, &x, sizeof(x));
    return fold<S, W / 2>(join(half[0], half[1]), join);
  }
}

template <class S>
inline S sum_lanes(Vec<S> x) {
  return fold<S, kLanes<S>>(x, [](auto low, auto high) { return low + high; });
}

template <class S>
inline S max_lanes(Vec<S> x) {
  return fold<S, kLanes<S>>(x, [](auto low, auto high) { return decltype(low)(low < high ? high : low); });
}

// 1 / x to 1 unit in the last place, for x and 1 / x normal numbers: a step of Newton's on an estimate of 14 bits.
#if U2A_VECTOR_BYTES == 64
inline VecF reciprocal(VecF x) {
  const VecF y = (VecF)_mm512_rcp14_ps((__m512)x);
  return y + y * (1 - x * y);
}
#else
inline VecF reciprocal(VecF x) { return 1 / x; }
#endif
inline Vec<double> reciprocal(Vec<double> x) { return 1 / x; }

// The sum of this and a number of less than 22 bits has the number, rounded, as its last bits.
constexpr float kShift = 12582912.0f;

// 2^(n + r) for `shifted` = n + kShift and |r| <= 1/2: a polynomial in r, then n added to the exponent. The polynomial
// is 1 at 0 and of least relative error (9e-8) among those of its degree, by linear programming.
inline VecF power_of_two(VecF shifted, VecF r) {
  VecF p = r * 1.32647204e-3f + 9.67151302e-3f;
  p = p * r + 5.55073378e-2f;
  p = p * r + 2.40222421e-1f;
  p = p * r + 6.93146978e-1f;
  p = p * r + 1.0f;
  return bits_as<VecF>(bits_as<VecI>(p) + (bits_as<VecI>(shifted) << 23));
}

// e^x to 2.5 units in the last place, for x up to 88: x = (n + r) ln 2. Results below 2^-125 are 0; NaN stays NaN.
inline VecF exp_lanes(VecF x) {
  constexpr float kLog2E = 1.44269504f, kLowest = -86.6434f;
  const VecF shifted = x * kLog2E + kShift, n = shifted - kShift;
  const VecF rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const VecF power = power_of_two(shifted, rest * kLog2E);
  return x >= kLowest ? power : x < kLowest ? VecF{} : x;
}
inline Vec<double> exp_lanes(Vec<double> x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = std::exp(x[j]);
  return x;
}

// 2^x to 2.5 units in the last place, for x up to 127: x = n + r. Results below 2^-125 are 0; NaN stays NaN.
inline VecF exp2_lanes(VecF x) {
  const VecF shifted = x + kShift, power = power_of_two(shifted, x - (shifted - kShift));
  return x >= -125.0f ? power : x < -125.0f ? VecF{} : x;
}
inline Vec<double> exp2_lanes(Vec<double> x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = std::exp2(x[j]);
  return x;
}

// tanh through e^-2|x|, and below 0.3 (where 1 - e^-2|x| cancels) through its Taylor series, whose first dropped term
// is 1382/155925 x^11 < eps x / 2 there.
inline VecF tanh_lanes(VecF x) {
  const VecF magnitude = bits_as<VecF>(bits_as<VecU>(x) & 0x7fffffffu);
  const VecF e = exp_lanes(-2.0f * magnitude);
  const VecF far = (1.0f - e) / (1.0f + e);
  const VecF s = x * x;
  VecF series = splat(62.0f / 2835);
  series = series * s - 17.0f / 315;
  series = series * s + 2.0f / 15;
  series = series * s - 1.0f / 3;
  const VecF near = x + x * (s * series);
  const VecF signed_far = bits_as<VecF>(bits_as<VecU>(far) | (bits_as<VecU>(x) & 0x80000000u));
  return magnitude < 0.3f ? near : signed_far;
}
inline Vec<double> tanh_lanes(Vec<double> x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = std::tanh(x[j]);
  return x;
}

// x and y with lanes alternating, from their first (Offset 0) or second (Offset W / 2) halves.
template <int Offset, class V, int... J>
inline V interleave(V x, V y, Indices<J...>) {
  constexpr int W = sizeof...(J);
#if defined(__clang__)
  return __builtin_shufflevector(x, y, (J % 2 * W + J / 2 + Offset)...);
#else  // which GCC has from version 12 on
  using Lane = std::conditional_t<sizeof(x[0]) == 4, int32_t, int64_t>;
  typedef Lane Choice __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(x, y, Choice{(J % 2 * W + J / 2 + Offset)...});
#endif
}

// Transposes a square of W x W lanes: log2 W rounds of interleaving each row with the row half a square below.
template <class V, int W>
inline void transpose(V (&rows)[W]) {
  V next[W];
  for (int span = 1; span < W; span *= 2) {
    for (int j = 0; j < W / 2; ++j) {
      next[2 * j] = interleave<0>(rows[j], rows[j + W / 2], MakeIndices<W>{});
      next[2 * j + 1] = interleave<W / 2>(rows[j], rows[j + W / 2], MakeIndices<W>{});
    }
    for (int j = 0; j < W; ++j) rows[j] = next[j];
  }
}

}  // namespace
}  // namespace u2a
