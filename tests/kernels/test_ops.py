"""The registered ops: schemas, tracing, choice of implementation, and what importing the package costs."""

import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any

import depthpass_kernels
import pytest
import torch
from depthpass_kernels import KernelUnavailableError, bridge_in, ops, select, set_auto, slot_attention
from depthpass_kernels.bridge import api as bridge_api
from depthpass_kernels.slot_attention import api as attention_api
from kernel_cases import ATTENTION, BRIDGE, gradients, leaves, rms_error

ROOT = Path(__file__).parents[2]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# With gradients that last check would pull on lse and rstd, which refuse; the compile test below covers it.
GRAD_CHECKS = CHECKS[:3]


def attention_arguments(name: str, requires_grad: bool) -> tuple[Any, ...]:
    operands, options, _ = ATTENTION[name].build(torch.float32)
    operands = {n: x.requires_grad_(requires_grad) for n, x in operands.items()}
    q, k, v, sinks = (operands.get(n) for n in ("q", "k", "v", "sinks"))
    tensors = (q, k, v, options.get("valid"), options["row_start"], sinks, None)
    return *tensors, options["q_start"], 0.2, options["window"], options["chunk"], options["softcap"], "naive"


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_attention_op_is_well_formed(name: str) -> None:
    torch.library.opcheck(ops.slot_attention, attention_arguments(name, True), test_utils=GRAD_CHECKS)
    arguments = attention_arguments(name, False)
    torch.library.opcheck(ops.slot_attention, arguments, test_utils=CHECKS)
    out, lse = ops.slot_attention(*arguments)
    grads = (torch.randn_like(out), out, lse)
    torch.library.opcheck(ops.slot_attention_backward, (*grads, *arguments), test_utils=CHECKS)
    into = torch.zeros_like(arguments[1]), torch.zeros_like(arguments[2])
    torch.library.opcheck(
        ops.slot_attention_backward_accumulate, (*grads, *into, *arguments), test_utils=CHECKS
    )


@pytest.mark.parametrize("name", ["plain", "no_norm"])
def test_bridge_op_is_well_formed(name: str) -> None:
    operands, options, weights = BRIDGE[name].build(torch.float32)
    operands = {n: x.requires_grad_() for n, x in operands.items()}
    x, c, w, b, n = (operands.get(k) for k in ("x", "c", "up_weight", "up_bias", "norm_weight"))
    arguments = (x, c, w, b, options["present"], n, 0.3, 1e-5, 0.0, "naive")
    torch.library.opcheck(ops.bridge_in, arguments, test_utils=GRAD_CHECKS)
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(ops.bridge_in, plain, test_utils=CHECKS)
    y, _, rstd = ops.bridge_in(*plain)
    grads = (weights[0], weights[1] if name == "plain" else None)
    torch.library.opcheck(
        ops.bridge_in_backward, (*grads, y, rstd, *plain, [True, True, True, False, True]), test_utils=CHECKS
    )


def test_compiles_as_one_graph_with_gradients() -> None:
    operands, options, grad = ATTENTION["everything"].build(torch.float32)
    bridge, bridge_options, _ = BRIDGE["plain"].build(torch.float32)

    def step(operands: dict[str, Any], bridge: dict[str, Any]) -> tuple[Any, ...]:
        y, z = bridge_in(**bridge, **bridge_options)
        return slot_attention(**operands, **options) * 2, y + z

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = leaves(operands), leaves(bridge)
    c, d = leaves(operands), leaves(bridge)
    want, got = step(a, b), compiled(c, d)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for attended, mixed in (want, got):
        ((attended * grad).sum() + mixed.sum()).backward()
    for got_leaf, want_leaf in zip([*c.values(), *d.values()], [*a.values(), *b.values()], strict=True):
        assert rms_error(got_leaf.grad, want_leaf.grad) < 1e-6


def test_moving_start_keeps_one_graph() -> None:
    operands, options, _ = ATTENTION["left_padding"].build(torch.float32)
    compiled = torch.compile(slot_attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for start in (33, 20, 0):
            got = compiled(**operands, **options | {"q_start": torch.tensor(start)})
            assert rms_error(got, slot_attention(**operands, **options | {"q_start": start})) < 1e-6


def test_exports_with_symbolic_sizes() -> None:
    class Step(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor
        ) -> torch.Tensor:
            return slot_attention(q, k, v, q_start=k.shape[2] - q.shape[2], valid=valid, window=7)

    def inputs(batch: int, length: int, keys: int) -> tuple[torch.Tensor, ...]:
        valid = torch.rand(batch, keys) > 0.2
        return torch.randn(batch, 4, length, 8), *torch.randn(2, batch, 2, keys, 8).unbind(), valid

    b, c, n = torch.export.Dim("b", min=1), torch.export.Dim("c", min=1), torch.export.Dim("n", min=2)
    shapes = ({0: b, 2: c}, {0: b, 2: n}, {0: b, 2: n}, {0: b, 1: n})
    program = torch.export.export(Step(), inputs(2, 3, 11), dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("depthpass_kernels.slot_attention.default") == 1
    for size in ((1, 1, 1 + 1), (3, 5, 17)):
        arguments = inputs(*size)
        assert torch.equal(program.module()(*arguments), Step()(*arguments))


def test_second_derivatives_are_refused() -> None:
    operands, options, grad = ATTENTION["causal"].build(torch.float64)
    inputs = leaves(operands)
    out = slot_attention(**inputs, **options)
    (dq,) = torch.autograd.grad(out, inputs["q"], grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


def test_lse_carries_no_gradient() -> None:
    with pytest.raises(NotImplementedError, match="lse carries no gradient"):
        ops.slot_attention(*attention_arguments("causal", True))[1].sum().backward()


def test_asking_for_triton_without_a_gpu_raises() -> None:
    x = torch.zeros(1, 1, 1, 16)
    reason = "not cuda" if select.triton_installed() else "not installed"
    with pytest.raises(KernelUnavailableError, match=f"slot_attention: implementation='triton'.*{reason}"):
        slot_attention(x, x, x, q_start=0, implementation="triton")
    with pytest.raises(KernelUnavailableError, match=f"bridge_in: implementation='triton'.*{reason}"):
        bridge_in(x, x, torch.zeros(16, 16), implementation="triton")


@pytest.mark.skipif(
    not select.triton_installed(), reason="the other reasons come after 'triton is not installed'"
)
def test_triton_names_what_it_cannot_take() -> None:
    assert "float64" in str(select.obstacle(torch.zeros(1, dtype=torch.float64)))
    wide = torch.zeros(1, 1, 1, 320)
    with pytest.raises(KernelUnavailableError, match="head dimension 320 is above 256"):
        slot_attention(wide, wide, wide, q_start=0, implementation="triton")
    with pytest.raises(KernelUnavailableError, match="hidden size 32768 is above 16384"):
        bridge_in(
            torch.zeros(1, 32768), torch.zeros(1, 2), torch.zeros(32768, 2), norm_weight=torch.ones(32768),
            implementation="triton",
        )  # fmt: skip


class OnCuda:
    """Stands for a CUDA tensor: all that `select` looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_auto_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    half, double = OnCuda(torch.bfloat16), OnCuda(torch.float64)
    assert select.resolve("slot_attention", "auto", half) == "triton"
    assert select.resolve("slot_attention", "auto", double) == "naive"
    assert select.resolve("slot_attention", "auto", half, "too wide") == "naive"
    assert select.resolve("slot_attention", "naive", half) == "naive"
    assert select.resolve("slot_attention", "auto", torch.zeros(1)) == "naive"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert select.resolve("slot_attention", "auto", half) == "naive"
    with pytest.raises(KernelUnavailableError, match=r"capability \(7, 5\) is below \(8, 0\)"):
        select.resolve("slot_attention", "triton", half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(select, "triton_installed", lambda: False)
    assert select.resolve("slot_attention", "auto", half) == "naive"


def test_auto_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    assert set_auto("slot_attention", "naive") == "measured"
    assert select.resolve("slot_attention", "auto", OnCuda(torch.bfloat16)) == "naive"
    assert select.resolve("slot_attention", "triton", OnCuda(torch.bfloat16)) == "triton"
    assert set_auto("slot_attention", "measured") == "naive"
    with pytest.raises(ValueError, match="op: expected one of"):
        set_auto("attention", "naive")
    with pytest.raises(ValueError, match="implementation: expected 'measured', 'naive' or 'triton'"):
        set_auto("slot_attention", "auto")


def test_import_needs_torch_alone() -> None:
    probe = """
import sys, torch
before = set(sys.modules)
import depthpass_kernels
print([m for m in ("triton", "transformers", "depthpass") if m in set(sys.modules) - before])
"""
    command, env = [sys.executable, "-c", probe], {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names() -> None:
    assert depthpass_kernels.__all__ == sorted(depthpass_kernels.__all__)
    assert all(getattr(depthpass_kernels, name).__doc__ for name in depthpass_kernels.__all__)


@pytest.mark.parametrize("module", [attention_api, bridge_api, select], ids=lambda m: m.__name__)
def test_examples_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_empty_chunk() -> None:
    q, k = torch.zeros(2, 4, 0, 8, requires_grad=True), torch.zeros(2, 2, 3, 8, requires_grad=True)
    out = slot_attention(q, k, k, q_start=3)
    assert out.shape == (2, 4, 0, 8)
    grads = gradients(out, {"q": q, "k": k}, torch.zeros_like(out))
    assert grads["dq"].shape == q.shape and not grads["dk"].any()
    x = torch.zeros(2, 0, 8, requires_grad=True)
    y, z = bridge_in(x, torch.zeros(2, 0, 3), torch.zeros(8, 3), torch.zeros(8), norm_weight=torch.ones(8))
    (y.sum() + z.sum()).backward()
    assert y.shape == z.shape == x.grad.shape
