// What all ops of the torch door share: tensors as the kernels read them, copied only where they must be.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

const u2a::Parallel& torch_threads() {
  static thread_local u2a::Parallel parallel;
  parallel.run = [](int64_t count, void* context, u2a::Parallel::Body body) {
    // The stable ABI passes on of an exception no more than that parallel_for failed.
    std::atomic<bool> no_memory{false};
    torch::stable::parallel_for(0, count, 1, [&no_memory, context, body](int64_t begin, int64_t end) {
      try {
        body(context, begin, end);
      } catch (const std::bad_alloc&) {
        no_memory = true;
      }
    });
    if (no_memory) throw std::bad_alloc();
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

// torch::stable::new_empty looks its operator up by name at every call, which takes longer than some of the kernels.
// Fails for want of memory only; u2a_fast/models/memory.py knows it by the text.
Tensor empty(const std::vector<int64_t>& size, ScalarType dtype) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t axis = size.size(); axis-- > 1;) stride[axis - 1] = stride[axis] * std::max<int64_t>(1, size[axis]);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(), type,
                                           aoti_torch_device_type_cpu(), 0, &tensor) == TORCH_SUCCESS,
                  "no memory for the result of a u2a_fast kernel");
  return Tensor(tensor);
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

}  // namespace
