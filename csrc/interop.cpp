// The DLPack door: the same kernels for arrays of any library on the CPU, without torch and without copies.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

// The exchange structures of DLPack (https://dmlc.github.io/dlpack/latest/c_api.html), version 0 capsules.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4;

[[noreturn]] void fail(const std::string& op, const std::string& message) {
  throw py::value_error("[" + op + "] expected " + message);
}

// An argument, borrowed for the length of a call.
class Array {
 public:
  Array(const std::string& op, const std::string& name, const py::object& object) : op_(op), name_(name) {
    if (!py::hasattr(object, "__dlpack__"))
      throw py::type_error("[" + op + "] expected " + name + " to have __dlpack__, got " +
                           std::string(py::str(py::type::of(object).attr("__name__"))));
    if (py::hasattr(object, "__dlpack_device__")) {
      const auto device = py::cast<py::tuple>(object.attr("__dlpack_device__")());
      if (py::cast<int>(device[0]) != kCpu) fail(op, name + " on the CPU");
    }
    capsule_ = object.attr("__dlpack__")();
    tensor_ = static_cast<DLTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (!tensor_) throw py::error_already_set();
  }

  int64_t size(int axis) const { return tensor_->shape[axis]; }
  const void* data() const { return static_cast<const char*>(tensor_->data) + tensor_->byte_offset; }
  bool is(uint8_t code, int bits) const {
    return tensor_->type_code == code && tensor_->type_bits == bits && tensor_->type_lanes == 1;
  }

  // Checks the shape; a letter's length of -1 is whatever it is. `known` says what the others are.
  void check_shape(const std::string& letters, const std::vector<int64_t>& lengths, const std::string& known) const {
    bool fits = tensor_->ndim == static_cast<int32_t>(lengths.size());
    for (size_t axis = 0; fits && axis < lengths.size(); ++axis)
      fits = lengths[axis] < 0 || lengths[axis] == size(axis);
    if (fits) return;
    std::string got = "(";
    for (int32_t axis = 0; axis < tensor_->ndim; ++axis)
      got += (axis ? ", " : "") + std::to_string(size(axis)) + (tensor_->ndim == 1 ? "," : "");
    fail(op_, name_ + " of shape " + letters + (known.empty() ? "" : " with " + known) + ", got " + got + ")");
  }

  u2a::DType dtype() const {
    if (is(kFloat, 32)) return u2a::DType::kFloat32;
    if (is(kFloat, 64)) return u2a::DType::kFloat64;
    if (is(kFloat, 16)) return u2a::DType::kFloat16;
    if (is(kBFloat, 16)) return u2a::DType::kBFloat16;
    throw py::type_error("[" + op_ + "] expected " + name_ + " of dtype float16, bfloat16, float32 or float64");
  }

  // All rows of the array, one matrix.
  u2a::Matrix rows() const {
    const int last = tensor_->ndim - 1;
    const int64_t width = size(last);
    if (!tensor_->strides) return {data(), width};
    bool fits = width <= 1 || tensor_->strides[last] == 1;
    if (last == 2 && size(0) > 1) fits = fits && tensor_->strides[0] == size(1) * tensor_->strides[1];
    if (!fits) fail(op_, name_ + " with contiguous rows");
    return {data(), tensor_->strides[last - 1]};
  }

  // Offsets of B examples into N tokens.
  const int32_t* offsets(int64_t n) const {
    if (!is(kInt, 32)) throw py::type_error("[" + op_ + "] expected " + name_ + " of dtype int32");
    if (tensor_->ndim != 1 || size(0) < 1) check_shape("(B + 1,)", {-1, -1}, "B >= 0");
    if (tensor_->strides && size(0) > 1 && tensor_->strides[0] != 1) fail(op_, name_ + " to be contiguous");
    const int32_t* p = static_cast<const int32_t*>(data());
    if (p[0] != 0) fail(op_, name_ + " to start at 0, got " + std::to_string(p[0]));
    for (int64_t i = 1; i < size(0); ++i)
      if (p[i] < p[i - 1]) fail(op_, name_ + " to be non-decreasing, got a fall at position " + std::to_string(i - 1));
    if (p[size(0) - 1] != n)
      fail(op_, name_ + " to end at N = " + std::to_string(n) + " (from a), got " + std::to_string(p[size(0) - 1]));
    return p;
  }

 private:
  std::string op_, name_;
  py::object capsule_;
  DLTensor* tensor_;
};

void run_on_threads(int64_t count, void* context, u2a::Parallel::Body body) {
  const int64_t workers = std::min<int64_t>(count, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int64_t w = 1; w < workers; ++w)
    threads.emplace_back(body, context, count * w / workers, count * (w + 1) / workers);
  body(context, 0, count / workers);
  for (std::thread& thread : threads) thread.join();
}

u2a::Parallel all_threads() {
  return {run_on_threads, static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};
}

void check_dtype(const Array& x, u2a::DType dtype, const std::string& op, const std::string& name) {
  if (x.dtype() != dtype) throw py::type_error("[" + op + "] expected " + name + " of a's dtype");
}

py::array result(u2a::DType dtype, const std::vector<py::ssize_t>& shape) {
  return dtype == u2a::DType::kFloat64 ? py::array(py::array_t<double>(shape)) : py::array(py::array_t<float>(shape));
}

std::string given(const char* letter, int64_t length, const char* source) {
  return std::string(letter) + " = " + std::to_string(length) + " (from " + source + ")";
}

py::array ghost_dot(const py::object& a_in, const py::object& g_in, const py::object& cu_in, const py::object& v_in) {
  const std::string op = "ghost_dot";
  const Array a(op, "a", a_in), g(op, "g", g_in), cu(op, "cu_seqlens", cu_in), v(op, "v", v_in);
  a.check_shape("(N, I)", {-1, -1}, "");
  const int64_t n = a.size(0), i = a.size(1);
  g.check_shape("(N, O)", {n, -1}, given("N", n, "a"));
  const int64_t o = g.size(1);
  const int32_t* offsets = cu.offsets(n);
  v.check_shape("(K, O, I)", {-1, o, i}, given("O", o, "g") + ", " + given("I", i, "a"));
  const u2a::DType dtype = a.dtype();
  check_dtype(g, dtype, op, "g");
  check_dtype(v, dtype, op, "v");
  py::array out = result(dtype, {v.size(0), cu.size(0) - 1});
  const auto directions = u2a::Directions::of_rows(v.rows(), o);
  const u2a::GhostDot call = {dtype,          a.rows(),  g.rows(), offsets, directions,        n,
                              cu.size(0) - 1, v.size(0), i,        o,       out.mutable_data()};
  const py::gil_scoped_release unlocked;
  u2a::kernels_for(dtype).ghost_dot(call, all_threads());
  return out;
}

py::array ghost_norm(const py::object& a_in, const py::object& g_in, const py::object& cu_in) {
  const std::string op = "ghost_norm";
  const Array a(op, "a", a_in), g(op, "g", g_in), cu(op, "cu_seqlens", cu_in);
  a.check_shape("(N, I)", {-1, -1}, "");
  const int64_t n = a.size(0);
  g.check_shape("(N, O)", {n, -1}, given("N", n, "a"));
  const int32_t* offsets = cu.offsets(n);
  const u2a::DType dtype = a.dtype();
  check_dtype(g, dtype, op, "g");
  py::array out = result(dtype, {cu.size(0) - 1});
  const u2a::GhostNorm call = {dtype,          a.rows(),  g.rows(),  offsets,           n,
                               cu.size(0) - 1, a.size(1), g.size(1), out.mutable_data()};
  const py::gil_scoped_release unlocked;
  u2a::kernels_for(dtype).ghost_norm(call, all_threads());
  return out;
}

}  // namespace

PYBIND11_MODULE(_interop, m) {
  m.def("ghost_dot", &ghost_dot);
  m.def("ghost_norm", &ghost_norm);
}
