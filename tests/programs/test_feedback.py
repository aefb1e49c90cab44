"""Feedback between tokens against token-by-token oracles: outputs, every gradient, caches, every level that runs it."""

import oracle_program as oracle
import pytest
import torch
import zoo
from turbos import enliven

import depthpass as dp
from depthpass.analysis.depth import depth
from depthpass.errors import PassError, SpecError


def taken(keys):
    """A visit that keeps the keys of what it is given and computes nothing else."""
    def visit(q, k, v, limits, column):
        keys.append((k, v, column))
        return torch.zeros(q.shape[0], v.shape[1], dtype=v.dtype)

    return visit


def feedback(row, depth, start, end):
    """m_t = sum softmax(w) h_l; keys of the visits from start to end at t are those of m_{t-1}, zeros at first."""
    shares = torch.softmax(depth["feedback.weights.weight"], 0)
    memory, out = torch.zeros_like(row.embed[0]), []
    slots = [oracle.Keys() for _ in row.blocks]
    for i in range(row.tokens):
        x, states = row.embed[i], []
        for b in range(len(row.blocks)):
            if b == start:
                states.append(x)
            if start <= b < end:
                row.block(b, memory, i, taken(slots[b]))
                x = row.block(b, x, i, oracle.shared(slots[b]))
                states.append(x)
            else:
                x = row.block(b, x, i, oracle.own(slots[b]))
        memory = sum(s * h for s, h in zip(shares, states, strict=True))
        out.append(x)
    return torch.stack(out)


def t2mlr(row, depth, spec):
    """The paper's recurrence, gates as the public code has them: x <- i x + r R, the first token as it is."""
    slots, out, last = [oracle.Keys() for _ in row.blocks], [], None

    def gate(name, start, x, r):
        y = torch.cat((x, r)) if spec.reads == "both" else x
        for layer in range(1, spec.layers):
            y = depth[f"t2mlr.hidden.{name}{layer}.weight"] @ y + depth[f"t2mlr.hidden.{name}{layer}.bias"]
            y = getattr(torch.nn.functional, spec.activation)(y)
        bias = torch.logit(torch.tensor(start, dtype=torch.float64))
        return torch.sigmoid(depth[f"t2mlr.{name}.weight"] @ y + depth[f"t2mlr.{name}.bias"] + bias)

    def projected(r):
        if spec.project is True:
            return depth["t2mlr.project.weight"] @ r
        inner = torch.nn.functional.gelu(depth["t2mlr.project.down.weight"] @ r)
        return r + depth["t2mlr.project.share.weight"] * (depth["t2mlr.project.up.weight"] @ inner)

    def norm(v, n):
        gain = depth[f"t2mlr.norm.{n}.weight"]
        if spec.norm == "layer":
            return torch.nn.functional.layer_norm(v, v.shape, gain, depth[f"t2mlr.shift.{n}.weight"])
        return torch.nn.functional.rms_norm(v, v.shape, gain, torch.finfo(torch.float32).eps)

    def mixed(x, r):
        r = projected(r) if spec.project else r
        base = x
        if spec.normed in ("streams", "both"):
            x, r = norm(x, "input"), norm(r, "recurrent")
        normed = rescaled if spec.normed in ("mixture", "both") else lambda y: y
        if spec.gate == "constant":
            return normed(spec.input * x + spec.recurrent * r)
        if spec.gate == "weight":
            return normed(torch.lerp(x, r, depth["t2mlr.recurrent.share.weight"].clamp(0, 1)))
        if spec.gate == "concat":
            return normed(depth["t2mlr.concat.weight"] @ torch.cat((r, x)))
        a = gate("recurrent", spec.recurrent, x, r)
        if spec.gate in ("coupled", "variance"):
            a = a.clamp(1e-4, 1 - 1e-4)
            y = a * r + (1 - a) * x if spec.gate == "coupled" else a.sqrt() * r + (1 - a).sqrt() * x
            return base + torch.tanh(depth["t2mlr.recurrent.share.weight"]) * normed(y) if spec.added else normed(y)
        if spec.gate == "exponential":
            kept = torch.exp(-8.0 * torch.nn.functional.softplus(depth["t2mlr.decay.weight"][:, 0] - 7.43) * a)
            return normed(kept * x + torch.sqrt(1 - kept**2 + 1e-8) * gate("input", spec.input, x, r) * r)
        if spec.normalized:
            i = gate("input", spec.input, x, r)
            total = (a + i).detach()
            a, i = a / total, i / total
        if spec.gate == "rezero":
            i = i if spec.normalized else gate("input", spec.input, x, r)
            own, back = (torch.tanh(depth[f"t2mlr.{name}.share.weight"]) for name in ("input", "recurrent"))
            return base + normed(own * i * x + back * a * r)
        return normed(a * r + i * x) if spec.normalized else normed((1 - gate("forget", 1 - spec.input, x, r)) * x + a * r)

    def rescaled(y):
        rms = (y.detach().square().mean() + 1e-6).sqrt()
        return y * torch.clamp(1 / rms, 1 / spec.limit, spec.limit)

    for i in range(row.tokens):
        x = row.embed[i]
        if last is not None and spec.detached == "all":
            last = last.detach()
        for b in range(len(row.blocks)):
            if b == spec.start and last is not None:
                x = mixed(x, last)
            x = row.block(b, x, i, oracle.own(slots[b]))
            if b == spec.end:
                kept = x
                if last is not None:
                    old = spec.residual * (last.detach() if spec.detached == "residual" else last)
                    kept = x + (rescaled(old) if spec.into == "stream" and spec.rescaled else old)
                    kept = rescaled(kept) if spec.into == "memory" and spec.rescaled else kept
                    x = kept if spec.into == "stream" else x
        last = kept
        out.append(x)
    return torch.stack(out)


NORMS = {"gpt2": "ln_2", "gemma3_text": "pre_feedforward_layernorm"}


def same_layer(row, depth, spec):
    """What a block makes of the token before, blended in front of the norm that its feed-forward network reads."""
    path, end = NORMS.get(row.model.config.model_type, "post_attention_layernorm"), spec.end or len(row.blocks)
    slots, out, states = [oracle.Keys() for _ in row.blocks], [], {}
    for i in range(row.tokens):
        x = row.embed[i]
        for b, block in enumerate(row.blocks):
            seen = {}

            def blended(module, args, b=b, seen=seen):
                p, share = args[0], spec.share
                if spec.blend == "learned":
                    start = torch.logit(torch.tensor(spec.share, dtype=p.dtype))
                    share = torch.sigmoid(depth[f"state.v{b}.share.weight"] + start)
                seen["point"] = p[0, 0]
                seen["change"] = share * (states[b] - p[0, 0]) if b in states else 0 * p[0, 0]
                return (p + seen["change"],)

            handle = block.get_submodule(path).register_forward_pre_hook(blended) if spec.start <= b < end else None
            x = row.block(b, x, i, oracle.own(slots[b]))
            if handle is not None:
                handle.remove()
                added = x - seen["point"]
                x = x + seen["change"] if spec.into == "stream" else x
                states[b] = x if spec.state == "stream" else added
        out.append(x)
    return torch.stack(out)


FEEDBACK, MIDDLE = dp.FeedbackTransformer(), dp.FeedbackTransformer(start=1, end=3)
LEARNED = dp.T2MLR(start=1, end=2, init=0.3)
REZERO = dp.T2MLR(start=1, end=2, gate="rezero", init=0.3, normed="streams")
CONSTANT = dp.T2MLR(start=0, end=1, gate="constant", recurrent=0.7, input=0.4, residual=0.5, rescaled=True, limit=1.5)
COUPLED = dp.T2MLR(start=1, end=2, gate="coupled", added=True, project=True, init=0.3, residual=0.5, rescaled=True, limit=1.5,
                   detached="residual", normed="mixture")
VARIANCE = dp.T2MLR(start=0, end=1, gate="variance", init=0.3, residual=0.5, rescaled=True, into="stream")
CONCAT = dp.T2MLR(start=1, end=1, gate="concat", detached="all", normed="mixture", limit=1.2)
WEIGHT = dp.T2MLR(start=1, end=2, gate="weight", recurrent=0.3, normed="streams", project=True)
NORMED = dp.T2MLR(start=0, end=1, gate="learned", normed="both", init=0.3, limit=1.3, residual=0.5)
DEEP = dp.T2MLR(start=1, end=2, gate="rezero", normalized=True, layers=2, hidden=5, activation="silu", normed="both",
                norm="layer", init=0.3, per_channel=True)
SUMMED = dp.T2MLR(start=0, end=1, normalized=True, layers=3, reads="stream", init=0.3, residual=0.5)
EXPONENTIAL = dp.T2MLR(start=0, end=1, gate="exponential", reads="stream", project=7, init=0.3)
WIDE = dp.T2MLR(start=1, end=2, gate="exponential", normed="streams", norm="layer", init=0.3)
STATE, ADDED = dp.SameLayerState(share=0.4), dp.SameLayerState(state="ffn", into="stream", share=0.6)
BESIDE = dp.SameLayerState(start=1, end=2, blend="constant", share=0.7)
WHOLE = dp.SameLayerState(end=2, into="stream", share=0.3)
WANT = {
    **{s: lambda row, depth, s=s: same_layer(row, depth, s) for s in (STATE, ADDED, BESIDE, WHOLE)},
    FEEDBACK: lambda row, depth: feedback(row, depth, 0, 3), MIDDLE: lambda row, depth: feedback(row, depth, 1, 3),
    **{s: lambda row, depth, s=s: t2mlr(row, depth, s) for s in (LEARNED, CONSTANT, REZERO, COUPLED, VARIANCE, CONCAT, WEIGHT,
                                                                   NORMED, DEEP, SUMMED, EXPONENTIAL, WIDE)},
}
CASES = [(FEEDBACK, "mistral", "eager"), (FEEDBACK, "gpt2", "scheduled"), (MIDDLE, "mistral", "scheduled"),
         (REZERO, "llama", "eager"), (LEARNED, "mistral", "scheduled"), (CONSTANT, "llama", "scheduled"),
         (COUPLED, "exaone4", "scheduled"), (VARIANCE, "starcoder2", "scheduled"), (CONCAT, "phi3", "eager"),
         (WEIGHT, "qwen3", "scheduled"), (NORMED, "phi3", "scheduled"),
         (DEEP, "granite", "scheduled"), (SUMMED, "olmo2", "scheduled"), (EXPONENTIAL, "gpt2", "scheduled"),
         (WIDE, "glm", "eager"),
         (STATE, "mistral", "eager"), (ADDED, "gpt2", "scheduled"), (BESIDE, "gpt_neox", "scheduled"),
         (WHOLE, "gemma3_text", "scheduled")]


def _alive(stock, spec, options):
    model = dp.transform(stock, spec, **options)
    enliven(model.depth, seed=4, std=0.3, least=1)
    if spec == WEIGHT:  # between the ends where it is cut off
        torch.nn.init.constant_(model.depth.get_parameter("t2mlr.recurrent.share.weight"), 0.37)
    return model


@pytest.mark.parametrize(("spec", "name", "level"), CASES, ids=lambda c: getattr(c, "name", c))
def test_outputs_gradients_and_caches(spec, name, level):
    stock = enliven(zoo.model(name, 3, dtype=torch.float64), std=0.2)
    model = _alive(stock, spec, {"lowering": level})
    batch = zoo.batch([9, 6])
    oracle.compare(stock, model, batch | {"use_cache": False}, WANT[spec])
    assert {r.level for r in model.depth_lowered} == {level}
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], dp.DepthCache(model)
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits
        for first, last in ((0, 4), (4, 5), (5, 6), (6, 9)):
            step = model(input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache).logits
            real = mask[:, first:last].bool()
            torch.testing.assert_close(step[real], whole[:, first:last][real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("apart", [STATE, dp.SumNorms()], ids=["states", "norms of sums"])
def test_what_reads_a_block_reads_its_result_where_its_network_runs_apart(apart):
    """Taps, hidden states and bridges, behind the pass as in front of it; the picture has the networks in their columns."""
    stock = enliven(zoo.model("mistral", 3, dtype=torch.float64), std=0.2)
    batch, taps = zoo.batch([6]), dp.Taps(at=[0, 1])
    before, behind = (_alive(stock, s, {}) for s in ([taps, apart], [apart, taps]))
    with torch.no_grad():
        want, got = before(**batch).taps, behind(**batch, output_hidden_states=True)
    for p in (0, 1):
        torch.testing.assert_close(got.taps[f"taps.v{p}"], want[f"taps.v{p}"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.hidden_states[p + 1], want[f"taps.v{p}"], rtol=1e-9, atol=1e-9)
    bridge = dp.TurboConn(bridges=[(1, 0)], group=2, rank=3)
    if apart is not STATE:  # where bridges land, their states change as well
        first, last = (_alive(stock, s, {}) for s in ([bridge, apart], [apart, bridge]))
        last.depth.load_state_dict(first.depth.state_dict())
        torch.testing.assert_close(last(**batch).logits, first(**batch).logits, rtol=1e-9, atol=1e-9)
    assert dp.report(behind, seq_len=6, cost=False).to_html().count('class="dp-cell') >= 3 * 6


@pytest.mark.parametrize("spec", [FEEDBACK, LEARNED, STATE], ids=lambda s: s.name)
def test_sweeps_find_the_same_numbers(spec):
    stock = enliven(zoo.model("llama", 3, dtype=torch.float64), std=0.2)
    model, swept = (_alive(stock, spec, o) for o in ({"lowering": "eager"}, {"schedule": dp.FixedPoint(max_sweeps=9)}))
    batch = zoo.batch([9, 6])
    seen = []
    for m in (model, swept):
        m.zero_grad()
        logits = m(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        logits.square().sum().backward()
        seen.append((logits.detach(), {n: p.grad.clone() for n, p in m.named_parameters()}))
    (want, grads), (got, swept_grads) = seen
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for name, g in grads.items():
        assert (g - swept_grads[name]).abs().max() <= 1e-7 * g.abs().max().clamp_min(1e-9), name


def test_a_row_shorter_than_every_delay_has_gradients_of_zero():
    """None for some of them, as torch would have it, stops data-parallel ranks whose rows are longer."""
    stock = enliven(zoo.model("gpt_neox", 3), std=0.2)
    batch = zoo.batch([1, 1])
    for spec in (FEEDBACK, LEARNED, dp.TurboConn(bridges=[(2, 0)], group=3, rank=2), dp.RecurrentLoop(encoder=1, interval=4)):
        model = dp.transform(stock, spec)
        enliven(model.depth, seed=1, std=0.3, least=1)
        stock.zero_grad()
        logits = model(**batch, use_cache=False).logits
        logits.sum().backward()
        assert {float(p.grad.abs().max()) for p in model.depth.parameters()} == {0.0}, spec
        if spec != FEEDBACK and spec != LEARNED:  # those two change the first token as well
            got = [p.grad.clone() for p in stock.parameters()]
            stock.zero_grad()
            want = stock(**batch, use_cache=False).logits
            want.sum().backward()
            assert torch.equal(logits, want) and all(torch.equal(a, p.grad) for a, p in zip(got, stock.parameters()))


def test_depth_is_that_of_the_literature():
    """Feedback: n L. T2MLR: L + (n - 1) (end - start + 1). Same-layer states: L + n - 1, of which attention is L."""
    from depthpass.ir import plain
    from depthpass.passes import Context, apply_spec
    from depthpass.schedule import schedule

    stock = plain("M", 4, 16)
    for spec, want in ((FEEDBACK, 4 * 7), (dp.T2MLR(start=1, end=2), 4 + 6 * 2), (STATE, 4 + 6)):
        assert depth(apply_spec(stock, spec, Context.of(stock))).at(7) == want
    serial = schedule(state := apply_spec(stock, STATE, Context.of(stock))).serial_regions
    assert [[o["index"] for o in r.calls] for r in serial] == [[0], [1], [2], [3]] and not any(r.visits for r in serial)
    assert depth(state, weight="attention").at(7) == 4 and depth(state, weight="sublayers").at(7) == 2 * 4 + 6


def test_identity_and_what_does_not_fit():
    from depthpass.ir import plain
    from depthpass.passes import Context, apply_spec

    stock = plain("M", 3, 16)
    for same in (dp.T2MLR(start=0, end=2, gate="constant", recurrent=0.0, input=1.0),
                 dp.SameLayerState(blend="constant", share=0.0)):
        assert apply_spec(stock, same, Context.of(stock)) == stock
    for make, message in (
        (lambda: dp.T2MLR(start=2, end=1), "start <= end"),
        (lambda: dp.T2MLR(start=0, end=1, gate="weight", recurrent=0.0), r"in \(0, 1\)"),
        (lambda: dp.T2MLR(start=0, end=1, input=1.0), r"in \(0, 1\)"),
        (lambda: dp.T2MLR(start=0, end=1, added=True), "added: expected False with gate='learned'"),
        (lambda: dp.T2MLR(start=0, end=1, gate="concat", input=0.3), "input: expected 0.8 with gate='concat'"),
        (lambda: dp.T2MLR(start=0, end=1, gate="weight", layers=2), "layers: expected 1 with gate='weight'"),
        (lambda: dp.T2MLR(start=0, end=1, gate="coupled", normalized=True), "normalized: expected False"),
        (lambda: dp.T2MLR(start=0, end=1, hidden=4), "layers above 1"), (lambda: dp.T2MLR(0, 1, layers=0), "layers: .* least 1"),
        (lambda: dp.T2MLR(start=0, end=1, norm="layer"), "'streams' or 'both'"), (lambda: dp.T2MLR(0, 1, project=0), "project"),
        (lambda: dp.T2MLR(start=0, end=1, limit=2.0), "something that is rescaled"),
        (lambda: dp.T2MLR(start=0, end=1, into="stream"), "not 0"),
        (lambda: dp.FeedbackTransformer(start=2, end=2), "above 2"), (lambda: dp.SameLayerState(share=0.0), r"in \(0, 1\)"),
    ):
        with pytest.raises(SpecError, match=message):
            make()
    scaled = [dp.Loop(times=2, scales=True), dp.SameLayerState()]
    for spec in (scaled, dp.SameLayerState(start=3), dp.T2MLR(start=0, end=3), dp.FeedbackTransformer(end=4),
                 dp.FeedbackTransformer(start=3)):
        with pytest.raises(PassError, match="expected"):
            apply_spec(stock, spec, Context.of(stock))
