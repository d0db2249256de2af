// The torch door: unwraps tensors for the kernels and registers them on the CPU key of torch.ops.u2a_fast.
//
// Built against the LibTorch stable ABI. The checks here only keep memory safe; u2a_fast/ops.py holds the users'
// checks.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const u2a::Parallel& torch_threads() {
  static thread_local u2a::Parallel parallel;
  parallel.run = [](int64_t count, void* context, u2a::Parallel::Body body) {
    torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  return parallel;
}

u2a::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return u2a::DType::kFloat32;
    case ScalarType::BFloat16:
      return u2a::DType::kBFloat16;
    case ScalarType::Half:
      return u2a::DType::kFloat16;
    case ScalarType::Double:
      return u2a::DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "expected a float16, bfloat16, float32 or float64 tensor");
  }
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

void check_like(const Tensor& x, const Tensor& first, const std::vector<int64_t>& size, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == first.scalar_type(), name, ": device or dtype differs");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(size.size()), name, ": wrong number of axes");
  for (size_t axis = 0; axis < size.size(); ++axis)
    STD_TORCH_CHECK(x.size(axis) == size[axis], name, ": wrong length of axis ", axis);
}

// A tensor that kernels can read: its rows are contiguous, and all leading axes step like one. Copies only if need be.
Tensor readable(const Tensor& x) {
  const int64_t rank = x.dim();
  bool fits = rank == 0 || x.size(rank - 1) <= 1 || x.stride(rank - 1) == 1;
  if (rank == 3) fits = fits && (x.size(0) <= 1 || x.stride(0) == x.size(1) * x.stride(1));
  return fits ? x : torch::stable::contiguous(x);
}

u2a::Matrix matrix(const Tensor& x) { return {x.const_data_ptr(), x.stride(x.dim() - 2)}; }

// Optional arguments as the kernels take them, and their memory while a kernel runs.
struct Readable {
  OptionalTensor tensor;
  explicit Readable(const OptionalTensor& x) : tensor(x ? OptionalTensor(readable(*x)) : std::nullopt) {}
  u2a::Matrix rows() const { return tensor ? matrix(*tensor) : u2a::Matrix{nullptr, 0}; }
};

// Vectors and stacks of vectors are read without strides.
OptionalTensor dense(const OptionalTensor& x) {
  return x ? OptionalTensor(torch::stable::contiguous(*x)) : std::nullopt;
}
const void* data(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

Tensor checked_offsets(const Tensor& cu_seqlens, int64_t n) {
  STD_TORCH_CHECK(cu_seqlens.is_cpu() && cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
                      cu_seqlens.size(0) >= 1,
                  "cu_seqlens: expected int32 offsets of shape (B + 1,) on the CPU");
  const Tensor offsets = torch::stable::contiguous(cu_seqlens);
  const int32_t* p = offsets.const_data_ptr<int32_t>();
  int64_t before = 0;
  for (int64_t i = 0; i < offsets.size(0); ++i) {
    STD_TORCH_CHECK(p[i] >= before && p[i] <= n, "cu_seqlens: expected non-decreasing offsets in [0, N]");
    before = p[i];
  }
  return offsets;
}

// A tensor of heads that kernels can read: its rows are contiguous. Copies only if need be.
Tensor with_rows(const Tensor& x) {
  const int64_t rank = x.dim();
  return rank > 0 && x.size(rank - 1) > 1 && x.stride(rank - 1) != 1 ? torch::stable::contiguous(x) : x;
}

u2a::Heads heads(const Tensor& x) {
  const int64_t rank = x.dim();
  return {x.const_data_ptr(), rank == 4 ? x.stride(0) : 0, x.stride(rank - 3), x.stride(rank - 2)};
}

OptionalTensor checked_parent(const OptionalTensor& parent, int64_t b) {
  if (!parent) return std::nullopt;
  STD_TORCH_CHECK(
      parent->is_cpu() && parent->scalar_type() == ScalarType::Int && parent->dim() == 1 && parent->size(0) == b,
      "parent: expected int32 of shape (B,) on the CPU");
  const Tensor parents = torch::stable::contiguous(*parent);
  const int32_t* p = parents.const_data_ptr<int32_t>();
  for (int64_t j = 0; j < b; ++j) STD_TORCH_CHECK(p[j] >= -1 && p[j] < j, "parent: expected -1 or an earlier segment");
  return parents;
}

// The checked arguments that all attention ops share and the tensors that hold their memory.
struct AttentionTensors {
  Tensor q, k, v, offsets;
  OptionalTensor parent;
  u2a::Attention attention;

  AttentionTensors(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cu_seqlens,
                   const OptionalTensor& parent_in, double scale, int64_t window, double softcap)
      : q(with_rows(q_in)),
        k(with_rows(k_in)),
        v(with_rows(v_in)),
        offsets(checked_offsets(cu_seqlens, q_in.size(0))),
        parent(checked_parent(parent_in, cu_seqlens.size(0) - 1)),
        attention() {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v: expected 3 axes");
    const int64_t n = q.size(0), h = q.size(1), g = k.size(1), e = q.size(2), f = v.size(2);
    check_like(q, q, {n, h, e}, "q");
    check_like(k, q, {n, g, e}, "k");
    check_like(v, q, {n, g, f}, "v");
    STD_TORCH_CHECK(g > 0 && h % g == 0 && window >= 0, "expected G to divide H, and a window >= 0");
    const int32_t* starts = offsets.const_data_ptr<int32_t>();
    STD_TORCH_CHECK(starts[0] == 0 && starts[offsets.size(0) - 1] == n, "cu_seqlens: expected to run from 0 to N");
    attention.dtype = dtype_of(q);
    attention.q = heads(q), attention.k = heads(k), attention.v = heads(v);
    attention.cu_seqlens = starts;
    attention.parent = parent ? parent->const_data_ptr<int32_t>() : nullptr;
    attention.scale = scale, attention.softcap = softcap, attention.window = window;
    attention.n = n, attention.b = offsets.size(0) - 1, attention.h = h, attention.g = g;
    attention.e = e, attention.f = f;
  }
};

std::tuple<Tensor, Tensor, Tensor> run_attention(AttentionTensors& in, int64_t k) {
  u2a::Attention& op = in.attention;
  Tensor out = empty(in.q, {op.n, op.h, op.f}, in.q.scalar_type());
  Tensor lse = empty(in.q, {op.n, op.h}, accumulation_type(in.q));
  Tensor dout = empty(in.q, {k, op.n, op.h, op.f}, in.q.scalar_type());
  op.k_directions = k;
  op.out = out.mutable_data_ptr(), op.lse = lse.mutable_data_ptr(), op.dout = dout.mutable_data_ptr();
  u2a::kernels_for(op.dtype).attention(op, torch_threads());
  return {out, lse, dout};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                     const OptionalTensor& parent, double scale, int64_t window, double softcap) {
  AttentionTensors in(q, k, v, cu_seqlens, parent, scale, window, softcap);
  const auto [out, lse, dout] = run_attention(in, 0);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_jvp(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& dq_in,
                                                 const Tensor& dk_in, const Tensor& dv_in, const Tensor& cu_seqlens,
                                                 const OptionalTensor& parent, double scale, int64_t window,
                                                 double softcap) {
  AttentionTensors in(q, k, v, cu_seqlens, parent, scale, window, softcap);
  const Tensor dq = with_rows(dq_in), dk = with_rows(dk_in), dv = with_rows(dv_in);
  const int64_t directions = dq.size(0);
  u2a::Attention& op = in.attention;
  check_like(dq, q, {directions, op.n, op.h, op.e}, "dq");
  check_like(dk, q, {directions, op.n, op.g, op.e}, "dk");
  check_like(dv, q, {directions, op.n, op.g, op.f}, "dv");
  op.dq = heads(dq), op.dk = heads(dk), op.dv = heads(dv);
  return run_attention(in, directions);
}

Tensor ghost_dot(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens, const Tensor& v_in) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), k = v_in.size(0), b = cu_seqlens.size(0) - 1;
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  check_like(v_in, a_in, {k, o, i}, "v");
  const Tensor a = readable(a_in), g = readable(g_in), v = readable(v_in), offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty(a, {k, b}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).ghost_dot({dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(), matrix(v), n, b, k,
                                     i, o, out.mutable_data_ptr()},
                                    torch_threads());
  return out;
}

Tensor ghost_norm(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), b = cu_seqlens.size(0) - 1;
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  const Tensor a = readable(a_in), g = readable(g_in), offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty(a, {b}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).ghost_norm(
      {dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(), n, b, i, o, out.mutable_data_ptr()},
      torch_threads());
  return out;
}

Tensor grad_sketch(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens, int64_t dim, int64_t seed) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), b = cu_seqlens.size(0) - 1;
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  STD_TORCH_CHECK(dim >= 32 && dim <= 8192, "dim: expected 32 to 8192");
  const Tensor a = readable(a_in), g = readable(g_in), offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty(a, {b, dim}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).grad_sketch({dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(), n, b, i, o, dim,
                                       static_cast<uint64_t>(seed), out.mutable_data_ptr()},
                                      torch_threads());
  return out;
}

// The checked head and the tensors that hold its memory.
struct HeadTensors {
  Tensor h, weight, target;
  OptionalTensor bias;
  u2a::Head head;

  HeadTensors(const Tensor& h_in, const Tensor& weight_in, const Tensor& target_in, const OptionalTensor& bias_in,
              double softcap)
      : h(readable(h_in)),
        weight(readable(weight_in)),
        target(torch::stable::contiguous(target_in)),
        bias(dense(bias_in)),
        head() {
    const int64_t n = h.size(0), d = h.size(1), v = weight.size(0);
    check_like(h, h, {n, d}, "h");
    check_like(weight, h, {v, d}, "weight");
    if (bias) check_like(*bias, h, {v}, "bias");
    STD_TORCH_CHECK(
        target.is_cpu() && target.scalar_type() == ScalarType::Long && target.dim() == 1 && target.size(0) == n,
        "target: expected int64 ids of shape (N,) on the CPU");
    const int64_t* ids = target.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < n; ++t) STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < v, "target: expected ids in [0, V)");
    head = {dtype_of(h), matrix(h), matrix(weight), ids, data(bias), softcap, n, d, v};
  }
};

std::tuple<Tensor, Tensor, Tensor> run_logprob(const HeadTensors& in, const OptionalTensor& dh_in,
                                               const OptionalTensor& dweight_in, const OptionalTensor& dbias_in,
                                               int64_t k) {
  const auto [n, d, v] = std::tuple(in.head.n, in.head.d, in.head.v);
  if (dh_in) check_like(*dh_in, in.h, {k, n, d}, "dh");
  if (dweight_in) check_like(*dweight_in, in.h, {k, v, d}, "dweight");
  if (dbias_in) check_like(*dbias_in, in.h, {k, v}, "dbias");
  const Readable dh(dh_in), dweight(dweight_in);
  const OptionalTensor dbias = dense(dbias_in);
  const ScalarType dtype = accumulation_type(in.h);
  Tensor logp = empty(in.h, {n}, dtype), lse = empty(in.h, {n}, dtype), jvp = empty(in.h, {k, n}, dtype);
  u2a::kernels_for(in.head.dtype)
      .linear_logprob({in.head, dh.rows(), dweight.rows(), data(dbias), k, logp.mutable_data_ptr(),
                       lse.mutable_data_ptr(), jvp.mutable_data_ptr()},
                      torch_threads());
  return {logp, lse, jvp};
}

std::tuple<Tensor, Tensor> linear_logprob(const Tensor& h, const Tensor& weight, const Tensor& target,
                                          const OptionalTensor& bias, double softcap) {
  const auto [logp, lse, jvp] =
      run_logprob(HeadTensors(h, weight, target, bias, softcap), std::nullopt, std::nullopt, std::nullopt, 0);
  return {logp, lse};
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_jvp(const Tensor& h, const Tensor& weight, const Tensor& target,
                                                      const OptionalTensor& dh, const OptionalTensor& dweight,
                                                      const OptionalTensor& bias, const OptionalTensor& dbias,
                                                      double softcap) {
  STD_TORCH_CHECK(dh || dweight, "expected dh or dweight");
  const int64_t k = (dh ? *dh : *dweight).size(0);
  return run_logprob(HeadTensors(h, weight, target, bias, softcap), dh, dweight, dbias, k);
}

std::tuple<Tensor, Tensor, Tensor> linear_logprob_backward(const Tensor& grad_logp_in, const Tensor& grad_lse_in,
                                                           const Tensor& h, const Tensor& weight, const Tensor& target,
                                                           const Tensor& lse_in, const OptionalTensor& bias,
                                                           double softcap, bool need_h, bool need_weight) {
  const HeadTensors in(h, weight, target, bias, softcap);
  const auto [n, d, v] = std::tuple(in.head.n, in.head.d, in.head.v);
  const ScalarType dtype = accumulation_type(h);
  const Tensor grad_logp = torch::stable::contiguous(grad_logp_in), grad_lse = torch::stable::contiguous(grad_lse_in),
               lse = torch::stable::contiguous(lse_in);
  STD_TORCH_CHECK(lse.scalar_type() == dtype, "lse: expected the accumulation dtype");
  check_like(lse, lse, {n}, "lse");
  check_like(grad_logp, lse, {n}, "grad_logp");
  check_like(grad_lse, lse, {n}, "grad_lse");
  Tensor grad_h = empty(h, {need_h ? n : 0, d}, h.scalar_type());
  Tensor grad_weight = empty(h, {need_weight ? v : 0, d}, dtype), grad_bias = empty(h, {need_weight ? v : 0}, dtype);
  u2a::kernels_for(in.head.dtype)
      .linear_logprob_backward(
          {in.head, grad_logp.const_data_ptr(), grad_lse.const_data_ptr(), lse.const_data_ptr(),
           need_h ? grad_h.mutable_data_ptr() : nullptr, need_weight ? grad_weight.mutable_data_ptr() : nullptr,
           need_weight ? grad_bias.mutable_data_ptr() : nullptr},
          torch_threads());
  return {grad_h, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_jvp", TORCH_BOX(&attention_jvp));
  m.impl("ghost_dot", TORCH_BOX(&ghost_dot));
  m.impl("ghost_norm", TORCH_BOX(&ghost_norm));
  m.impl("grad_sketch", TORCH_BOX(&grad_sketch));
  m.impl("linear_logprob", TORCH_BOX(&linear_logprob));
  m.impl("linear_logprob_backward", TORCH_BOX(&linear_logprob_backward));
  m.impl("linear_logprob_jvp", TORCH_BOX(&linear_logprob_jvp));
}
