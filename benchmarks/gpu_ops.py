"""Stages of the GPU run that time ops without a model: ceilings of the machine, attention of a chunk.

They import no transformers, which takes longer than a rehearsal of them. Every stage compiles beside the others and measures
alone (see :mod:`stage`).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import torch
from stage import Stage
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as sdpa

# (a) The machine.


def environment(stage: Stage) -> None:
    """Versions and ceilings: copy, products in three precisions, one-row products, the rows of a chunk, launches."""
    from importlib.metadata import PackageNotFoundError, version

    device = stage.device

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "-"

    stage.record("versions", python=platform.python_version(), **{n: of(n) for n in ("torch", "triton", "transformers", "peft")})
    if device.real:
        properties = torch.cuda.get_device_properties(0)
        stage.record("device", name=properties.name, memory_gib=properties.total_memory / 2**30,
                     processors=properties.multi_processor_count, capability=str(torch.cuda.get_device_capability()),
                     cuda=torch.version.cuda)
    with stage.alone(), torch.no_grad():
        source = torch.randn(device.pick(2**30, 2**20), device=device.torch, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        seconds = steady(stage, lambda target=target, source=source: target.copy_(source), 10)
        stage.record("copy", gb_per_s=2 * source.nbytes / seconds / 1e9)
        del source, target
        device.free()
        for dtype in (torch.bfloat16, torch.float32):
            d = device.pick(8192, 128)
            a, b = (torch.randn(d, d, device=device.torch, dtype=dtype) for _ in range(2))
            seconds = steady(stage, lambda a=a, b=b: a @ b, 5)
            stage.record(f"product {dtype}", side=d, tflop_per_s=2 * d**3 / seconds / 1e12)
        d, copies = device.pick(8192, 64), 24
        weights = [torch.randn(d, d, device=device.torch, dtype=torch.bfloat16) for _ in range(copies)]
        row = torch.randn(1, d, device=device.torch, dtype=torch.bfloat16)
        seconds = steady(stage, lambda weights=weights: [linear(row, w) for w in weights], 3) / copies
        stage.record("one-row products", gb_per_s=weights[0].nbytes / seconds / 1e9)
        del weights
        # What a chunk pays: the four shapes of a block at its rows; weights larger together than the cache.
        for name, (n, k) in device.pick(
            {"qkv": (3072, 2048), "o": (2048, 2048), "gate+up": (16384, 2048), "down": (2048, 8192)}, {"o": (32, 32)}
        ).items():
            ws = [torch.randn(n, k, device=device.torch, dtype=torch.bfloat16) for _ in range(device.pick(12, 2))]
            times = {}
            for rows in device.pick((1, 8, 32, 64, 128, 256, 512, 4960), (1, 8)):
                x = torch.randn(rows, k, device=device.torch, dtype=torch.bfloat16)
                times[rows] = round(1e6 * graphed_seconds(stage, lambda x=x, ws=ws: [linear(x, w) for w in ws]) / len(ws), 2)
            stage.record(f"rows, {name}", microseconds=times)
        small = torch.randn(16, 16, device=device.torch)
        eager = steady(stage, lambda: [small.mul_(1.0) for _ in range(1000)], 3) / 1000
        replay = graphed_seconds(stage, lambda: [small.mul_(1.0) for _ in range(1000)]) / 1000
        stage.record("one small kernel", eager_us=1e6 * eager, in_graph_us=1e6 * replay)


def steady(stage: Stage, run, repeat: int) -> float:
    """Median seconds after one warm-up."""
    run()
    times = sorted(stage.device.times(run, repeat))
    return times[len(times) // 2]


def graphed_seconds(stage: Stage, run, repeat: int = 5) -> float:
    """Median seconds of a run replayed as a CUDA graph, so that launches do not count; plain seconds in a rehearsal."""
    if not stage.device.real:
        return steady(stage, run, 2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return steady(stage, graph.replay, repeat)


# (d) Attention of a chunk.

FLEX = {(32, 8, 160), (8, 64, 2048), (32, 155, 155)}
"""Where FlexAttention is measured too: it compiles some ten seconds for every shape."""


def attention(stage: Stage) -> None:
    """One chunk's attention by every implementation, forward alone and with its backward; launches do not count.

    The rows are what ``benchmarks/attention_table.py`` writes into the table that ``implementation="auto"`` reads.
    """
    from depthpass_kernels import slot_attention_backward, slot_attention_forward
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = stage.device
    shapes = device.pick(
        [(32, 4, 20), (32, 4, 160), (32, 8, 160), (32, 16, 160), (32, 155, 155), (8, 4, 160), (8, 4, 2048), (8, 64, 2048),
         (1, 4, 2048), (1, 1, 128), (1, 1, 2048), (8, 1, 2048), (64, 1, 512), (1, 1, 16384)],
        [(2, 3, 12)],
    )
    heads, kv, width = device.pick((32, 8, 64), (2, 1, 16))
    torch._dynamo.config.recompile_limit = 64
    rows: list[tuple[dict, dict[str, Callable[[], object]]]] = []
    for batch, count, keys in shapes:
        torch.manual_seed(0)
        q = torch.randn(batch, count, heads, width, device=device.torch, dtype=torch.bfloat16).transpose(1, 2)
        k, v = (torch.randn(batch, kv, keys, width, device=device.torch, dtype=torch.bfloat16) for _ in range(2))
        grad = torch.randn_like(q)
        start = keys - count
        seen = torch.ones(count, keys, device=device.torch, dtype=torch.bool).tril(start)[None, None]
        gk, gv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))

        def slot(name, q=q, k=k, v=v, start=start):
            return lambda: slot_attention_forward(q, k, v, q_start=start, implementation=name)

        def slot_both(name, q=q, k=k, v=v, start=start, grad=grad, into=(gk, gv)):
            def run():
                out, lse = slot_attention_forward(q, k, v, q_start=start, implementation=name)
                slot_attention_backward(grad, q, k, v, out, lse, q_start=start, into=into, implementation=name)

            return run

        def by_autograd(attend, q=q, k=k, v=v, grad=grad):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]

            def run():
                torch.autograd.grad(attend(*leaves), leaves, grad)

            return run

        def plain(q, k, v, seen=seen):
            return sdpa(q, k, v, attn_mask=None if q.shape[2] == 1 else seen, enable_gqa=True)

        forward = {"naive": slot("naive"), "sdpa": lambda q=q, k=k, v=v, plain=plain: plain(q, k, v)}
        both = {"naive": slot_both("naive"), "sdpa": by_autograd(plain)}
        if device.real or _interpreter():
            forward["triton"], both["triton"] = slot("triton"), slot_both("triton")
        if device.real and (batch, count, keys) in FLEX:
            offset = torch.tensor(start, device=device.torch)
            mask = create_block_mask(
                lambda b, h, i, j, offset=offset: j <= i + offset, None, None, count, keys, device=device.torch
            )

            compiled = torch.compile(flex_attention, dynamic=False)

            def flex(q, k, v, mask=mask, compiled=compiled):
                return compiled(q, k, v, block_mask=mask, enable_gqa=True)

            forward["flex"], both["flex"] = functools.partial(flex, q, k, v), by_autograd(flex)
        if device.real:
            forward["varlen"] = varlen(q, k, v)
        at = {"op": "slot_attention", "batch": batch, "queries": count, "keys": keys, "heads": heads, "kv": kv, "width": width}
        rows.append(({**at, "what": "forward"}, forward))
        if count > 1:
            rows.append(({**at, "what": "forward and backward"}, both))
    rows += bridge_runs(stage) + gated_runs(stage)
    failed: dict[tuple[int, str], str] = {}

    def each(i: int, name: str, run, do) -> None:
        try:
            with torch.no_grad() if rows[i][0]["what"] == "forward" else torch.enable_grad():
                do(run)
            device.sync()
        except Exception as error:
            failed[i, name] = f"{type(error).__name__}: {str(error)[:200]}"
            device.sync()

    for i, (_, runs) in enumerate(rows):
        with stage.beside_others():
            for name, run in runs.items():
                each(i, name, run, lambda run: run())
    with stage.alone():
        for i, (setting, runs) in enumerate(rows):
            times: dict[str, float] = {}
            for name, run in runs.items():
                if (i, name) not in failed:
                    each(i, name, run, lambda run, name=name, times=times: times.update(
                        {name: 1e6 * repeated_seconds(stage, run)}
                    ))
            lost = {name: why for (j, name), why in failed.items() if j == i}
            stage.record(" ".join(f"{k}={v}" for k, v in setting.items()), **setting,
                         microseconds={k: round(t, 1) for k, t in times.items()},
                         fastest=min(times, key=times.__getitem__) if times else None, **({"failed": lost} if lost else {}))


Rows = list[tuple[dict, dict[str, Callable[[], object]]]]


def implementations(stage: Stage) -> tuple[str, ...]:
    return ("naive", "triton") if stage.device.real or _interpreter() else ("naive",)


def bridge_runs(stage: Stage) -> Rows:
    """Bridges landing on a block, with and without the norm behind them."""
    from depthpass_kernels import bridge_in

    runs: Rows = []
    shapes = stage.device.pick(((128, 2048, 120), (256, 2048, 600), (4960, 2048, 120), (1, 2048, 120)), ((3, 24, 8),))
    for rows, width, rank in shapes:
        x, c, up, norm = (torch.randn(shape, device=stage.device.torch, dtype=torch.bfloat16)
                          for shape in ((rows, width), (rows, rank), (width, rank), (width,)))
        for what, more in (("forward", {}), ("forward and norm", {"norm_weight": norm})):
            at = {"op": "bridge_in", "batch": 1, "queries": rows, "keys": rank, "width": width, "what": what}
            runs.append((at, {
                name: functools.partial(bridge_in, x, c, up, implementation=name, **more) for name in implementations(stage)
            }))
    return runs


def gated_runs(stage: Stage) -> Rows:
    """Attention of later loops of PLT: shared keys and a window of own ones."""
    from depthpass_kernels import gated_attention

    runs: Rows = []
    shapes = stage.device.pick(((1, 1, 2048), (8, 1, 2048), (1, 2048, 2048), (32, 155, 155)), ((1, 3, 7),))
    heads, kv, width = stage.device.pick((32, 8, 64), (2, 1, 16))
    for batch, count, keys in shapes:
        own = min(keys, count + 63)
        q, k, v, near_k, near_v = (
            torch.randn(shape, device=stage.device.torch, dtype=torch.bfloat16) for shape in
            ((batch, heads, count, width), *[(batch, kv, keys, width)] * 2, *[(batch, kv, own, width)] * 2)
        )
        score = torch.randn(batch, count, heads, device=stage.device.torch, dtype=torch.bfloat16)
        at = {"op": "gated_attention", "batch": batch, "queries": count, "keys": keys, "width": width, "what": "forward"}
        runs.append((at, {
            name: functools.partial(gated_attention, q, k, v, near_k, near_v, score, window=min(64, own), q_start=keys - count,
                                    implementation=name)
            for name in implementations(stage)
        }))
    return runs


def repeated_seconds(stage: Stage, run) -> float:
    """Seconds per call with the host out of the way where it can be: as a graph, else as many calls in a row."""
    calls = stage.device.pick(10, 1)
    if stage.device.real:
        try:
            return graphed_seconds(stage, lambda: [run() for _ in range(calls)], 3) / calls
        except Exception:
            torch.cuda.synchronize()
    return steady(stage, lambda: [run() for _ in range(calls)], 3) / calls


def varlen(q, k, v):
    """torch's variable-length attention over the same rows, laid out as it wants them."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, count, width = q.shape
    keys, groups = k.shape[2], heads // k.shape[1]
    flat = q.transpose(1, 2).reshape(batch * count, heads, width)
    fk, fv = (t.transpose(1, 2).repeat_interleave(groups, 2).reshape(batch * keys, heads, width).contiguous() for t in (k, v))
    at_q, at_k = (torch.arange(batch + 1, device=q.device, dtype=torch.int32) * n for n in (count, keys))
    # The causal mask of varlen attention is aligned to the last query, as a chunk behind its keys needs.
    return lambda: varlen_attn(flat, fk, fv, at_q, at_k, count, keys, window_size=(-1, 0 if count > 1 else -1))


def _interpreter() -> bool:
    from depthpass_kernels.select import interpreted, triton_installed

    return triton_installed() and interpreted()
