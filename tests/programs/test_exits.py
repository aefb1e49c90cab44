"""Early exits that skip visits, against the token-by-token oracle: float64, outputs, all gradients, and the work done."""

import math

import oracle_program as oracle
import pytest
import torch
import zoo
from depthpass_lowering.executors.noise import cut_off, noise
from turbos import enliven

import depthpass as dp
from depthpass.ir import parse_program, verify
from depthpass.ir.interpret import Interpretation
from depthpass.ir.local_ops import distance
from tests.passes.toy import WIDTH, Toy

LENGTHS = [7, 4]
"""Below the eight lanes of AVX2: the float32 softmax of Gemma's attention adds longer rows up in an order that pads change."""
HUGINN = {"inject": "concat", "state": "noise", "noise_std": math.sqrt(2 / 5), "noise_cut": 3.0, "out_norm": True}
CASES = {
    "cdf": ("llama", {"exit": 0.7, "times": 4}),
    "cdf_first": ("mixtral", {"exit": 0.8, "times": 3, "kv": "first"}),
    "cdf_inject": ("gpt2", {"exit": 0.8, "times": 4, "inject": "add"}),
    "state": ("qwen2", {"exit": 0.5, "times": 4, "criterion": "state"}),
    "state_first": ("gemma3_text", {"exit": 0.45, "times": 4, "criterion": "state", "kv": "first"}),
    "kl": ("gemma2", {"exit": 0.15, "times": 4, "criterion": "kl"}),
    "kl_twice": ("qwen2", {"exit": 0.6, "times": 2, "criterion": "kl"}),
    "entropy": ("llama", {"exit": 0.05, "times": 5, "criterion": "entropy"}),
    "huginn_kl": ("gpt_neox", {"exit": 0.8, "times": 4, "criterion": "kl", **HUGINN}),
    "huginn_entropy": ("llama", {"exit": 0.05, "times": 5, "criterion": "entropy", "kv": "first", **HUGINN}),
    "cosine": ("llama", {"exit": 0.12, "times": 4, "criterion": "cosine"}),
    "argmax": ("cohere", {"exit": 1.0, "times": 5, "criterion": "argmax"}),
    "argmax_twice": ("gpt_neox", {"exit": 2.0, "times": 6, "criterion": "argmax", **HUGINN}),
    "latest": ("llama", {"exit": 0.7, "times": 4, "kv": "latest"}),
    "latest_windows": ("gemma3_text", {"exit": 0.45, "times": 4, "criterion": "state", "kv": "latest"}),
    "huginn_latest": ("llama", {"exit": 1.0, "times": 4, "criterion": "state", "kv": "latest", **HUGINN}),
    "huginn_state": ("llama", {"exit": 1.0, "times": 4, "criterion": "state", **HUGINN}),
}
END = 2
"""Of the core: a block is left as the coda of three."""


def transformed(name, spec, layers=3):
    overrides = {"layer_types": "alternate", "sliding_window": zoo.WINDOW, "use_sliding_window": True}
    stock = enliven(zoo.model(name, layers, dtype=torch.float64, **(overrides if name == "qwen2" else {})), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


def huginn_start(i, width):
    """Token i's start: where a normal draw cut off at three deviations has as much of its mass below it, by bisection."""
    def mass(x, cut):
        return (math.erf(x / math.sqrt(2)) + math.erf(cut / math.sqrt(2))) / (2 * math.erf(cut / math.sqrt(2)))

    start = []
    for u in (mass(x, 40.0) for x in noise(0, torch.tensor([i]), width)[0].tolist()):
        low, high = -3.0, 3.0
        for _ in range(60):
            low, high = ((low + high) / 2, high) if mass((low + high) / 2, 3.0) < u else (low, (low + high) / 2)
        start.append(math.sqrt(2 / 5) * low)
    return torch.tensor(start, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_exits_equal_the_oracle(case):
    name, options = CASES[case]
    stock, model = transformed(name, dp.Loop(start=1, end=END, **options))
    taken = []
    drawn = [huginn_start(i, 32) for i in range(max(LENGTHS))]

    def want(row, p):
        def gate(s):
            if "loop.exit.weight" not in p:
                return torch.zeros(())
            return torch.sigmoid(p["loop.exit.weight"] @ row.norm(s) + p["loop.exit.bias"])

        stream, ran = oracle.exits(
            row, 1, END, options["times"], options["exit"], options.get("criterion", "cdf"), gate,
            kv=options.get("kv", "own"), inject=options.get("inject"), noise=drawn if "state" in options else None,
            adapter=(p.get("loop.inject.weight"), p.get("loop.inject.bias")), out_norm=options.get("out_norm", False),
        )
        taken.extend(ran)
        return stream

    # Norms compute in float32, and with kv="latest" those of a token that left run again for its keys.
    oracle.compare(stock, model, zoo.batch(LENGTHS), want, limit=1e-6 if options.get("kv") == "latest" else 1e-8)
    assert len(set(taken)) > 1, taken


@pytest.mark.filterwarnings("ignore:hooks on or in block")
@pytest.mark.parametrize("kv", ["own", "first"])
def test_tokens_that_left_do_no_work(kv):
    """Rows of one batch leave after different iterations; a block sees only the rows that stay."""
    _, model = transformed("llama", dp.Loop(start=1, end=2, times=4, exit=0.5, kv=kv))
    ids = zoo.batch([6, 6, 6])["input_ids"]
    with torch.no_grad():
        model.depth.loop.exit.weight.zero_()
        seen = []
        stock_block = model.model.layers[1]
        handle = stock_block.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[:2])))
        for probability, calls in ((0.9, 1), (0.4, 2), (0.21, 3), (0.01, 4)):
            model.depth.loop.exit.bias.fill_(torch.logit(torch.tensor(probability)))
            cache = dp.DepthCache(model)
            model(ids, past_key_values=cache, use_cache=True)
            assert seen == [(3, 6)] * calls
            seen.clear()
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            assert seen == [(3, 1)] * calls
            seen.clear()
        # A gate that tells rows apart: with a random one some rows leave before others.
        enliven(model.depth, seed=2, std=2.0, least=1)
        model.depth.loop.exit.bias.zero_()
        model(ids[:, :1])
        handle.remove()
    rows = [shape[0] for shape in seen]
    assert rows == sorted(rows, reverse=True) and rows[0] == 3 and 0 < rows[-1] < 3, rows


@pytest.mark.parametrize("criterion", ["cdf", "state", "entropy"])
def test_limits_that_nobody_reaches_give_the_loop_without_exits(criterion):
    stock, model = transformed("llama", dp.Loop(start=1, end=3, times=3, exit=1.0 if criterion == "cdf" else 1e-12,
                                         criterion=criterion))
    plain = dp.transform(stock, dp.Loop(start=1, end=3, times=3))
    batch = zoo.batch([7, 7])
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-12, atol=1e-12)


def test_taps_and_labels_beside_logits_of_the_state():
    stock, model = transformed("llama", dp.Loop(start=1, end=2, times=3, exit=0.02, criterion="kl", taps=True))
    batch = zoo.batch(LENGTHS)
    out = model(**batch, labels=batch["input_ids"])
    assert list(out.taps) == ["loop.t1", "loop.t2", "loop.t3"]
    assert torch.equal(out.taps["loop.t3"], out.logits)
    once = dp.transform(stock, dp.Loop(start=1, end=2, times=1))(**batch).logits
    torch.testing.assert_close(out.taps["loop.t1"], once)
    out.loss.backward()
    assert stock.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"criterion": "kl"}, r"loop\.exit: expected a value to leave at beside criterion='kl'"),
    ({"exit": 0.5, "times": 1}, r"loop\.times: expected at least 2 with an exit"),
    ({"exit": 0.5, "times": 1, "criterion": "kl"}, r"loop\.times: expected at least 2 with an exit"),
    ({"exit": 0.5, "times": 2, "criterion": "entropy"}, r"loop\.times: expected at least 3 with criterion='entropy'"),
    ({"noise_cut": 3.0}, r"loop\.noise_cut: expected state='noise' beside it"),
    ({"noise_cut": 0.0, "state": "noise", "inject": "add"}, r"loop\.noise_cut: expected a positive number"),
    ({"exit": 1.5}, r"loop\.exit: expected a probability"),
    ({"exit": -1.0, "criterion": "entropy", "times": 3}, r"loop\.exit: expected a positive distance"),
    ({"exit": 0.5, "kv": "last"}, r"loop\.kv: expected 'own', 'first' or 'latest'"),
    ({"kv": "latest"}, r"loop\.kv: expected another policy without an exit"),
    ({"exit": 1.5, "criterion": "argmax", "times": 9}, r"loop\.exit: expected a whole number of iterations"),
    ({"exit": 3.0, "criterion": "argmax", "times": 4}, r"loop\.times: expected at least 5 with criterion='argmax'"),
    ({"exit": 0.5, "criterion": "state", "times": 3, "skip": False}, r"loop\.skip: expected True"),
    ({"skip": False}, r"loop\.exit: expected a value to leave at beside skip=False"),
    ({"inject": "attention", "kv": "first"}, r"loop\.kv: expected 'own' with inject='attention'"),
    ({"inject": "attention", "exit": 0.5}, r"loop\.skip: expected False with inject='attention'"),
    ({"criterion": "entropi"}, "entropy"),
])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(dp.SpecError, match=message):
        dp.Loop(**options)


def test_an_exit_without_a_loop_or_a_head_is_refused():
    with pytest.raises(dp.SpecError, match="layer_program: unknown field 'exit'"):
        dp.transform(zoo.model("llama", 2), {"pass": "layer_program", "layers": [0, 1], "exit": 0.5})
    headless = dp.transform(zoo.model("llama", 3).model, dp.Loop(1, 2, times=3, exit=0.1, criterion="kl"))
    with pytest.raises(dp.UnsupportedModelError, match="needs a model with a head"):
        headless(**zoo.batch([4, 4]))


def written(rule, now, before):
    """The distance of one token, as the op table has it."""
    if rule == "state":
        return (now - before).norm() / now.norm()
    if rule == "cosine":
        return 1 - (now * before).sum() / (now.square().sum() * before.square().sum()).sqrt()
    if rule == "argmax":
        return torch.tensor(float(int(now.argmax()) != int(before.argmax())), dtype=now.dtype)
    p, q = torch.softmax(now, 0), torch.softmax(before, 0)
    if rule == "kl":
        return (q * (q.log() - p.log())).sum()
    return ((p * p.log()).sum() - (q * q.log()).sum()).abs()


def test_distances_are_those_of_the_formulas():
    toy = Toy(1, 5)
    head = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for rule in ("state", "cosine", "kl", "entropy", "argmax"):
        arguments = "%e, %b" if rule in ("state", "cosine") else "%l, %m"
        program = verify(parse_program(
            f"program M blocks=1 width={WIDTH}\n%e = embed\n%b = block 0 (%e) slot 0\n%l = logits 9 (%e)\n"
            f"%m = logits 9 (%b)\n%d = distance {rule} ({arguments})\noutput %e"
        ))
        run = Interpretation(program, toy.embed, toy.stack, lambda x: x, head=lambda x: head @ x)
        args = [run.stream(a.strip(" %")) for a in arguments.split(",")]
        want = torch.stack([written(rule, *pair) for pair in zip(*args)])[:, None]
        torch.testing.assert_close(run.stream("d"), want)
        torch.testing.assert_close(distance(*args, rule=rule), want)


def test_start_noise_is_cut_off_and_otherwise_normal():
    """The largest distance of the drawn distribution from the one that Huginn's code draws from, at 20,000 draws."""
    ends = math.erf(3 / math.sqrt(2))
    drawn = cut_off(noise(0, torch.arange(625), 32).double(), 3.0).flatten().sort().values
    mass = (torch.erf(drawn / math.sqrt(2)) + ends) / (2 * ends)
    assert drawn.abs().max() <= 3 and drawn.abs().max() > 2.9
    assert (mass - torch.arange(1, len(drawn) + 1) / len(drawn)).abs().max() < 1.63 / math.sqrt(len(drawn))
    spec = dp.Loop.huginn(1, 2, times=3)
    assert (spec.inject, spec.state, spec.out_norm, spec.noise_cut) == ("concat", "noise", True, 3.0)
    assert dp.Loop.huginn(1, 2, times=(1, 9), mean=4).settled().times == 4 == dp.Loop.huginn(1, 2, times=4).times
    trained = transformed("llama", spec)[1].train()
    ids = zoo.batch([9, 9])["input_ids"]
    torch.manual_seed(1)
    first = trained(ids).logits
    assert not torch.equal(first, trained(ids).logits), "training draws anew"
    torch.manual_seed(1)
    assert torch.equal(first, trained(ids).logits)


@pytest.mark.parametrize("options", [
    {"exit": 0.8, "criterion": "kl"}, {"exit": 1, "criterion": "argmax", "kv": "latest"},
], ids=["kl", "argmax and latest"])
def test_exits_through_the_coda_decode_as_they_score(options):
    _, model = transformed("llama", dp.Loop.huginn(1, 2, times=4, **options))
    ids = zoo.batch([9, 9])["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = dp.DepthCache(model), []
        for i in range(9):
            steps.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-10)
