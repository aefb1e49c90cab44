"""Child process: run the Triton kernels and print their errors against the reference.

Started by test_triton.py with a precision, "float32" or "half", and a device: "cpu" with TRITON_INTERPRET=1,
or "cuda". One JSON object per check: {"check", "dtype", "errors": {name: rms}}. The reference runs in float32
on the same rounded operands, so an error is the kernel's own.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from depthpass_kernels import (
    bridge_in,
    gated_attention,
    slot_attention,
    slot_attention_backward,
    slot_attention_forward,
)
from depthpass_kernels.gated_attention import triton as gated_kernels
from depthpass_kernels.launch import Tile
from depthpass_kernels.slot_attention import naive
from depthpass_kernels.slot_attention import triton as kernels
from depthpass_kernels.slot_attention.columns import copy_columns
from depthpass_kernels.slot_attention.problem import Problem
from kernel_cases import ATTENTION, BRIDGE, GATED, Attention, Bridge, Gated, gradients, leaves, rms_error
from torch import Tensor

F32 = torch.float32
SMALL = Tile(16, 16, warps=4, stages=1)
LONG = replace(ATTENTION["everything"], keys=150, q_start=140, holes=(90,), window=70)


@triton.jit
def count(X):
    for i in range(tl.program_id(0) + 2):
        tl.store(X + i, 1)


def interpreter_fault() -> str | None:
    """Say why this interpreter cannot run any loop whose bound is computed, or return None."""
    x = torch.zeros(2, dtype=torch.int32)
    try:
        count[(1,)](x)
    except triton.runtime.errors.InterpreterError as error:
        if "0-dimensional arrays" in str(error):
            return (
                f"the interpreter of triton {triton.__version__} needs numpy < 2.4, found {numpy.__version__}"
            )
        raise
    assert x.tolist() == [1, 1]
    return None


def patch_once() -> None:
    """Search triton.language for what the interpreter replaces once per launch and module, not at every call of a helper.

    The search is a third of the interpreter's time, and finds what it has replaced already.
    """
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def first_time(fn):
        module = id(fn.__globals__)  # all that a patch depends on
        if module in done:
            return None  # only a launch, which is the first to patch, undoes its own
        done.add(module)
        scope = patch(fn)
        undo = scope.restore
        scope.restore = lambda: (undo(), done.clear())
        return scope

    interpreter._patch_lang = first_time


def report(check: str, dtype: torch.dtype, errors: dict[str, float]) -> None:
    print(
        json.dumps({"check": check, "dtype": str(dtype).removeprefix("torch."), "errors": errors}), flush=True
    )


def attention(name: str, case: Attention, dtype: torch.dtype) -> None:
    """Output, log-sum-exp and every gradient."""
    operands, options, grad = case.build(dtype)
    exact, inputs = leaves({n: x.float() for n, x in operands.items()}), leaves(operands)
    want = slot_attention(**exact, **options, implementation="naive")
    forward, results = kernels.forward, []
    kernels.forward = lambda problem: results.append(forward(problem)) or results[-1]
    got = slot_attention(**inputs, **options, implementation="triton")
    kernels.forward = forward
    _, want_lse = slot_attention_forward(**exact, **options, implementation="naive")
    ((_, got_lse),) = results
    errors = {"out": rms_error(got, want), "lse": lse_error(got_lse, want_lse)}
    want_grads, got_grads = gradients(want, exact, grad.float()), gradients(got, inputs, grad)
    report(name, dtype, errors | {n: rms_error(got_grads[n], g) for n, g in want_grads.items()})


def lse_error(got: Tensor, want: Tensor) -> float:
    if not torch.equal(got.isinf(), want.isinf()):
        return float("inf")
    return rms_error(got[~got.isinf()], want[~want.isinf()]) if (~got.isinf()).any() else 0.0


def key_shares(name: str, case: Attention, splits: int) -> None:
    """The forward over several shares of the keys, some of them empty, merged."""
    operands, options, _ = case.build(F32)
    fields: dict[str, Any] = dict.fromkeys(("valid", "sinks"), None) | options | operands
    problem = Problem(**fields, q_offset=None, scale=0.2)
    (out, lse), (want, want_lse) = kernels.forward(problem, splits), naive.forward(problem)
    report(f"{name}/{splits} shares", F32, {"out": rms_error(out, want), "lse": lse_error(lse, want_lse)})


def strided(dtype: torch.dtype) -> None:
    """Views: queries from [B, C, H, D], keys from a static buffer with NaN beyond, an expanded gradient."""
    operands, options, _ = ATTENTION["everything"].build(dtype)
    exact = leaves({n: x.float() for n, x in operands.items()})
    views = dict(operands, q=operands["q"].transpose(1, 2).contiguous().transpose(1, 2))
    for n in "kv":
        buffer = torch.full((2, 2, 80, operands[n].shape[-1] + 3), float("nan"), dtype=dtype)
        buffer[:, :, :38, 2:-1] = operands[n][:, :, :38]  # 38 = q_start + C: no query sees a later key
        views[n] = buffer[:, :, :44, 2:-1]
    views = {n: x.detach().requires_grad_() for n, x in views.items()}
    want = slot_attention(**exact, **options, implementation="naive")
    got = slot_attention(**views, **options, implementation="triton")
    one = torch.ones((), dtype=dtype)
    want_grads, got_grads = (
        gradients(want, exact, one.float().expand_as(want)),
        gradients(got, views, one.expand_as(got)),
    )
    errors = {n: rms_error(got_grads[n], g) for n, g in want_grads.items()}
    report("strided", dtype, {"out": rms_error(got, want)} | errors)
    views["q"] = operands["q"].mT.contiguous().mT.requires_grad_()  # last axis not contiguous: copied
    got = slot_attention(**views, **options, implementation="triton")
    dq = gradients(got, {"q": views["q"]}, one.expand_as(got))["dq"]
    report("last axis strided", dtype, {"out": rms_error(got, want), "dq": rms_error(dq, want_grads["dq"])})


def tensor_start(dtype: torch.dtype) -> None:
    """A start read from memory, with key columns left over beyond the queries."""
    operands, options, grad = ATTENTION["everything"].build(dtype)
    exact, inputs = leaves({n: x.float() for n, x in operands.items()}), leaves(operands)
    want = slot_attention(**exact, **options, implementation="naive")
    got = slot_attention(**inputs, **options | {"q_start": torch.tensor(33)}, implementation="triton")
    want_grads, got_grads = gradients(want, exact, grad.float()), gradients(got, inputs, grad)
    errors = {n: rms_error(got_grads[n], g) for n, g in want_grads.items()}
    report("tensor start", dtype, {"out": rms_error(got, want)} | errors)


def accumulate(name: str, dtype: torch.dtype) -> None:
    """Key gradients added to float32 buffers; what no query sees keeps its value bit for bit, NaN too."""
    operands, options, grad = ATTENTION[name].build(dtype)
    exact = {n: x.float() for n, x in operands.items()}
    sinks, exact_sinks = ({"sinks": d.pop("sinks")} if "sinks" in d else {} for d in (operands, exact))
    lse = slot_attention_forward(**exact, **exact_sinks, **options, implementation="naive")
    want = slot_attention_backward(
        grad.float(), **exact, **named(lse), **exact_sinks, **options, implementation="naive"
    )
    lse = slot_attention_forward(**operands, **sinks, **options, implementation="triton")
    into = tuple(torch.randn(2, 2, 44, width) for width in (20, 12))
    before = [x.clone() for x in into]
    for x in (*into, *before):
        x[:, :, 38:] = float("nan")
    dq, dk, dv, dsinks = slot_attention_backward(
        grad, **operands, **named(lse), **sinks, **options, into=into, implementation="triton"
    )
    errors = {"dq": rms_error(dq, want[0])}
    for n, got, old, exp in zip(("dk", "dv"), (dk, dv), before, want[1:3], strict=True):
        errors[n] = rms_error((got - old)[:, :, :38], exp[:, :, :38])
        errors[f"{n} kept"] = float(not got[:, :, 38:].isnan().all())
    if dsinks is not None:
        errors["dsinks"] = rms_error(dsinks, want[3])
    report(f"accumulate {name}", dtype, errors)


def columns(dtype: torch.dtype) -> None:
    """Keys and values of a chunk into the columns of buffers, and columns of accumulators into gradients."""
    batch, heads, length = 3, 2, 7
    own = [torch.randn(batch, length, heads, n).to(dtype).transpose(1, 2) for n in (20, 16)]
    buffers = [torch.randn(batch, heads, 30, n).to(dtype) for n in (20, 16)]
    sums = [torch.randn(2, batch, heads, 30, n)[1] for n in (20, 16)]
    gradients_of = [torch.empty_like(t) for t in own]
    before = [t.clone() for t in buffers]
    copy_columns([t[:, :, 11:18] for t in buffers], own, "triton")
    copy_columns(gradients_of, [t[:, :, 11:18] for t in sums], "triton")
    for t, x in zip(before, own, strict=True):
        t[:, :, 11:18] = x
    errors = {f"buffer {i}": rms_error(t, b) for i, (t, b) in enumerate(zip(buffers, before, strict=True))}
    right = [t[:, :, 11:18].to(dtype) for t in sums]
    errors |= {f"gradient {i}": rms_error(g, w) for i, (g, w) in enumerate(zip(gradients_of, right, strict=True))}
    report("columns", dtype, errors)


def gated(name: str, case: Gated, dtype: torch.dtype) -> None:
    """Output and every gradient."""
    operands, options, grad = case.build(dtype)
    exact, inputs = leaves({n: x.float() for n, x in operands.items()}), leaves(operands)
    want = gated_attention(**exact, **options, implementation="naive")
    got = gated_attention(**inputs, **options, implementation="triton")
    want_grads, got_grads = gradients(want, exact, grad.float()), gradients(got, inputs, grad)
    errors = {"out": rms_error(got, want)} | {n: rms_error(got_grads[n], g) for n, g in want_grads.items()}
    report(f"gated {name}", dtype, errors)


def named(results: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("out", "lse"), results, strict=True))


def bridge(
    name: str, case: Bridge, dtype: torch.dtype, pick: Callable[[Any], Any] = lambda pair: pair
) -> None:
    """y, z and every gradient; absent streams hold NaN."""
    operands, options, weights = case.build(dtype)
    if "present" in options:
        operands["c"][~options["present"]] = float("nan")
    exact, inputs = leaves({n: x.float() for n, x in operands.items()}), leaves(operands)
    want = [o for o in bridge_in(**exact, **options, implementation="naive") if o is not None]
    got = [o for o in bridge_in(**inputs, **options, implementation="triton") if o is not None]
    errors = {f"output {i}": rms_error(g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))}
    want, got, weights = pick(want), pick(got), pick(weights[: len(want)])
    wide = [w.float() for w in weights]
    want_grads = torch.autograd.grad(want, list(exact.values()), wide, materialize_grads=True)
    got_grads = torch.autograd.grad(got, list(inputs.values()), weights, materialize_grads=True)
    errors |= {f"d{n}": rms_error(g, w) for n, w, g in zip(inputs, want_grads, got_grads, strict=True)}
    report(f"bridge {name}", dtype, errors)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    precision, device = sys.argv[1:]
    torch.set_default_device(device)
    assert triton.knobs.runtime.interpret == (device == "cpu")
    if device == "cpu" and (reason := interpreter_fault()):
        print(json.dumps({"skip": reason}))
        return
    if device == "cpu":
        patch_once()
    full_precision() if precision == "float32" else half_precision()


def full_precision() -> None:
    """Everything once, on the smallest tiles: many key blocks and query tiles even in a tiny problem."""
    default = {f"{n}_tile": getattr(kernels, f"{n}_tile") for n in ("forward", "dq", "dkv")}
    for name in default:
        setattr(kernels, name, lambda problem: SMALL)
    for name, case in ATTENTION.items():
        attention(name, case, F32)
    for name in ("left_padding", "everything", "empty_rows", "empty_rows_sinks"):
        key_shares(name, ATTENTION[name], 3)
    accumulate("everything", F32)
    accumulate("empty_rows", F32)
    columns(F32)
    strided(F32)
    tensor_start(F32)
    for name, tile in default.items():
        setattr(kernels, name, tile)
    attention("default tiles", LONG, F32)
    default = {f"{n}_tile": getattr(gated_kernels, f"{n}_tile") for n in ("forward", "dq", "dkv")}
    for name in default:
        setattr(gated_kernels, name, lambda problem: SMALL)
    for name, case in GATED.items():
        gated(name, case, F32)
    for name, tile in default.items():
        setattr(gated_kernels, name, tile)
    gated("default tiles", GATED["several_blocks"], F32)
    for name, case in BRIDGE.items():
        bridge(name, case, F32)
    bridge("y alone", BRIDGE["plain"], F32, lambda pair: pair[:1])
    bridge("z alone", BRIDGE["plain"], F32, lambda pair: pair[1:])


def half_precision() -> None:
    """The tiles and dtypes a GPU would run."""
    for name in ("left_padding", "window", "chunk", "empty_rows_sinks", "wide_values"):
        attention(name, ATTENTION[name], torch.bfloat16)
    attention("default tiles", LONG, torch.bfloat16)
    accumulate("everything", torch.bfloat16)
    columns(torch.bfloat16)
    strided(torch.bfloat16)
    tensor_start(torch.bfloat16)
    for name in ("left_padding", "far_window", "one_query", "equal_heads"):
        gated(name, GATED[name], torch.bfloat16)
    gated("odd_group", GATED["odd_group"], torch.float16)
    for name in ("plain", "no_norm", "several_tiles"):
        bridge(name, BRIDGE[name], torch.bfloat16)
    for name in ("everything", "odd_group"):
        attention(name, ATTENTION[name], torch.float16)
    bridge("plain", BRIDGE["plain"], torch.float16)


if __name__ == "__main__":
    main()
