// The CPU kernels as plain functions on pointers: no torch, no Python. Letters are those of u2a_fast/reference.py:
// N packed tokens, B examples, K directions of rank R, I input and O output features, P and Q of them when projected,
// D hidden features, V vocabulary, H query and G key heads of E features, F features of values. Every matrix has
// contiguous rows; `stride` is the distance between rows in elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace u2a {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Runs body(context, begin, end) over a partition of [0, count). Kernels give the same bits for every partition.
struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, void* context, Body body);
  int threads;
};

struct Matrix {
  const void* data;
  int64_t stride;
};

// Where the next direction, row and column of K x O x I directions lie.
struct Strides {
  int64_t direction, row, column;
  bool side_by_side() const { return column != 1; }
};

// As many directions may lie side by side: stride.direction is 1. Else stride.column is 1 and a direction is O rows.
constexpr int64_t kLeastSideBySide = 16;
struct Directions {
  const void* data;
  Strides stride;
  static Directions of_rows(const Matrix& rows, int64_t o) { return {rows.data, {o * rows.stride, rows.stride, 1}}; }
};

struct GhostDot {
  DType dtype;
  Matrix a, g;                // N x I, N x O
  const int32_t* cu_seqlens;  // B + 1
  Directions v;               // K x O x I
  int64_t n, b, k, i, o;
  void* out;  // K x B
};

struct GhostDotLowRank {
  DType dtype;
  Matrix a, g;                // N x I, N x O
  const int32_t* cu_seqlens;  // B + 1
  Matrix left, right;         // K x O and K x I rows of R
  int64_t n, b, k, i, o, r;
  void* out;  // K x B
};

struct GhostNorm {
  DType dtype;
  Matrix a, g;                // N x I, N x O
  const int32_t* cu_seqlens;  // B + 1
  int64_t n, b, i, o;
  void* out;  // B
};

struct GradProject {
  DType dtype;
  Matrix a, g;                // N x I, N x O
  const int32_t* cu_seqlens;  // B + 1
  Matrix p_in, p_out;         // I x P, O x Q
  int64_t n, b, i, o, p, q;
  void* out;  // B x Q rows of P
};

// A sketch of M = dim entries, drawn from `seed`.
struct GradSketch {
  DType dtype;
  Matrix a, g;                // N x I, N x O
  const int32_t* cu_seqlens;  // B + 1
  int64_t n, b, i, o, dim;
  uint64_t seed;
  void* out;  // B x dim
};

// A linear head: logits c(h W^T + bias) with c(z) = softcap tanh(z / softcap), or c(z) = z where softcap is 0.
struct Head {
  DType dtype;
  Matrix h, weight;       // N x D, V x D
  const int64_t* target;  // N
  const void* bias;       // V, or null
  double softcap;
  int64_t n, d, v;
};

struct LinearLogprob {
  Head head;
  Matrix dh, dweight;  // K x N rows of D, K x V rows of D; data null for zero
  const void* dbias;   // K x V, or null
  int64_t k;           // 0 for the forward pass alone
  void *logp, *lse;    // N
  void* jvp;           // K x N
};

struct LinearLogprobBackward {
  Head head;
  const void *grad_logp, *grad_lse, *lse;  // N, in the accumulation dtype
  void* grad_h;                            // N x D in the inputs' dtype, or null
  void *grad_weight, *grad_bias;           // V x D and V in the accumulation dtype, or both null
};

// Rows of `heads` features for every direction, token and head; each row is contiguous, strides are in elements.
struct Heads {
  const void* data;
  int64_t direction, token, head;
};

struct Attention {
  DType dtype;
  Heads q, k, v;              // N x H rows of E, N x G rows of E, N x G rows of F
  const int32_t* cu_seqlens;  // B + 1
  const int32_t* parent;      // B, or null for -1 throughout
  double scale, softcap;      // softcap 0 for none
  int64_t window;             // 0 for all keys
  int64_t n, b, h, g, e, f;
  Heads dq, dk, dv;  // tangents: K times the rows of q, k, v
  int64_t k_directions;
  void *out, *lse;  // N x H x F in the inputs' dtype, N x H in the accumulation dtype
  void* dout;       // K x N x H x F
};

struct RmsNormJvp {
  DType dtype;
  Matrix x, dx;                // N x D
  const void *scale, *dscale;  // D in the accumulation dtype; dscale null for zero
  double eps;
  int64_t n, d;
  void *y, *dy;  // N x D
};

struct GluJvp {
  DType dtype;
  Matrix gate, up, dgate, dup;  // N x I; dup may be missing
  bool gelu;                    // tanh-approximated GELU instead of SiLU
  int64_t n, i;
  void *y, *dy;  // N x I
};

struct Rotary {
  DType dtype;
  Heads x;              // N x H rows of E
  Matrix cosine, sine;  // N x E
  int64_t n, h, e;
  void* y;  // N x H x E
};

struct AttentionBackward {
  Attention attention;  // of which tangents and results are not used
  Heads grad, out;      // N x H rows of F
  const void* lse;      // N x H, in the accumulation dtype
  void *dq, *dk, *dv;   // N x H x E, N x G x E, N x G x F
};

// One set of kernels for one instruction set.
struct Kernels {
  const char* name;
  void (*attention)(const Attention&, const Parallel&);
  void (*attention_backward)(const AttentionBackward&, const Parallel&);
  void (*ghost_dot)(const GhostDot&, const Parallel&);
  void (*ghost_dot_lowrank)(const GhostDotLowRank&, const Parallel&);
  void (*ghost_norm)(const GhostNorm&, const Parallel&);
  void (*glu_jvp)(const GluJvp&, const Parallel&);
  void (*grad_project)(const GradProject&, const Parallel&);
  void (*grad_sketch)(const GradSketch&, const Parallel&);
  void (*linear_logprob)(const LinearLogprob&, const Parallel&);
  void (*linear_logprob_backward)(const LinearLogprobBackward&, const Parallel&);
  void (*rms_norm_jvp)(const RmsNormJvp&, const Parallel&);
  void (*rotary)(const Rotary&, const Parallel&);
};

extern const Kernels kPortable;  // any CPU, all dtypes
#if defined(__x86_64__)
extern const Kernels kAvx2;        // AVX2 and FMA, all dtypes
extern const Kernels kAvx512;      // AVX-512 F, BW, DQ and VL, all dtypes
extern const Kernels kAvx512Bf16;  // AVX-512 BF16, bfloat16 only
extern const Kernels kAmxBf16;     // AMX BF16, bfloat16 only
// AMX BF16, float32 only.
void ghost_dot_on_tiles(const GhostDot&, const Parallel&);
void linear_logprob_on_tiles(const LinearLogprob&, const Parallel&);
#endif

// The fastest set that this CPU runs for `dtype`.
const Kernels& kernels_for(DType dtype);

// Uninitialized memory aligned to a cache line, kept by its thread for the next buffer when it is released.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace u2a
