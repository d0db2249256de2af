"""Public ops: argument checks, then ``torch.ops.u2a_fast.<op>``.

Shape letters are those of :mod:`u2a_fast.reference`, which also says what each op means. All floating arguments of
one call share one dtype (float16, bfloat16, float32 or float64) and one device. Arithmetic and results are float32,
or float64 for float64 arguments. The same call gives the same bits, whatever the number of threads.

Any strides are accepted. Values of ``cu_seqlens`` and ``target`` are checked on CPU only: on a GPU that would cost a
synchronization, and wrong values there are undefined behavior.
"""

from u2a_fast import _register  # noqa: F401  (registers torch.ops.u2a_fast)

from .attention import attention, attention_backward, attention_jvp
from .elementwise import glu_jvp, rms_norm_jvp, rotary
from .gradients import ghost_dot, ghost_dot_lowrank, ghost_norm, grad_project, grad_sketch
from .head import linear_logprob, linear_logprob_backward, linear_logprob_jvp

__all__ = [
    "attention",
    "attention_backward",
    "attention_jvp",
    "ghost_dot",
    "ghost_dot_lowrank",
    "ghost_norm",
    "glu_jvp",
    "grad_project",
    "grad_sketch",
    "linear_logprob",
    "linear_logprob_backward",
    "linear_logprob_jvp",
    "rms_norm_jvp",
    "rotary",
]
