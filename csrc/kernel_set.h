// The table of one instruction set: every op, instantiated for the set's engines.
#pragma once

#include "attention.h"
#include "attention_backward.h"
#include "elementwise.h"
#include "ghost_dot.h"
#include "ghost_dot_lowrank.h"
#include "ghost_norm.h"
#include "grad_project.h"
#include "grad_sketch.h"
#include "linear_logprob.h"
#include "linear_logprob_backward.h"

namespace u2a {
namespace {

// float and double have an engine each; the 16-bit types are widened to float as they are packed.
template <class F32, class F64>
struct VectorSet {
  template <class F>
  static void with_types(DType dtype, const F& run) {
    switch (dtype) {
      case DType::kFloat32:
        return run(F32{}, float{});
      case DType::kBFloat16:
        return run(F32{}, BFloat16{});
      case DType::kFloat16:
        return run(F32{}, Float16{});
      case DType::kFloat64:
        return run(F64{}, double{});
    }
  }
};

template <class Engine>
struct Bf16Set {
  template <class F>
  static void with_types(DType, const F& run) {
    run(Engine{}, BFloat16{});
  }
};

template <class Set>
constexpr Kernels kernel_set(const char* name) {
  return {
      name,
      [](const Attention& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto e, auto t) { attention_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const AttentionBackward& op, const Parallel& parallel) {
        Set::with_types(op.attention.dtype,
                        [&](auto e, auto t) { attention_backward_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const GhostDot& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto e, auto t) { ghost_dot_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const GhostDotLowRank& op, const Parallel& parallel) {
        Set::with_types(op.dtype,
                        [&](auto e, auto t) { ghost_dot_lowrank_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const GhostNorm& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto e, auto t) { ghost_norm_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const GluJvp& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto, auto t) { glu_jvp_with<decltype(t)>(op, parallel); });
      },
      [](const GradProject& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto e, auto t) { grad_project_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const GradSketch& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto e, auto t) { grad_sketch_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const LinearLogprob& op, const Parallel& parallel) {
        Set::with_types(op.head.dtype,
                        [&](auto e, auto t) { linear_logprob_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const LinearLogprobBackward& op, const Parallel& parallel) {
        Set::with_types(op.head.dtype,
                        [&](auto e, auto t) { linear_logprob_backward_with<decltype(e), decltype(t)>(op, parallel); });
      },
      [](const RmsNormJvp& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto, auto t) { rms_norm_jvp_with<decltype(t)>(op, parallel); });
      },
      [](const Rotary& op, const Parallel& parallel) {
        Set::with_types(op.dtype, [&](auto, auto t) { rotary_with<decltype(t)>(op, parallel); });
      },
  };
}

}  // namespace
}  // namespace u2a
