"""``u2a-fast selftest``: are the derivatives right on this model? Every route against autograd in float64."""

from itertools import islice

import typer

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.session import show_result, verb
from u2a_fast.influence.selftest import BOUNDS, Check
from u2a_fast.influence.selftest import selftest as run_selftest
from u2a_fast.models.loading import load_model

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in BOUNDS}
_SELFTEST: o.Group = {
    **o.NEGATIVES,
    "negatives": (o.option(str | None, "Examples to test on; default random tokens."), None),
    "examples": (o.option(int, "How many examples.", min=1), 8),
    "dtype": (o.option(list[o.DtypeKind] | None, "Of the passes; repeatable; default float32 and bfloat16."), None),
    **{name: o.RUN[name] for name in ("json_output", "debug")},
}


@verb(o.MODEL, _SELFTEST, o.PARAMETERS, o.READING, resume="nothing was changed")
def selftest(context: typer.Context) -> None:
    """Compare every route's derivatives on this model with float64 autograd; exit code 1 if one is wrong."""
    p = context.params
    dtypes = [str(dtype) for dtype in p["dtype"] or ("float32", "bfloat16")]
    if "auto" in dtypes:
        raise ValueError(f"[selftest] expected --dtype out of {list(_NAMES)}, got 'auto'")
    examples = None
    if p["negatives"] is not None:
        examples = list(islice(inputs.read_the_negatives(p, *inputs.tokenization(p)), p["examples"]))
    model, _ = load_model(p["model"], device=p["device"], adapter=p["adapter"])
    report = run_selftest(
        model,
        examples,
        count=p["examples"],
        dtypes=[_NAMES[dtype] for dtype in dtypes],
        parameters=inputs.parameter_selection(p["parameters"]),
        token_budget=p["token_budget"],
        seed=p["seed"],
    )
    if p["json_output"]:
        show_result(report.to_dict(), as_json=True)
    else:
        print(f"{report.model}: {report.parameters:,} parameters, {report.examples} examples, {report.tokens} tokens")
        for check in report.checks:
            print(_line(check))
    raise typer.Exit(0 if report.healthy else 1)


def _line(check: Check) -> str:
    start = f"{check.status:8}{check.route:12} {check.dtype:9}"
    if check.relative_error is None:
        return f"{start} {check.detail}"
    ranking = "" if check.spearman is None else f", Spearman {check.spearman:.5f}"
    return f"{start} relative error {check.relative_error:.1e} (rounding explains up to {check.bound:.0e}){ranking}"
