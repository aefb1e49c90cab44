"""Parallel loops on stock models against a token-by-token oracle: float64, outputs and all gradients."""

import oracle_program as oracle
import pytest
import torch
import torch.utils._pytree as pytree
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from turbos import enliven

import depthpass as dp
from depthpass.ir.text import parse_program
from depthpass.ir.verify import verify

LENGTHS = [7, 4]


def transformed(name, spec, layers=2):
    stock = enliven(zoo.model(name, layers, dtype=torch.float64), std=0.2)
    model = dp.transform(stock, spec)
    enliven(model.depth, seed=1, std=0.3, least=1)
    return stock, model


def gates(p, layers=2, hidden=False):
    """The gates as the papers write them, on the new parameters by name."""
    def gate(name):
        def query(q, x):
            return (q * p[f"{name}.weight"]).sum(-1) + p[f"{name}.bias"]

        def normed(q, x):
            h = x * torch.rsqrt(x.square().mean() + 1e-6) * p[f"{name}.norm.weight"]
            return p[f"{name}.weight"] @ h + p[f"{name}.bias"]

        return normed if hidden else query

    return [gate(f"parallel_loop.v{v}.gate") for v in range(layers)]


SETTINGS = {
    "paper": {"loops": 3, "window": 3},
    "one_key": {"loops": 2, "window": 1, "mix": (0.7, 0.5)},
    "long_window": {"loops": 2, "window": 64, "shift": 2},
    "first_keys": {"loops": 2, "kv": "first"},
    "own_keys": {"loops": 2, "kv": "own"},
}


@pytest.mark.parametrize(
    ("name", "setting"),
    [("llama", s) for s in SETTINGS] + [(n, s) for n in ("qwen3", "gpt2", "gemma3_text") for s in ("paper", "one_key")],
)
def test_outputs_and_gradients_equal_the_oracle(name, setting):
    options = SETTINGS[setting]
    spec = dp.ParallelLoop(**options)
    stock, model = transformed(name, spec)

    def want(row, p):
        return oracle.parallel_loop(
            row, spec.loops, spec.window, spec.mix, gates(p), shift=spec.shift, kv=spec.kv
        )

    # A gate on the rotated query sees positions: they are the row's own. GPT-2 has a table, and numbers columns.
    oracle.compare(stock, model, zoo.batch(LENGTHS), want, counted=spec.kv == "gated" and name != "gpt2")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_published_presets(name):
    for spec in (dp.ParallelLoop.loopcoder_v2(window=3), dp.ParallelLoop.iquest(window=3)):
        stock, model = transformed(name, spec)

        def want(row, p, spec=spec):
            return oracle.parallel_loop(
                row, 2, 3, spec.mix, gates(p, hidden=spec.gate == "hidden"), per_loop=spec.normalize == "loop",
                shift=spec.shift,
            )

        oracle.compare(stock, model, zoo.batch(LENGTHS, "right"), want)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_identity_settings_equal_stock_bit_for_bit(name):
    stock = enliven(zoo.model(name, 2))
    batch = zoo.batch(LENGTHS)
    real = batch["attention_mask"].bool()
    if name != "gpt2":  # numbered as a program with a gate on the query numbers them
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        want = stock(**batch).logits[real]
        for spec in (dp.ParallelLoop(loops=1), dp.ParallelLoop.identity(loops=3, window=2),
                     dp.ParallelLoop.identity(gate="hidden", normalize="loop", shift=2)):
            assert torch.equal(dp.transform(stock, spec)(**batch).logits[real], want)
        # Half of every later loop's attention is a window of two keys: not the stock model yet.
        same = dp.transform(stock, dp.ParallelLoop(loops=3, mix=(1.0, 0.0), window=2))
        assert (same(**batch).logits[real] - want).abs().max() > 1e-3
        for gate in (same.depth.parallel_loop.v0.gate, same.depth.parallel_loop.v1.gate):
            gate.bias.fill_(20.0)
        assert torch.equal(same(**batch).logits[real], want)


def test_identity_generates_what_stock_generates():
    stock = enliven(zoo.model("llama", 2, dtype=torch.float64))
    model = dp.transform(stock, dp.ParallelLoop.identity(loops=3, window=2))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**zoo.batch(LENGTHS), **options), stock.generate(**zoo.batch(LENGTHS), **options))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_shift_embedding_and_gates_it_is_the_plain_loop(name):
    """shift=0, a=0, b=1 with own keys is the stack visited R times."""
    stock = enliven(zoo.model(name, 2, dtype=torch.float64), std=0.2)
    batch = zoo.batch(LENGTHS)
    specs = (dp.ParallelLoop(loops=3, shift=0, mix=(0, 1), kv="own"), dp.LayerProgram([0, 1] * 3),
             dp.Loop(start=0, end=2, times=3))
    with torch.no_grad():
        first, *others = (dp.transform(stock, spec)(**batch).logits for spec in specs)
    assert all(torch.equal(first, x) for x in others)


def test_gates_start_at_one_half_and_are_saved(tmp_path):
    stock = enliven(zoo.model("llama", 2))
    model = dp.transform(stock, dp.ParallelLoop(loops=2, gate="hidden"))
    shapes = {n: tuple(p.shape) for n, p in model.depth.named_parameters()}
    assert shapes == {
        f"parallel_loop.v{v}.gate.{n}": s
        for v in (0, 1) for n, s in (("weight", (4, 32)), ("bias", (4,)), ("norm.weight", (32,)))
    }
    assert torch.sigmoid(model.depth.parallel_loop.v0.gate(torch.randn(1, 3, 32))).eq(0.5).all()
    enliven(model.depth, seed=2, least=1)
    model.save_pretrained(tmp_path)
    loaded = dp.from_pretrained(tmp_path)
    batch = zoo.batch([6, 6])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_gate_starts_where_it_is_told(tmp_path):
    model = dp.transform(zoo.model("llama", 2), dp.ParallelLoop(loops=3, gate_init=1.5))
    assert all(p.eq(1.5 if n.endswith("bias") else 0).all() for n, p in model.depth.named_parameters())
    model.save_pretrained(tmp_path)
    assert dp.from_pretrained(tmp_path).depth.parallel_loop.v1.gate.bias.eq(1.5).all()
    text = str(model.depth_program)
    assert "gate parallel_loop.v0.gate window 64 gate_init 1.5" in text
    assert parse_program(text) == model.depth_program
    with pytest.raises(dp.VerifyError, match=r"same gate 'parallel_loop\.v0\.gate', got 1\.5"):
        verify(parse_program(text.replace("gate_init 1.5", "gate_init 2.0", 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": 0}, "loops: expected at least 1, got 0"),
        ({"window": 0}, "window: expected at least 1 key, got 0"),
        ({"shift": -1}, "shift: expected at least 0 tokens"),
        ({"mix": (0, 0)}, "not both 0"),
        ({"mix": (0, 1)}, "a shifted loop needs the embedding"),
        ({"gate": "hiden"}, "Did you mean 'hidden'"),
        ({"normalize": "loops"}, "Did you mean 'loop'"),
        ({"kv": "own", "window": 8}, "expected kv='gated' beside it"),
        ({"kv": "first", "gate_init": 1.0}, "expected kv='gated' beside it"),
    ],
)
def test_bad_options_say_what_was_expected(options, message):
    with pytest.raises(dp.SpecError, match=message):
        dp.ParallelLoop(**options)


def test_a_gate_needs_one_number_of_heads():
    from depthpass.hf.modules.parameters import build

    class Unknown:
        @property
        def config(self):
            return self

        def get_text_config(self, decoder):
            return self

    program = dp.transform(zoo.model("llama", 2), dp.ParallelLoop(loops=2)).depth_program
    with pytest.raises(dp.UnsupportedModelError, match="kv='own'"):
        build(program, torch.zeros(1), Unknown())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("training", [False, True])
def test_a_long_row_makes_nothing_square(training):
    """Memory of prefill and training is linear in n: no tensor of n x n elements, masks included, forward or backward."""
    stock = zoo.model("llama", 2, max_position_embeddings=1024)
    model = dp.transform(stock, dp.ParallelLoop(loops=2, window=4))
    model(input_ids=torch.randint(3, 97, (1, 3)))  # captured
    seen = {}
    for n in (256, 512):
        ids = torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(0))
        with torch.set_grad_enabled(training), Largest() as largest:
            out = model(input_ids=ids, labels=ids if training else None, use_cache=not training)
            if training:
                out.loss.backward()
        seen[n] = largest.elements
    assert seen[512] < 512 * 512 // 2
    assert seen[512] <= 2 * seen[256] + 512
