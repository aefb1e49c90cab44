"""Stages of the GPU run that measure models: TurboConn training, decoding, fixed point, a training run.

Every stage compiles beside the others and measures alone (see :mod:`stage`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from floors import floor
from naive import NaiveGroups
from stage import Stage, summary
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


def measured_ceilings(stage: Stage) -> tuple[float, float]:
    """FLOP/s of a large bf16 product and bytes/s of one-row products, as the first stage found them."""
    import json

    path = stage.out / "environment.json"
    rows = {r["label"]: r for r in json.loads(path.read_text())["results"]} if path.exists() else {}
    flops = rows.get("product torch.bfloat16", {}).get("tflop_per_s", math.nan) * 1e12
    return flops, rows.get("one-row products", {}).get("gb_per_s", math.nan) * 1e9


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
