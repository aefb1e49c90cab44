"""Stages of the GPU run that measure: ceilings, attention, TurboConn training, decoding, fixed point, a training run.

Every stage compiles beside the others and measures alone (see :mod:`stage`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import time
from collections.abc import Callable

import torch
from floors import floor
from naive import NaiveGroups
from stage import Stage, summary
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import TOKENS, NaiveStep, OurTokens, StockTokens, TrainingStep

import depthpass as dp

OFFICIAL = [(s, d) for s in range(0, 16, 2) for d in range(0, s, 2) if s - d > 5]
"""The 15 bridges of the official Llama-3.2-1B setting."""


def llama(stage: Stage, blocks: int | None = None) -> LlamaForCausalLM:
    """Random weights in the shape of Llama-3.2-1B; a tiny model in a rehearsal."""
    real = {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": blocks or 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "rope_theta": 500000.0,
    }
    tiny = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    with torch.device(stage.device.torch):
        return LlamaForCausalLM(LlamaConfig(**stage.device.pick(real, tiny))).to(torch.bfloat16)


def bridges_of(stage: Stage) -> list[tuple[int, int]]:
    return stage.device.pick(OFFICIAL, [(2, 0)])


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


def measured_ceilings(stage: Stage) -> tuple[float, float]:
    """FLOP/s of a large bf16 product and bytes/s of one-row products, as the first stage found them."""
    import json

    path = stage.out / "environment.json"
    rows = {r["label"]: r for r in json.loads(path.read_text())["results"]} if path.exists() else {}
    flops = rows.get("product torch.bfloat16", {}).get("tflop_per_s", math.nan) * 1e12
    return flops, rows.get("one-row products", {}).get("gb_per_s", math.nan) * 1e9


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


def repeated_seconds(stage: Stage, run, calls: int = 10) -> float:
    """Seconds per call with the host out of the way where it can be: as a graph, else as many calls in a row."""
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


# (e) Training.


def training(stage: Stage) -> None:
    """TurboConn training step at the 1B shape: stock compiled, the naive loop and every level, with floor and peak memory.

    Five processes, so that compilations overlap: stock, cudagraph, inductor, scheduled, naive.
    """
    device = stage.device
    batch, tokens = device.pick((32, 155), (2, 9))
    groups, bridges = device.pick((8, 4, 16), (3,)), bridges_of(stage)
    stock = llama(stage).train()
    ids = torch.randint(3, stock.config.vocab_size, (batch, tokens), device=device.torch)
    measure = Training(stage, stock, batch, tokens)

    def turbo(g: int, level: str):
        return dp.transform(stock, dp.TurboConn(bridges=bridges, group=g), lowering=level)

    def naive(g: int):
        # On the parameters of a transformed model of its own.
        held = turbo(g, "eager").depth
        parts = [(s, d, *(held.get_submodule(f"turboconn.s{s}_d{d}.{side}") for side in ("down", "up"))) for s, d in bridges]
        return NaiveStep(NaiveGroups(stock, parts, g), ids)

    plan: list[tuple[str, Callable]] = [
        ("stock", lambda: TrainingStep(stock, ids)),
        ("stock compiled", lambda: TrainingStep(torch.compile(stock, backend=device.pick("inductor", "aot_eager")), ids)),
    ]
    by_level = {
        level: [(f"g={g} {level}", lambda g=g, level=level: TrainingStep(turbo(g, level), ids)) for g in groups]
        for level in ("inductor", "scheduled")
    }
    naive_runs = [(f"g={g} naive", lambda g=g: naive(g)) for g in groups]
    if stage.shard == 1:
        # Recorded is what has been compiled; the recording itself has the device alone.
        for g in groups if device.real else ():
            measure.prepare(f"g={g} compile", lambda g=g: TrainingStep(turbo(g, "inductor"), ids))
        kept, measure.runs = measure.runs, {}  # compiled code lives as long as what was compiled
    for label, make in [plan, [], by_level["inductor"], by_level["scheduled"], naive_runs][stage.shard]:
        measure.prepare(label, make)
    with stage.alone():
        measure.all()
        # A graph keeps the memory of its activations: one at a time.
        for g in groups if device.real and stage.shard == 1 else ():
            measure.prepare(f"g={g} cudagraph", lambda g=g: TrainingStep(turbo(g, "cudagraph"), ids), locked=True)
            measure.all()
            kept.pop(f"g={g} compile", None)


class Training:
    """Training steps that have been compiled and wait to be measured."""

    def __init__(self, stage: Stage, stock, batch: int, tokens: int):
        self.stage, self.stock, self.batch, self.tokens = stage, stock, batch, tokens
        self.runs: dict[str, Callable[[], None]] = {}

    def prepare(self, label: str, make, locked: bool = False) -> None:
        """Make a step and run it once, beside other stages; ``locked``: this stage is alone already."""
        if self.is_broken(label):
            return
        with self.stage.attempt(f"{label} prepare"), contextlib.nullcontext() if locked else self.stage.beside_others():
            start = time.perf_counter()
            run = make()
            run()
            self.stage.device.sync()
            self.runs[label] = run
            self.stage.record(f"{label} prepare", first_call_s=time.perf_counter() - start)
        self.stock.zero_grad(set_to_none=True)

    def is_broken(self, label: str) -> bool:
        """Whether the check of the label's level has failed by now; a timing of a wrong result is worth nothing."""
        level = label.split()[-1]
        broken = {b.split()[0] for b in self.stage.broken("levels") if "turboconn" in b}
        if level in broken:
            self.stage.record(label, skipped=f"the check of {level} failed")
        return level in broken

    def all(self) -> None:
        """Measure what is prepared and drop it."""
        device = self.stage.device
        while self.runs:
            label = next(iter(self.runs))
            run = self.runs.pop(label)
            if self.is_broken(label):
                continue
            with self.stage.attempt(label):
                slow = "naive" in label
                device.times(run, 1 if slow else 2)
                times: dict = summary(device.times(run, 2 if slow else 5))
                if label.startswith("g="):
                    times["floor"] = self.floor(int(label.split()[0][2:]))
                if (peak := device.peak(run)) is not None:
                    times["peak_gib"] = peak
                self.stage.record(label, **times)
            del run
            self.stock.zero_grad(set_to_none=True)
            device.free()

    def floor(self, group: int) -> float:
        """Least ratio to the stock step, from the two ceilings."""
        flops, rate = measured_ceilings(self.stage)
        layers = self.stock.model.layers
        rows = [self.batch * min(group, self.tokens - a) for a in range(0, self.tokens, group)]
        program = dp.transform(self.stock, dp.TurboConn(bridges=bridges_of(self.stage), group=group))
        return floor(flops, rate, self.batch * self.tokens, rows, len(layers), program.depth_schedule.serial_visits,
                     sum(p.numel() for p in layers[0].parameters()), self.stock.lm_head.weight.numel(), itemsize=2)


# (f) Decoding.


def decode(stage: Stage) -> None:
    """One decoded token at several batch sizes: stock, TurboConn, a loop, PLT and MoR, beside reading the weights once."""
    device = stage.device
    stock = llama(stage).eval()
    first, last = device.pick((4, 12), (1, 2))
    systems = {
        "turboconn": dp.TurboConn(bridges=bridges_of(stage), group=4),
        "loop 3": dp.Loop(start=first, end=last, times=3),
        "plt-2": dp.ParallelLoop(loops=2, window=64),
        "mor-2": dp.MixtureOfRecursions(recursions=2, start=first, end=last, router="token"),
    }
    # Routes depend on data: their tokens are not compiled.
    systems["identity"] = dp.Identity()
    level = device.pick("cudagraph", "inductor")
    # Routes depend on data: their tokens are not compiled.
    levels = {name: "auto" if "mor" in name else level for name in systems}
    weights = sum(p.nbytes for p in stock.parameters())
    _, rate = measured_ceilings(stage)
    runs: dict[tuple[int, str], Callable[[], None]] = {}

    def make(label: str, ids):
        if label in systems:
            return OurTokens(dp.transform(stock, systems[label], lowering=levels[label]).eval(), ids)
        return StockTokens(stock, ids, compiled=device.pick("reduce-overhead", "default") if "compiled" in label else False)

    for label in stage.mine(["stock compiled", "turboconn", "loop 3", "plt-2", "stock eager", "identity", "mor-2"]):
        for batch in device.pick((1, 8, 64), (1,)):
            ids = torch.randint(3, stock.config.vocab_size, (batch, device.pick(128, 6)), device=device.torch)
            with stage.attempt(f"batch {batch} {label} prepare"), stage.beside_others():
                start = time.perf_counter()
                run = make(label, ids)
                run()
                device.sync()
                runs[batch, label] = run
                stage.record(f"batch {batch} {label} prepare", first_call_s=time.perf_counter() - start)
    with stage.alone():
        for (batch, label), run in runs.items():
            with stage.attempt(f"batch {batch} {label}"):
                device.times(run, 1)
                times = {k: v / TOKENS for k, v in summary(device.times(run, 3)).items()}
                stage.record(f"batch {batch} {label}", **times, level=levels.get(label, "stock"),
                             reading_weights_ms=1e3 * weights / rate)


# (g) The fixed-point schedule.


def fixed_point(stage: Stage) -> None:
    """Prefill of one long row: the token loop against sweeps, for a weak bridge, with true errors."""
    device = stage.device
    tokens = device.pick(2048, 24)
    stock = llama(stage).eval()
    last = device.pick(14, 2)
    ids = torch.randint(3, stock.config.vocab_size, (1, tokens), device=device.torch)
    spec = dp.TurboConn(bridges=[(last, 0)], group=4, rank=32)
    models = {
        "token loop": dp.transform(stock, spec), "token loop inductor": dp.transform(stock, spec, lowering="inductor"),
        "sweeps tol 1e-2": dp.transform(stock, spec, schedule="fixed_point", tol=1e-2),
        "window 32 tol 1e-2": dp.transform(stock, spec, schedule="fixed_point", tol=1e-2, window=32),
    }
    torch.manual_seed(2)
    values = {k: torch.randn_like(v) * (0.02 if ".up." in k else v.shape[-1] ** -0.5) for k, v in
              models["token loop"].depth.state_dict().items()}
    runs, right = {}, None
    for label, model in {"stock": stock, **models}.items():
        if model is not stock:
            model.depth.load_state_dict(values)
        with stage.attempt(f"{label} prepare"), stage.beside_others(), torch.no_grad():
            out = model(input_ids=ids, use_cache=False, logits_to_keep=64)
            if label == "token loop":
                right = out.logits.double()
            more = {}
            if right is not None:
                more["true_error"] = ((out.logits.double() - right).norm() / right.norm()).item()
            if getattr(out, "sweeps", None):
                more["sweeps"] = str(out.sweeps[0])
            stage.record(f"{label} prepare", **more)
            runs[label] = lambda model=model: model(input_ids=ids, use_cache=False, logits_to_keep=64)
    base = None
    with stage.alone(), torch.no_grad():
        for label, run in runs.items():
            with stage.attempt(label):
                times = summary(device.times(run, 2))
                base = times["ms"] if label == "token loop" else base
                stage.record(label, **times, **({} if base is None else {"of_token_loop": times["ms"] / base}))


# (h) Training for real.


def parity(stage: Stage) -> None:
    """Running parity at the 1B shape for 100 steps: the loss of stock and TurboConn, seconds per step."""
    device = stage.device
    steps, batch, tokens = device.pick((100, 32, 64), (2, 2, 8))
    stock = llama(stage)
    start = {k: v.clone() for k, v in stock.state_dict().items()}
    level = device.pick("cudagraph", "inductor")
    for label, spec in (("stock", None), (f"turboconn g=4 {level}", dp.TurboConn(bridges=bridges_of(stage), group=4))):
        with stage.attempt(label):
            stock.load_state_dict(start)
            model = (stock if spec is None else dp.transform(stock, spec, lowering=level)).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.real)
            generator = torch.Generator().manual_seed(3)
            losses = []

            def step(model=model, optimizer=optimizer, generator=generator, losses=losses):
                bits = torch.randint(0, 2, (batch, tokens), generator=generator)
                ids, labels = (bits + 3).to(device.torch), (bits.cumsum(1) % 2 + 5).to(device.torch)
                logits = model(input_ids=ids, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())

            with stage.beside_others():
                step()
                device.sync()
            with stage.alone():
                seconds = device.times(lambda step=step: [step() for _ in range(steps - 1)], 1)[0]
            stage.record(label, ms_per_step=1e3 * seconds / (steps - 1), first_loss=losses[0].item(),
                         last_loss=torch.stack(losses[-10:]).mean().item())
            del model, optimizer, step


# Where the time goes.


def profile(stage: Stage) -> None:
    """Kernels of one training step and of decoded tokens by their time on the device: what there is left to mend."""
    device = stage.device
    batch, tokens = device.pick((32, 155), (2, 9))
    stock, ids, runs = llama(stage).train(), None, {}
    ids = torch.randint(3, stock.config.vocab_size, (batch, tokens), device=device.torch)
    spec = dp.TurboConn(bridges=bridges_of(stage), group=device.pick(8, 3))
    level = device.pick("cudagraph", "scheduled")
    for label, make in {
        level: lambda: TrainingStep(dp.transform(stock, spec, lowering=level), ids),
        "stock compiled": lambda: TrainingStep(torch.compile(stock, backend=device.pick("inductor", "aot_eager")), ids),
        "decode inductor": lambda: OurTokens(dp.transform(stock, spec, lowering="inductor").eval(), ids[:1]),
    }.items():
        with stage.attempt(f"{label} prepare"), stage.beside_others():
            runs[label] = make()
            for _ in range(2):
                runs[label]()
            device.sync()
    with stage.alone():
        for label, run in runs.items():
            with stage.attempt(label):
                kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device.real else [])]
                wall = device.times(run, 1)[0]
                with torch.profiler.profile(activities=kinds[-1:]) as profiler:
                    run()
                    device.sync()
                kernels = sorted(
                    ((e.self_device_time_total if device.real else e.self_cpu_time_total, e.count, e.key)
                     for e in profiler.key_averages()), reverse=True,
                )
                stage.record(label, wall_ms=1e3 * wall, device_ms=sum(k[0] for k in kernels) / 1e3,
                             launches=sum(k[1] for k in kernels),
                             kernels=[[round(us / 1e3, 3), count, name[:110]] for us, count, name in kernels[:60]])
