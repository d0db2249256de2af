"""Cases of any size: from letters on the command line, or from the layers of a model.

An op's letters and its variants (what is differentiated, say) are those of its timing cases. The letters of a layer
must be given; tokens, directions and the like take the timing case's where they are not.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from u2a_fast.bench.cases import timing_cases
from u2a_fast.bench.models import Layer
from u2a_fast.testing import TIMING_CASES, Case, cost

__all__ = ["MAX_SIZE", "choose", "letters", "parse_lengths", "parse_shape", "sized"]

TIMED = tuple(dict.fromkeys(case.op for case in TIMING_CASES))
LAYER_LETTERS = frozenset("IODVHGEF")
MAX_SIZE = 2**31 - 1  # of anything: beyond what any machine times, within what a list of examples can count
EXAMPLE = 128  # tokens of an example, unless given
TOKENS = {"cpu": 512, "cuda": 4096}
# Tokens that nobody asked for are halved until an op takes no more flops: the gate takes a few times as many in float64
# on the CPU.
GATE_FLOPS = {"cpu": 10**11, "cuda": 10**12}
GATE_PAIRS = 2**26  # the same for the pairs of tokens times heads that the reference of attention holds: 512 MB


def letters(op: str) -> tuple[str, ...]:
    """The letters whose sizes make a case of ``op``; B follows from the lengths. ValueError for no op."""
    if op not in TIMED:
        raise ValueError(f"[bench] expected --op out of {', '.join(TIMED)}, got {op!r}")
    return tuple(letter for letter in _variants(op)[0].sizes if letter != "B")


def _variants(op: str) -> list[Case]:
    """One timing case of each variant of ``op``: they differ in more than sizes and what a model's layer sets."""
    found: dict[Case, Case] = {}
    for case in TIMING_CASES:
        if case.op == op:
            kind = replace(
                case, sizes={}, dtype=torch.float32, lengths=(), parent=case.parent and (), window=0, softcap=0.0
            )
            found.setdefault(kind, case)
    return list(found.values())


def parse_shape(text: str) -> dict[str, int]:
    """Sizes by letter from e.g. "N=4096,I=1024,O=4096,K=1"."""
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",")]
    if not all(letter.isalpha() and _is_size(number) for letter, _, number in pairs):
        raise ValueError(f"[bench] expected --shape as letters and sizes, N=4096,I=1024,O=4096,K=1, got {text!r}")
    if len({letter for letter, _, _ in pairs}) < len(pairs):
        raise ValueError(f"[bench] expected each letter once in --shape, got {text!r}")
    return {letter: int(number) for letter, _, number in pairs}


def _is_size(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) <= MAX_SIZE


def parse_lengths(text: str) -> tuple[int, ...]:
    """Tokens of every example ("128"), or of each ("64,128,7")."""
    parts = text.replace(" ", "").split(",")
    if not all(map(_is_size, parts)):
        raise ValueError(f"[bench] expected --lengths as tokens of every example, or of each (64,128,7), got {text!r}")
    return tuple(map(int, parts))


def choose(names: Sequence[str], dtypes: Sequence[torch.dtype], device: str) -> list[Case]:
    """The timing cases on ``device`` ("cpu" or "cuda") of the ops ``names`` (none: all) in ``dtypes``."""
    for name in names:
        letters(name)
    cases = [case for case in timing_cases(device) if case.dtype in dtypes and (not names or case.op in names)]
    if not cases:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"[bench] expected --shape or --like for {kinds}, which has no cases of its own, got neither")
    return cases


def sized(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    device: str,
    *,
    shapes: Sequence[dict[str, int]] = (),
    model: Sequence[Layer] = (),
    tokens: int | None = None,
    lengths: tuple[int, ...] = (),
) -> list[Case]:
    """Cases of the ops ``names`` (none: all that fit) at ``shapes``, at the layers of a ``model``, or at each of both.

    ``tokens`` is N where a shape has none. One length is that of every example, the last one cut to fit; several are
    those of each, and make N. Raises ValueError for a shape that fits no op, and an op that fits no shape.
    """
    pool = list(dict.fromkeys(names)) or list(TIMED)
    requests = [Layer({**x.sizes, **shape}, x.options) for x in model or [Layer({})] for shape in shapes or [{}]]
    pairs = [(op, request) for op in pool for request in requests if _fits(op, request)]
    idle = [request for request in requests if all(request is not used for _, used in pairs)]
    if idle and (not model or not pairs):
        raise ValueError(_misfit(pool, idle[0]))
    for op in names:
        if all(op != used for used, _ in pairs):
            raise ValueError(_misfit([op], requests[0]))
    cases = [
        _case(replace(variant, dtype=dtype), request, device, _tokens(request, tokens, lengths), lengths)
        for op, request in pairs
        for variant in _variants(op)
        for dtype in dtypes
    ]
    return list({case.id: case for case in cases}.values())


def _fits(op: str, request: Layer) -> bool:
    return LAYER_LETTERS.intersection(letters(op)) <= request.sizes.keys() <= set(letters(op))


def _misfit(names: Sequence[str], request: Layer) -> str:
    known = "; ".join(f"{name}: {' '.join(letters(name))}" for name in names)
    got = ",".join(f"{letter}={size}" for letter, size in request.sizes.items()) or "none"
    return f"[bench] expected sizes by the letters of an op ({known}), got {got}"


def _tokens(request: Layer, tokens: int | None, lengths: tuple[int, ...]) -> int | None:
    """The N that was asked for, in whichever way; None where it was not. ValueError where ways disagree."""
    asked = {"--shape": request.sizes.get("N"), "--tokens": tokens, "--lengths": sum(lengths[1:]) and sum(lengths)}
    given = {name: number for name, number in asked.items() if number}
    if len(set(given.values())) > 1:
        found = " and ".join(f"{number} ({name})" for name, number in given.items())
        raise ValueError(f"[bench] expected one number of tokens, got {found}")
    return next(iter(given.values()), None)


def _case(variant: Case, request: Layer, device: str, tokens: int | None, lengths: tuple[int, ...]) -> Case:
    known = {name: value for name, value in request.options.items() if hasattr(variant, name)}
    case = replace(variant, sizes={**variant.sizes, **request.sizes}, **known)
    if tokens is not None:
        return _with_tokens(case, tokens, lengths)
    tokens = TOKENS[device]
    while tokens > EXAMPLE // 4 and _is_slow_to_check(_with_tokens(case, tokens, lengths), device):
        tokens //= 2
    return _with_tokens(case, tokens, lengths)


def _is_slow_to_check(case: Case, device: str) -> bool:
    pairs = case.sizes["N"] ** 2 * case.sizes.get("H", 0)
    return cost(case)[0] > GATE_FLOPS[device] or pairs > GATE_PAIRS


def _with_tokens(case: Case, tokens: int, lengths: tuple[int, ...]) -> Case:
    sizes = {**case.sizes, "N": tokens}
    if not case.lengths:
        return replace(case, sizes=sizes)
    if len(lengths) < 2:
        each = lengths[0] if lengths else EXAMPLE
        whole, rest = divmod(tokens, each)
        lengths = (each,) * whole + (rest,) * bool(rest)
    # A shared beginning stays one: the first segment is it, the others continue it.
    parent = case.parent and (-1, *(0,) * (len(lengths) - 1))
    longest = max(lengths) + (lengths[0] if parent else 0)
    window = case.window if case.window < longest else 0  # one that hides nothing would be a case of the same work
    return replace(case, sizes={**sizes, "B": len(lengths)}, lengths=lengths, parent=parent, window=window)
