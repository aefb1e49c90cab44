"""Stages of the GPU run that check numbers: Triton kernels against float64, and every lowering level against the eager one."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
import sys
from contextlib import nullcontext

import torch
from stage import Stage, relative

import depthpass as dp

KERNEL_LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
OPTIONS = ("window", "chunk", "softcap", "sinks", "valid", "offset")


def attention_cases(rehearsal: bool) -> list[dict]:
    """Slot attention: all option combinations in bfloat16, the options one by one elsewhere, and odd shapes."""
    every = [c for n in range(len(OPTIONS) + 1) for c in itertools.combinations(OPTIONS, n)]
    single = [(), *((o,) for o in OPTIONS), OPTIONS]
    base = {"batch": 3, "heads": 8, "kv": 2, "queries": 5, "keys": 83, "width": 64, "value": 64}
    if rehearsal:
        base |= {"batch": 2, "heads": 4, "keys": 21, "queries": 3, "width": 16, "value": 16}
        return [base | {"dtype": torch.float32, "options": o} for o in ((), ("valid", "window"), OPTIONS)]
    cases = [base | {"dtype": torch.bfloat16, "options": o} for o in every]
    cases += [base | {"dtype": d, "options": o} for d in (torch.float32, torch.float16) for o in single]
    shapes = (
        {"width": 128, "value": 128}, {"width": 80, "value": 80}, {"width": 256, "value": 256}, {"width": 192, "value": 128},
        {"heads": 32, "kv": 1}, {"kv": 8}, {"queries": 1, "keys": 2048, "batch": 1}, {"queries": 1, "keys": 4100, "batch": 2},
        {"queries": 16, "keys": 160, "batch": 32, "heads": 32, "kv": 8}, {"queries": 160, "keys": 160, "batch": 4},
    )
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            cases += [base | shape | {"dtype": dtype, "options": o} for o in ((), ("valid",), OPTIONS)]
    return cases


def kernels(stage: Stage) -> None:
    """Each Triton kernel against plain float64 ops on the same device, forward and backward."""
    cases = [("slot_attention", c) for c in attention_cases(not stage.device.real)]
    cases += [("bridge_in", c) for c in bridge_cases(not stage.device.real)]
    cases += [("gated_attention", c) for c in gated_cases(not stage.device.real)]
    worst: dict[tuple[str, str], float] = {}
    checks = {"slot_attention": check_attention, "bridge_in": check_bridge, "gated_attention": check_gated}
    passed = 0
    for kernel, case in stage.mine(cases):
        dtype = str(case["dtype"]).removeprefix("torch.")
        label = f"{kernel} {dtype} " + " ".join(f"{k}={v}" for k, v in case.items() if k != "dtype")
        with stage.attempt(label), stage.beside_others():
            parts = checks[kernel](stage, case)
            for part, error in parts.items():
                limit = KERNEL_LIMITS[case["dtype"]] * (1 if part == "output" else 4)
                key = kernel + ("" if part == "output" else " gradients"), dtype
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= limit:
                    stage.record(label, wrong=f"{part}: relative error {error:.1e} is above {limit:.0e}")
                    break
            else:
                passed += 1
    stage.record("checked", passed=passed, of=len(stage.mine(cases)),
                 worst={" ".join(k): f"{v:.1e}" for k, v in sorted(worst.items())})


def check_attention(stage: Stage, case: dict) -> dict[str, float]:
    from depthpass_kernels import slot_attention, slot_attention_backward, slot_attention_forward, slot_attention_naive

    device, dtype, options = stage.device.torch, case["dtype"], case["options"]
    torch.manual_seed(hash(str(case)) % 1000)
    batch, heads, keys = case["batch"], case["heads"], case["keys"]
    shapes = {"q": (batch, heads, case["queries"], case["width"]), "k": (batch, case["kv"], keys, case["width"]),
              "v": (batch, case["kv"], keys, case["value"])}
    exact = {n: torch.randn(s, device=device).to(dtype).double().requires_grad_() for n, s in shapes.items()}
    start = keys - case["queries"] - (3 if "offset" in options else 0)
    given: dict[str, object] = {"q_start": start}
    if "offset" in options:
        given["q_start"] = torch.tensor(start, device=device)
    if "window" in options:
        given["window"] = max(2, keys // 3)
    if "chunk" in options:
        given["chunk"] = max(2, keys // 4)
    pads = torch.arange(batch, device=device) * (keys // (2 * batch))
    if "valid" in options:
        given["valid"] = torch.arange(keys, device=device)[None] >= pads[:, None]
        if "chunk" in options:
            given["row_start"] = pads
    if "softcap" in options:
        given["softcap"] = 5.0
    if "sinks" in options:
        exact["sinks"] = torch.randn(heads, device=device).to(dtype).double().requires_grad_()
    want = slot_attention_naive(**exact, **given)
    weight = torch.randn(want.shape, device=device, dtype=torch.float64).to(dtype)
    (want * weight).sum().backward()
    there = {n: t.detach().to(dtype).requires_grad_() for n, t in exact.items()}
    got = slot_attention(**there, **given, implementation="triton")
    (got * weight).sum().backward()
    errors_of = {"output": relative(got, want)}
    errors_of |= {f"gradient of {n}": relative(t.grad, exact[n].grad) for n, t in there.items()}
    # As the token loop calls it: key gradients added in place to float32 buffers.
    plain = {n: t.detach() for n, t in there.items()}
    out, lse = slot_attention_forward(**plain, **given, implementation="triton")
    into = tuple(torch.ones_like(plain[n], dtype=torch.float32) for n in "kv")
    dq, dk, dv, _ = slot_attention_backward(
        weight, plain.pop("q"), plain.pop("k"), plain.pop("v"), out, lse, into=into, implementation="triton", **plain, **given
    )
    errors_of["gradient of q, in place"] = relative(dq, exact["q"].grad)
    errors_of["gradient of k, in place"] = relative(dk - 1, exact["k"].grad)
    errors_of["gradient of v, in place"] = relative(dv - 1, exact["v"].grad)
    return errors_of


def bridge_cases(rehearsal: bool) -> list[dict]:
    sizes = [(24, 8)] if rehearsal else [(256, 24), (2048, 120), (2048, 512), (4096, 64), (1536, 40)]
    dtypes = (torch.float32,) if rehearsal else (torch.float32, torch.bfloat16, torch.float16)
    return [
        {"dtype": dtype, "width": w, "rank": r, "bias": bias, "present": present, "norm": norm}
        for dtype in dtypes for (w, r) in sizes for bias in (False, True) for present in (False, True) for norm in (False, True)
    ]


def check_bridge(stage: Stage, case: dict) -> dict[str, float]:
    from depthpass_kernels import bridge_in

    device, dtype, w, r = stage.device.torch, case["dtype"], case["width"], case["rank"]
    torch.manual_seed(hash(str(case)) % 1000)
    shapes = {"x": (3, 5, w), "c": (3, 5, r), "up": (w, r), "bias": (w,), "norm": (w,)}
    exact = {n: torch.randn(s, device=device).to(dtype).double() * (r**-0.5 if n == "up" else 1) for n, s in shapes.items()}
    exact = {n: t.to(dtype).double().requires_grad_() for n, t in exact.items()}
    there = torch.rand(3, 5, device=device) > 0.4 if case["present"] else None

    total = 0.5 * (exact["c"] @ exact["up"].t()) + (exact["bias"] if case["bias"] else 0)
    total = exact["x"] + (total if there is None else torch.where(there[..., None], total, 0))
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * exact["norm"]
    weights = torch.randn(2, 3, 5, w, device=device).to(dtype)
    ((total * weights[0]).sum() + ((normed * weights[1]).sum() if case["norm"] else 0)).backward()

    mine = {n: t.detach().to(dtype).requires_grad_() for n, t in exact.items()}
    y, z = bridge_in(
        mine["x"], mine["c"], mine["up"], mine["bias"] if case["bias"] else None, gain=0.5, present=there,
        norm_weight=mine["norm"] if case["norm"] else None, implementation="triton",
    )
    ((y * weights[0]).sum() + ((z * weights[1]).sum() if case["norm"] else 0)).backward()
    errors_of = {"output": max(relative(y, total), relative(z, normed) if case["norm"] else 0.0)}
    return errors_of | {f"gradient of {n}": relative(t.grad, exact[n].grad) for n, t in mine.items() if t.grad is not None}


def gated_cases(rehearsal: bool) -> list[dict]:
    base = {"batch": 2, "heads": 8, "kv": 2, "queries": 40, "keys": 70, "width": 64, "window": 9}
    if rehearsal:
        base |= {"heads": 4, "queries": 5, "keys": 11, "width": 16, "window": 3}
    dtypes = (torch.float32,) if rehearsal else (torch.float32, torch.bfloat16, torch.float16)
    return [
        base | {"dtype": dtype, "valid": valid, "far_window": far} | shape
        for dtype in dtypes for valid in (False, True) for far in (None, 17)
        for shape in (({},) if rehearsal else ({}, {"width": 128}, {"queries": 1, "keys": 300}))
    ]


def check_gated(stage: Stage, case: dict) -> dict[str, float]:
    from depthpass_kernels import gated_attention

    device, dtype = stage.device.torch, case["dtype"]
    torch.manual_seed(hash(str(case)) % 1000)
    batch, heads, kv, count, keys, width = (case[n] for n in ("batch", "heads", "kv", "queries", "keys", "width"))
    own = min(keys, count + case["window"] - 1)
    shapes = {"q": (batch, heads, count, width), "k": (batch, kv, keys, width), "v": (batch, kv, keys, width),
              "near_k": (batch, kv, own, width), "near_v": (batch, kv, own, width), "score": (batch, count, heads)}
    exact = {n: torch.randn(s, device=device).to(dtype).double().requires_grad_() for n, s in shapes.items()}
    given = {"window": case["window"], "q_start": keys - count, "far_window": case["far_window"]}
    if case["valid"]:
        given["valid"] = torch.arange(keys, device=device)[None] >= torch.tensor([[0], [6]], device=device)
    want = gated_reference(**exact, **given)
    weight = torch.randn(want.shape, device=device).to(dtype)
    (want * weight).sum().backward()
    there = {n: t.detach().to(dtype).requires_grad_() for n, t in exact.items()}
    got = gated_attention(**there, **given, implementation="triton")
    (got * weight).sum().backward()
    return {"output": relative(got, want)} | {
        f"gradient of {n}": relative(t.grad, exact[n].grad) for n, t in there.items()
    }


def gated_reference(q, k, v, near_k, near_v, score, window, q_start, far_window, valid=None):
    """The gated attention from its definition, with whole masks."""
    count, keys, own = q.shape[2], k.shape[2], near_k.shape[2]
    columns = torch.arange(q_start, q_start + count, device=q.device)[:, None]

    def part(k, v, first, width):
        at = torch.arange(first, first + k.shape[2], device=q.device)[None]
        seen = ((at <= columns) & (True if width is None else at > columns - width))[None, None]
        if valid is not None:
            seen = seen & valid[:, None, None, first : first + k.shape[2]]
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        weights = torch.where(seen.any(-1, keepdim=True), logits, 0.0).softmax(-1) * seen
        return weights @ v

    gate = score.sigmoid().transpose(1, 2)[..., None]
    far, near = part(k, v, 0, far_window), part(near_k, near_v, q_start + count - own, window)
    assert keys >= q_start + count
    return (gate * far + (1 - gate) * near).transpose(1, 2)


def sanitizer(stage: Stage) -> None:
    """compute-sanitizer over one shape of every kernel, in a process of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not stage.device.real or tool is None:
        stage.record("compute-sanitizer", skipped="no CUDA device" if tool else "compute-sanitizer is not installed")
        return
    with stage.beside_others():
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__]
        done = subprocess.run(command, capture_output=True, text=True)
        tail = (done.stdout + done.stderr)[-1500:]
        clean = done.returncode == 0 and "ERROR SUMMARY: 0 errors" in tail
        stage.record("compute-sanitizer memcheck", clean=clean, **({} if clean else {"wrong": tail}))


def _sanitized() -> None:
    """One shape of every kernel, what the sanitizer watches."""
    from pathlib import Path

    from stage import Device

    stage = Stage("sanitized", Path("."), Device("cuda"))
    for dtype in (torch.bfloat16, torch.float32):
        check_attention(stage, {
            "dtype": dtype, "options": OPTIONS, "batch": 3, "heads": 8, "kv": 2, "queries": 5, "keys": 83, "width": 80,
            "value": 80,
        })
        check_bridge(stage, {"dtype": dtype, "width": 257, "rank": 24, "bias": True, "present": True, "norm": True})
        check_gated(stage, gated_cases(False)[3] | {"dtype": dtype})
    torch.cuda.synchronize()


# Levels.

LEVELS = ("eager", "scheduled", "inductor", "cudagraph")


def small(kind: str, dtype: torch.dtype, device: str):
    """A small random model of an architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **({"sliding_window": 9, "attn_logit_softcapping": 20.0} if kind == "gemma2" else {}),
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind == "gemma2" else "sdpa")
    return model.to(device=device, dtype=dtype).eval()


def systems() -> dict[str, tuple[str, object, bool]]:
    """Model, spec and whether it has a token loop."""
    bridges = dp.TurboConn(bridges=[(3, 0), (2, 0), (2, 1)], group=3, rank=16)
    return {
        "turboconn": ("llama", bridges, True),
        "turboconn gemma2": ("gemma2", bridges, True),
        "loop": ("llama", dp.Loop(start=1, end=3, times=3), False),
        "plt": ("llama", dp.ParallelLoop(loops=2, window=8), False),
        "mor": ("llama", dp.MixtureOfRecursions(recursions=2, start=1, end=3), False),
    }


def levels(stage: Stage) -> None:
    """Logits and every gradient of each level against the eager level in float64; padded rows; twice, as graphs replay."""
    from depthpass.fuzz.run import sharing_captures

    level = LEVELS[1:][stage.shard] if stage.shards > 1 else None
    # Of two models in two dtypes. A card captures each anew: what its graphs replay may be kept with the capture.
    with nullcontext() if stage.device.real else sharing_captures():
        for name, (kind, spec, loops) in systems().items():
            for one in (level,) if level else LEVELS[1:]:
                if one != "cudagraph" or loops:
                    check_level(stage, name, kind, spec, one, loops)


def check_level(stage: Stage, name: str, kind: str, spec, level: str, loops: bool) -> None:
    device = stage.device.torch
    tokens = stage.device.pick(20, 8)
    if level == "cudagraph" and not stage.device.real:
        stage.record(f"{level} {name}", skipped="CUDA graphs need a CUDA device")
        return
    exact = small(kind, torch.float64, device)
    torch.manual_seed(1)
    ids = torch.randint(3, 1000, (3, tokens), device=device)
    # Padded rows of gemma2 are NaN in the stock model itself.
    pads = torch.tensor([0, 0, 0] if kind == "gemma2" else [0, 2, 5], device=device)
    mask = (torch.arange(tokens, device=device)[None] >= pads[:, None]).long()
    values: dict = {}

    def run(dtype: torch.dtype, lowering: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        model = dp.transform(copy.deepcopy(exact).to(dtype), spec, lowering=lowering)
        if not values:
            values.update({k: 0.2 * torch.randn_like(v) for k, v in model.depth.state_dict().items()})
        model.depth.load_state_dict(values)
        answers = []
        for repeat in range(2):  # a graph that is replayed must not repeat its first result
            rows = ids.roll(repeat, 1)
            model.zero_grad()
            # What a pad says of the first token is no number of use, and kernels differ in it.
            labels = rows.masked_fill((mask * mask.roll(1, 1)) == 0, -100)
            out = model(input_ids=rows, attention_mask=mask, labels=labels, use_cache=False)
            out.loss.backward()
            answers.append((out.logits.detach()[mask.bool()],
                            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        ran = {r.level for r in model.depth_lowered}
        if loops and lowering != "eager" and ran != {lowering}:
            raise AssertionError(f"asked for {lowering}, ran {model.depth_lowered}")
        return answers

    with stage.beside_others():
        want = run(torch.float64, "eager")
    for dtype in stage.device.pick((torch.float32, torch.bfloat16), (torch.float32,)):
        label = f"{level} {name} {str(dtype).removeprefix('torch.')}"
        with stage.attempt(label), stage.beside_others():
            plain = errors(run(dtype, "eager"), want)
            measured = errors(run(dtype, level if loops or level != "scheduled" else "auto"), want)
            # A level may round otherwise; it is no further from the truth than the eager one. In half precision single
            # gradients are mostly noise, all of them together are not.
            kept, floor = (list(measured), 1e-5) if dtype == torch.float32 else (["logits", "all gradients"], 1e-2)
            wrong = [f"{k}: {measured[k]:.1e}, eager {plain[k]:.1e}" for k in kept
                     if not (measured[k] <= 2 * plain[k] + floor and measured[k] < 1)]
            stage.record(label, **{k: measured[k] for k in ("logits", "all gradients")}, eager=plain["logits"],
                         eager_gradients=plain["all gradients"], **({"wrong": "; ".join(wrong[:6])} if wrong else {}))
    if level == "cudagraph":
        with stage.attempt(f"{level} {name} passes"), stage.beside_others():
            check_passes(stage, f"{level} {name} passes", exact, spec, level, values, ids)
    if level in ("inductor", "cudagraph") and name != "mor":
        with stage.attempt(f"{level} {name} decoding"), stage.beside_others():
            check_decoding(stage, f"{level} {name} decoding", exact, spec, level, values, ids)


def check_passes(stage: Stage, label: str, exact, spec, level: str, values: dict, ids: torch.Tensor) -> None:
    """Gradients that add up over two passes, with the backward passes behind each forward pass and behind both of them."""
    for together in (False, True):
        sums = {}
        for dtype, lowering in ((torch.float64, "eager"), (torch.float32, level)):
            model = dp.transform(copy.deepcopy(exact).to(dtype), spec, lowering=lowering)
            model.depth.load_state_dict(values)
            waiting = []
            for rows in (ids, ids.flip(1), ids.roll(3, 1)):
                waiting.append(model(input_ids=rows, labels=rows, use_cache=False).loss)
                if not together:
                    waiting.pop().backward()
            sum(waiting).backward() if together else None
            sums[lowering] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        error = relative(*(torch.cat([sums[k][n].double().flatten() for n in sums["eager"]]) for k in (level, "eager")))
        how = "backward together" if together else "accumulated"
        stage.record(f"{label}, {how}", gradients=error, **({} if error <= 1e-4 else {"wrong": f"relative error {error:.1e}"}))


def check_decoding(stage: Stage, label: str, exact, spec, level: str, values: dict, ids: torch.Tensor) -> None:
    """Tokens decoded one by one in float32, from two caches in turn, against the eager level in float64."""
    logits = {}
    for dtype, lowering in ((torch.float64, "eager"), (torch.float32, level)):
        model = dp.transform(copy.deepcopy(exact).to(dtype), spec, lowering=lowering).eval()
        model.depth.load_state_dict(values)
        with torch.no_grad():
            caches = [model(input_ids=rows, use_cache=True).past_key_values for rows in (ids, ids.flip(1))]
            logits[lowering] = torch.cat([
                model(input_ids=ids[:, i : i + 1], past_key_values=caches[i % 2], use_cache=True).logits for i in range(6)
            ])
    error = relative(logits[level], logits["eager"])
    stage.record(label, logits=error, **({} if error <= 1e-4 else {"wrong": f"relative error {error:.1e}"}))


def errors(answers, want) -> dict[str, float]:
    """The larger error of two passes, of the logits and of every gradient.

    A gradient that is nothing beside the others (a bias that softmax cancels) is held against a thousandth of their mean.
    """
    worst: dict[str, float] = {}
    for (logits, grads), (exact, right) in zip(answers, want, strict=True):
        worst["logits"] = max(worst.get("logits", 0.0), relative(logits, exact))
        apart = sum(
            (grads[n].double() - g.double()).norm().item() ** 2 if n in grads else float("inf") for n, g in right.items()
        )
        total = (apart / sum(g.double().norm().item() ** 2 for g in right.values())) ** 0.5
        worst["all gradients"] = max(worst.get("all gradients", 0.0), total if total == total else float("inf"))
        least = 1e-3 * sum(g.double().norm().item() for g in right.values()) / len(right)
        for n, g in right.items():
            size = max(g.double().norm().item(), least)
            error = (grads[n].double() - g.double()).norm().item() / size if n in grads else float("inf")
            worst[n] = max(worst.get(n, 0.0), error if error == error else float("inf"))
    return worst


if __name__ == "__main__":
    _sanitized()
