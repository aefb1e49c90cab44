"""Everything that needs a GPU, in one run of a few minutes: correctness first, then timings.

    python benchmarks/gpu.py [--json out.json] [--plot out.png] [--quick]

1. Kernels against float64 on the CPU: slot attention (forward and backward) and the fused bridge, in bfloat16 and float32.
2. Rungs against the eager rung in float64 on the GPU: logits and every gradient.
3. Attention of one chunk by Triton, SDPA and FlexAttention.
4. TurboConn training step and forward: stock eager and compiled, naive, each rung, at several groups; a decoded token.

Stops at the first wrong number: a timing of a wrong result is worth nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from decode import token_times
from harness import Result, compare, machine, save
from torch.nn.functional import scaled_dot_product_attention as sdpa
from turboconn import configuration, measure

import depthpass as dp

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--quick", action="store_true", help="small models only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; torch.cuda.is_available() is False. Nothing was run.")
        return 1
    began = time.perf_counter()
    for check in (check_slot_attention, check_bridge, check_rungs):
        check()
        print(f"# {check.__name__}: passed, {time.perf_counter() - began:.0f} s", flush=True)
    size = {"width": 512, "blocks": 8, "bridges": "6-0,6-2"} if args.quick else {
        # Llama-3.2-1B's shape, but for the vocabulary; the 15 official bridges.
        "width": 2048, "blocks": 16,
        "bridges": ",".join(f"{s}-{d}" for s in range(0, 16, 2) for d in range(0, s, 2) if s - d > 5),
    }
    results = kernel_times()
    for batch, tokens, groups in ((8 if args.quick else 32, 155, "4,8,16"), (8, 155, "8")):
        results += measure(configuration(
            device="cuda", dtype="bfloat16", batch=batch, tokens=tokens, groups=groups, compiled=True, repeat=3,
            lowering="auto,inductor,cudagraph", **size,
        ))
        print(f"# batch {batch}: {time.perf_counter() - began:.0f} s", flush=True)
    results.append(token_times(size["width"], size["blocks"], size["bridges"], 4, 128, "bfloat16", "cuda", 5))
    save(results, args.json, args.plot)
    print(f"# {time.perf_counter() - began:.0f} s in all")
    return 0


def close(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = ((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm().clamp_min(1e-30)).item()
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative error {error:.1e} is above {tolerance:.0e}.")


def check_slot_attention() -> None:
    """The Triton kernel on its own against the plain reference in float64."""
    from depthpass_kernels import slot_attention, slot_attention_naive

    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"window": 24}, {"softcap": 20.0}, {"sinks": True}, {"padded": True}, {"chunk": 16}):
            torch.manual_seed(0)
            shapes = {"q": (3, 8, 5, 64), "k": (3, 2, 80, 64), "v": (3, 2, 80, 64)}
            exact = {n: torch.randn(s, dtype=torch.float64).to(dtype).double().requires_grad_() for n, s in shapes.items()}
            given = {"q_start": 60, **options}
            if given.pop("padded", False):
                given["valid"] = torch.arange(80)[None] >= torch.tensor([0, 7, 33])[:, None]
            if given.pop("sinks", False):
                exact["sinks"] = torch.randn(8, dtype=torch.float64).to(dtype).double().requires_grad_()
            want = slot_attention_naive(**exact, **given)
            weight = torch.randn(want.shape, dtype=torch.float64)
            (want * weight).sum().backward()
            there = {n: t.detach().to("cuda", dtype).requires_grad_() for n, t in exact.items()}
            moved = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
            got = slot_attention(**there, **moved, implementation="triton")
            (got * weight.to("cuda", dtype)).sum().backward()
            label = f"slot attention {dtype} {options}"
            close(label, got.detach(), want.detach(), TOLERANCE[dtype])
            for name, t in there.items():
                close(f"{label}, gradient of {name}", t.grad, exact[name].grad, 4 * TOLERANCE[dtype])


def check_bridge() -> None:
    """The fused bridge against plain float64 ops."""
    from depthpass_kernels import bridge_in

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, c, w, b, n = (torch.randn(s, dtype=torch.float64).to(dtype).double()
                         for s in ((3, 4, 256), (3, 4, 24), (256, 24), (256,), (256,)))
        total = x + 0.5 * (c @ w.t()) + b
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * n
        got = bridge_in(*(t.to("cuda", dtype) for t in (x, c, w, b)), gain=0.5, norm_weight=n.to("cuda", dtype), eps=1e-6,
                        implementation="triton")
        for name, a, e in zip(("sum", "norm"), got, (total, normed)):
            close(f"bridge {dtype} {name}", a, e, TOLERANCE[dtype])


def kernel_times(repeat: int = 5) -> list[Result]:
    """One chunk's attention, forward and backward, by Triton, SDPA and FlexAttention: which one ``auto`` should take."""
    from depthpass_kernels import slot_attention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled_flex, found = torch.compile(flex_attention), []
    for batch, chunk, keys in ((32, 4, 160), (32, 16, 160), (8, 4, 2048), (1, 1, 2048)):
        torch.manual_seed(0)
        shapes = {"q": (batch, 32, chunk, 64), "k": (batch, 8, keys, 64), "v": (batch, 8, keys, 64)}
        q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes.values())
        start = keys - chunk
        seen = torch.ones(chunk, keys, device="cuda", dtype=torch.bool).tril(start)
        offset = torch.tensor(start, device="cuda")
        # The offset is a captured tensor: a number would have no guard.
        mask = create_block_mask(lambda b, h, i, j, offset=offset: j <= i + offset, None, None, chunk, keys)

        def run(attend):
            def step():
                attend().float().square().sum().backward()

            return step

        runs = {
            "SDPA": run(lambda q=q, k=k, v=v, seen=seen: sdpa(q, k, v, attn_mask=seen, enable_gqa=True)),
            "FlexAttention": run(lambda q=q, k=k, v=v, mask=mask: compiled_flex(q, k, v, block_mask=mask, enable_gqa=True)),
            "Triton": run(lambda q=q, k=k, v=v, start=start: slot_attention(q, k, v, q_start=start, implementation="triton")),
        }
        setting = {"machine": machine("cuda"), "batch": batch, "chunk": chunk, "keys": keys, "heads": "32 over 8 of 64"}
        found.append(Result("slot attention, forward and backward", setting, "SDPA", compare(runs, repeat, "cuda")))
    return found


def check_rungs() -> None:
    """Every rung, in float64 and float32, against the eager one in float64: left-padded rows, overlapping bridges.

    In float32 attention and bridges run in the Triton kernels.
    """
    from turboconn import build

    exact = build(128, 4).double().cuda()
    spec = dp.TurboConn(bridges=[(3, 0), (2, 0), (2, 1)], group=3, rank=16)
    ids = torch.randint(3, 1000, (3, 20), device="cuda")
    mask = (torch.arange(20, device="cuda")[None] >= torch.tensor([0, 5, 9], device="cuda")[:, None]).long()
    values, found = None, {}
    for dtype, rung, limit in (
        (torch.float64, "eager", 0.0), (torch.float64, "scheduled", 1e-6), (torch.float64, "inductor", 1e-6),
        (torch.float64, "cudagraph", 1e-6), (torch.float32, "scheduled", 1e-4), (torch.float32, "inductor", 1e-4),
        (torch.float32, "cudagraph", 1e-4),
    ):
        turbo = dp.transform(copy.deepcopy(exact).to(dtype), spec, lowering=rung)
        if values is None:
            values = {k: 0.2 * torch.randn_like(v) for k, v in turbo.depth.state_dict().items()}
        turbo.depth.load_state_dict(values)
        for repeat in range(2):  # a graph that is replayed must not repeat its first result
            rows = ids.roll(repeat, 1)
            turbo.zero_grad()
            out = turbo(input_ids=rows, attention_mask=mask, labels=rows.masked_fill(mask == 0, -100), use_cache=False)
            out.loss.backward()
            grads = {n: p.grad.clone() for n, p in turbo.named_parameters() if p.grad is not None}
            if rung == "eager":
                found[repeat] = out.logits.detach(), grads
                continue
            label = f"{rung} {dtype}"
            assert turbo.depth_lowered[0].rung == rung, turbo.depth_lowered
            close(f"{label} logits", out.logits.detach()[mask.bool()], found[repeat][0][mask.bool()], limit)
            for name, g in grads.items():
                close(f"{label} gradient of {name}", g, found[repeat][1][name], 10 * limit)


if __name__ == "__main__":
    sys.exit(main())
