// The torch door: unwraps tensors for the kernels and registers them on the CPU key of torch.ops.u2a_fast.
//
// Built against the LibTorch stable ABI. The checks here only keep memory safe; u2a_fast/ops holds the users'
// checks.
#include <Python.h>

#include <tuple>

#include "torch_tensors.h"

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

OptionalTensor checked_parent(const OptionalTensor& parent, int64_t b) {
  if (!parent) return std::nullopt;
  STD_TORCH_CHECK(
      parent->is_cpu() && parent->scalar_type() == ScalarType::Int && parent->dim() == 1 && parent->size(0) == b,
      "parent: expected int32 of shape (B,) on the CPU");
  const Tensor parents = torch::stable::contiguous(*parent);
  const int32_t* p = parents.const_data_ptr<int32_t>();
  int64_t root = -1;
  for (int64_t j = 0; j < b; ++j) {
    if (p[j] == -1) root = j;
    STD_TORCH_CHECK(p[j] == -1 || (p[j] >= 0 && p[j] == root), "parent: expected -1 or the last segment that has -1");
  }
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
  Tensor out = empty({op.n, op.h, op.f}, in.q.scalar_type());
  Tensor lse = empty({op.n, op.h}, accumulation_type(in.q));
  Tensor dout = empty({k, op.n, op.h, op.f}, in.q.scalar_type());
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

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_in, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out_in, const Tensor& lse_in,
                                                      const Tensor& cu_seqlens, const OptionalTensor& parent,
                                                      double scale, int64_t window, double softcap) {
  const AttentionTensors in(q, k, v, cu_seqlens, parent, scale, window, softcap);
  const u2a::Attention& op = in.attention;
  const Tensor grad = with_rows(grad_in), out = with_rows(out_in), lse = torch::stable::contiguous(lse_in);
  check_like(grad, q, {op.n, op.h, op.f}, "grad");
  check_like(out, q, {op.n, op.h, op.f}, "out");
  STD_TORCH_CHECK(lse.scalar_type() == accumulation_type(q), "lse: expected the accumulation dtype");
  check_like(lse, lse, {op.n, op.h}, "lse");
  Tensor dq = empty({op.n, op.h, op.e}, q.scalar_type()), dk = empty({op.n, op.g, op.e}, q.scalar_type());
  Tensor dv = empty({op.n, op.g, op.f}, q.scalar_type());
  u2a::kernels_for(op.dtype).attention_backward({op, heads(grad), heads(out), lse.const_data_ptr(),
                                                 dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr()},
                                                torch_threads());
  return {dq, dk, dv};
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
  const Tensor a = readable(a_in), g = readable(g_in), offsets = checked_offsets(cu_seqlens, n);
  const bool side_by_side = k >= u2a::kLeastSideBySide && v_in.stride(0) == 1 && v_in.stride(2) != 1;
  const Tensor v = side_by_side ? v_in : readable(v_in);
  const auto directions = side_by_side ? u2a::Directions{v.const_data_ptr(), {1, v.stride(1), v.stride(2)}}
                                       : u2a::Directions::of_rows(matrix(v), o);
  Tensor out = empty({k, b}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).ghost_dot({dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(), directions, n, b,
                                     k, i, o, out.mutable_data_ptr()},
                                    torch_threads());
  return out;
}

Tensor ghost_dot_lowrank(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens, const Tensor& left_in,
                         const Tensor& right_in) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), b = cu_seqlens.size(0) - 1;
  const int64_t k = left_in.size(0), r = left_in.size(2);
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  check_like(left_in, a_in, {k, o, r}, "left");
  check_like(right_in, a_in, {k, i, r}, "right");
  const Tensor a = readable(a_in), g = readable(g_in), left = readable(left_in), right = readable(right_in);
  const Tensor offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty({k, b}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).ghost_dot_lowrank({dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(),
                                             matrix(left), matrix(right), n, b, k, i, o, r, out.mutable_data_ptr()},
                                            torch_threads());
  return out;
}

Tensor ghost_norm(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), b = cu_seqlens.size(0) - 1;
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  const Tensor a = readable(a_in), g = readable(g_in), offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty({b}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).ghost_norm(
      {dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(), n, b, i, o, out.mutable_data_ptr()},
      torch_threads());
  return out;
}

Tensor grad_project(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens, const Tensor& p_in_in,
                    const Tensor& p_out_in) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), b = cu_seqlens.size(0) - 1;
  const int64_t p = p_in_in.size(1), q = p_out_in.size(1);
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  check_like(p_in_in, a_in, {i, p}, "p_in");
  check_like(p_out_in, a_in, {o, q}, "p_out");
  const Tensor a = readable(a_in), g = readable(g_in), p_in = readable(p_in_in), p_out = readable(p_out_in);
  const Tensor offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty({b, q, p}, accumulation_type(a));
  const u2a::DType dtype = dtype_of(a);
  u2a::kernels_for(dtype).grad_project({dtype, matrix(a), matrix(g), offsets.const_data_ptr<int32_t>(), matrix(p_in),
                                        matrix(p_out), n, b, i, o, p, q, out.mutable_data_ptr()},
                                       torch_threads());
  return out;
}

Tensor grad_sketch(const Tensor& a_in, const Tensor& g_in, const Tensor& cu_seqlens, int64_t dim, int64_t seed) {
  const int64_t n = a_in.size(0), i = a_in.size(1), o = g_in.size(1), b = cu_seqlens.size(0) - 1;
  check_like(a_in, a_in, {n, i}, "a");
  check_like(g_in, a_in, {n, o}, "g");
  STD_TORCH_CHECK(dim >= 32 && dim <= 8192, "dim: expected 32 to 8192");
  const Tensor a = readable(a_in), g = readable(g_in), offsets = checked_offsets(cu_seqlens, n);
  Tensor out = empty({b, dim}, accumulation_type(a));
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
  Tensor logp = empty({n}, dtype), lse = empty({n}, dtype), jvp = empty({k, n}, dtype);
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
  Tensor grad_h = empty({need_h ? n : 0, d}, h.scalar_type());
  Tensor grad_weight = empty({need_weight ? v : 0, d}, dtype), grad_bias = empty({need_weight ? v : 0}, dtype);
  u2a::kernels_for(in.head.dtype)
      .linear_logprob_backward(
          {in.head, grad_logp.const_data_ptr(), grad_lse.const_data_ptr(), lse.const_data_ptr(),
           need_h ? grad_h.mutable_data_ptr() : nullptr, need_weight ? grad_weight.mutable_data_ptr() : nullptr,
           need_weight ? grad_bias.mutable_data_ptr() : nullptr},
          torch_threads());
  return {grad_h, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> glu_jvp(const Tensor& gate_in, const Tensor& up_in, const Tensor& dgate_in,
                                   const OptionalTensor& dup_in, bool gelu) {
  const int64_t n = gate_in.size(0), i = gate_in.size(1);
  for (const auto& [name, x] : {std::pair("gate", &gate_in), {"up", &up_in}, {"dgate", &dgate_in}})
    check_like(*x, gate_in, {n, i}, name);
  if (dup_in) check_like(*dup_in, gate_in, {n, i}, "dup");
  const Tensor gate = readable(gate_in), up = readable(up_in), dgate = readable(dgate_in);
  const OptionalTensor dup = dup_in ? OptionalTensor(readable(*dup_in)) : std::nullopt;
  Tensor y = empty({n, i}, gate.scalar_type()), dy = empty({n, i}, gate.scalar_type());
  const u2a::DType dtype = dtype_of(gate);
  u2a::kernels_for(dtype).glu_jvp({dtype, matrix(gate), matrix(up), matrix(dgate), dup ? matrix(*dup) : u2a::Matrix{},
                                   gelu, n, i, y.mutable_data_ptr(), dy.mutable_data_ptr()},
                                  torch_threads());
  return {y, dy};
}

std::tuple<Tensor, Tensor> rms_norm_jvp(const Tensor& x_in, const Tensor& dx_in, const Tensor& scale_in,
                                        const OptionalTensor& dscale_in, double eps) {
  const int64_t n = x_in.size(0), d = x_in.size(1);
  check_like(x_in, x_in, {n, d}, "x");
  check_like(dx_in, x_in, {n, d}, "dx");
  const Tensor x = readable(x_in), dx = readable(dx_in), scale = torch::stable::contiguous(scale_in);
  const OptionalTensor dscale = dense(dscale_in);
  STD_TORCH_CHECK(scale.scalar_type() == accumulation_type(x), "scale: expected the accumulation dtype");
  check_like(scale, scale, {d}, "scale");
  if (dscale) check_like(*dscale, scale, {d}, "dscale");
  Tensor y = empty({n, d}, x.scalar_type()), dy = empty({n, d}, x.scalar_type());
  const u2a::DType dtype = dtype_of(x);
  u2a::kernels_for(dtype).rms_norm_jvp({dtype, matrix(x), matrix(dx), scale.const_data_ptr(), data(dscale), eps, n, d,
                                        y.mutable_data_ptr(), dy.mutable_data_ptr()},
                                       torch_threads());
  return {y, dy};
}

Tensor rotary(const Tensor& x_in, const Tensor& cosine_in, const Tensor& sine_in) {
  const int64_t n = x_in.size(0), h = x_in.size(1), e = x_in.size(2);
  STD_TORCH_CHECK(e % 2 == 0, "x: expected an even number of features");
  check_like(x_in, x_in, {n, h, e}, "x");
  check_like(cosine_in, x_in, {n, e}, "cosine");
  check_like(sine_in, x_in, {n, e}, "sine");
  const Tensor x = with_rows(x_in), cosine = readable(cosine_in), sine = readable(sine_in);
  Tensor y = empty({n, h, e}, x.scalar_type());
  const u2a::DType dtype = dtype_of(x);
  u2a::kernels_for(dtype).rotary({dtype, heads(x), matrix(cosine), matrix(sine), n, h, e, y.mutable_data_ptr()},
                                 torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_jvp", TORCH_BOX(&attention_jvp));
  m.impl("ghost_dot", TORCH_BOX(&ghost_dot));
  m.impl("ghost_dot_lowrank", TORCH_BOX(&ghost_dot_lowrank));
  m.impl("ghost_norm", TORCH_BOX(&ghost_norm));
  m.impl("glu_jvp", TORCH_BOX(&glu_jvp));
  m.impl("grad_project", TORCH_BOX(&grad_project));
  m.impl("grad_sketch", TORCH_BOX(&grad_sketch));
  m.impl("linear_logprob", TORCH_BOX(&linear_logprob));
  m.impl("linear_logprob_backward", TORCH_BOX(&linear_logprob_backward));
  m.impl("linear_logprob_jvp", TORCH_BOX(&linear_logprob_jvp));
  m.impl("rms_norm_jvp", TORCH_BOX(&rms_norm_jvp));
  m.impl("rotary", TORCH_BOX(&rotary));
}
