import pytest
import sympy as sp
import torch
import zoo
from cost_models import llama_1b, llama_on_meta, tiny
from torch.utils.flop_counter import FlopCounterMode

from depthpass.analysis.cost import AttentionSite, Experts, cost, count, model_cost
from depthpass.analysis.cost.stock import block_kinds, example_inputs, shortened
from depthpass.analysis.cost.symbols import B, n
from depthpass.capture.export import find_layers, sharing_copy
from depthpass.errors import UnsupportedModelError
from depthpass.ir import plain

BATCH, TOKENS = 2, 19
FAMILIES = ["llama", "gpt2", "gemma2", "qwen3_moe", "llama4_text"]


def at(expr, batch=BATCH, tokens=TOKENS):
    return int(sp.sympify(expr).subs({B: batch, n: tokens}))


def forward_flops(model, *, backward=False):
    """torch's own count of a real run; eager attention, because fused attention counts 0 on the CPU."""
    model.set_attn_implementation("eager")
    if hasattr(model.config.get_text_config(), "num_experts_per_tok") and model.config.model_type != "llama4_text":
        model.set_experts_implementation("eager")
    ids = torch.randint(3, zoo.VOCABULARY, (BATCH, TOKENS))
    # Positions for every row, as captures have them: older transformers make rotary tables with a product.
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(TOKENS).expand(BATCH, -1)}
    given = {k: given[k] for k in example_inputs(model)}
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = model(**given, use_cache=False)
        if backward:
            out.logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_count_equals_torchs_flop_counter(name):
    model = zoo.model(name, layers=2 if name == "gemma2" else 1)
    counted = sum(p.count.total_flops("dense") for p in model_cost(model).parts)
    assert at(counted) == forward_flops(model)


def test_count_on_the_meta_device_equals_the_flop_counter_there():
    """Fused attention is counted by torch on the meta device only."""
    model = zoo.model("opt", layers=1).to("meta")
    counted = sum(p.count.total_flops("dense") for p in model_cost(model).parts)
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="meta")
    # A finished mask: older transformers look at the values of one made from the row.
    mask = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    assert model.config._attn_implementation == "sdpa"
    assert at(counted) == counter.get_total_flops()


def test_llama_equals_the_hand_formula():
    """Per token and block: q, o = 2*d*d each, k, v = 2*d*kv each, three MLP matrices of 2*d*f; head 2*d*V."""
    model, d, kv, f, vocabulary, heads = llama_1b(), 2048, 512, 8192, 128256, 32
    block = model.blocks[5].count
    assert block.gemm_flops["projection"] == 2 * (2 * d * d + 2 * d * kv) * B * n
    assert block.gemm_flops["mlp"] == 6 * d * f * B * n
    assert block.key_value_flops == 4 * d * kv * B * n
    assert block.flops("dense")["attention"] == 4 * B * n**2 * d
    assert sp.expand(block.flops("visible")["attention"] - 4 * B * d * n * (n + 1) / 2) == 0
    assert model.head.count.gemm_flops == {"head": 2 * d * vocabulary * B * n}
    assert model.blocks[0].count.sites == (AttentionSite(heads, 8, 64, 64),)
    assert model.vocabulary == vocabulary
    assert model.parameters == 1_235_814_400
    assert model.blocks[0].weights.total == 60_817_408 + 2 * d  # norms
    assert model.norm.weights.total == d
    assert model.itemsize == 2


def test_elementwise_operations_are_counted_apart():
    """A SiLU and a product on the MLP's inner stream, two residual sums, rotary on queries and keys."""
    element = tiny().blocks[0].count.elementwise_flops
    assert element["mlp"] == 2 * 48 * B * n
    assert element["residual"] == 2 * 32 * B * n
    # x*cos + rotate_half(x)*sin: two products, a sum, half a negation, on 4 query and 2 key heads of 8.
    assert element["attention"] == sp.Rational(7, 2) * (4 + 2) * 8 * B * n
    # RMSNorm: a square, a mean, two products per element, and an add and a root per token; two norms.
    assert element["norm"] == 2 * (4 * 32 + 2) * B * n


@pytest.mark.parametrize("name", [
    "gemma3_text", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama4_text", "qwen3_moe", "smollm3")),
])
def test_a_shortened_model_gives_the_numbers_of_the_full_one(name):
    """Counting one block of each kind equals counting every block."""
    extra = {"mlp_only_layers": [1]} if name == "qwen3_moe" else {}
    model = zoo.model(name, layers=4 if name in ("llama4_text", "smollm3") else 3, **extra)
    layers = find_layers(model)
    kinds = block_kinds(model, layers)
    assert len(set(kinds)) < len(kinds), "nothing was shared"
    short = model_cost(model)
    import depthpass.analysis.cost.stock as module

    original = module.block_kinds
    module.block_kinds = lambda model, layers: tuple(range(len(kinds)))  # every block is its own kind
    try:
        full = model_cost(model)
    finally:
        module.block_kinds = original
    for a, b in zip(short.blocks, full.blocks):
        assert a.count == b.count
        assert a.weights == b.weights
    for part in ("embed", "norm", "head"):
        assert getattr(short, part).count == getattr(full, part).count


def test_kinds_follow_windows_experts_and_positions():
    def kinds(name, **overrides):
        model = zoo.model(name, **overrides)
        return block_kinds(model, find_layers(model))

    assert kinds("llama") == (0, 0, 0, 0)
    assert kinds("gemma2") == (0, 1, 0, 1)  # sliding and full attention
    assert kinds("qwen3_moe", mlp_only_layers=[2]) == (0, 0, 1, 0)
    assert kinds("smollm3") == (0, 0, 0, 1)  # no rotary embedding in the last one


def test_shortening_leaves_the_model_alone():
    model = zoo.model("gemma2", layers=4)
    attention = model.config._attn_implementation
    before = (list(model.model.layers), list(model.config.layer_types), model.config.num_hidden_layers)
    shortened(sharing_copy(model), "model.layers", [0, 1])
    model_cost(model)
    assert before == (list(model.model.layers), list(model.config.layer_types), model.config.num_hidden_layers)
    assert model.config._attn_implementation == attention
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_windows_and_chunks_are_found_on_the_blocks():
    sites = [b.count.sites[0] for b in tiny("gemma2").blocks]
    assert [s.window for s in sites] == [zoo.WINDOW, None] * 2
    sites = [b.count.sites[0] for b in tiny("llama4_text", layers=1).blocks]
    assert [s.chunk for s in sites] == [zoo.WINDOW]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("chunk", [None, 4])
def test_visible_pairs_equal_a_mask(window, chunk):
    site = AttentionSite(1, 1, 8, 8, window, chunk if window is None else None)
    for tokens in (1, 2, 4, 5, 11):
        i = torch.arange(tokens)
        seen = i[None] <= i[:, None]
        if site.window:
            seen &= i[:, None] - i[None] < site.window
        if site.chunk:
            seen &= i[:, None] // site.chunk == i[None] // site.chunk
        pairs = site.pairs(n, n, "visible").subs(n, tokens)
        assert pairs == int(seen.sum())
        assert site.decode_pairs(n).subs(n, tokens) == int(seen[-1].sum())
        assert site.pairs(n, n, "dense").subs(n, tokens) == tokens**2


def test_experts_are_counted_as_routed():
    """Two of four experts per token: 2 * 3 * 24 * 32 multiply-adds each, and the router."""
    block = tiny("qwen3_moe").blocks[0]
    assert block.count.gemm_flops["mlp"] == (2 * 2 * 3 * 24 * 32 + 2 * 4 * 32) * B * n
    assert (block.weights.experts, block.weights.chosen, block.weights.expert) == (4, 2, 4 * 3 * 24 * 32)
    assert block.weights.read(1) == block.weights.dense + block.weights.expert / 2
    assert block.weights.read(10_000) == block.weights.total


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_activation_bytes_agree_with_what_autograd_saves(name):
    """An estimate, and a close one: everything autograd packs, parameters aside, once per storage."""
    model = zoo.model(name, layers=3, num_key_value_heads=4)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(3, zoo.VOCABULARY, (2, 40))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(input_ids=ids, position_ids=torch.arange(40).expand(2, 40), use_cache=False)
    assert out.logits.requires_grad
    estimate = cost(plain(type(model).__name__, 3, 32), model_cost(model)).at("activation bytes kept", 40, 2)
    assert estimate == pytest.approx(sum(size for size, _ in kept.values()), rel=0.02)


def test_peak_memory_of_a_block_is_its_widest_moment():
    """In an MLP of width 48: its input, gate, up and their product are alive together with the residual."""
    block = tiny().blocks[0].count.memory
    peak = block.peak.subs({B: 1, n: 1000})
    assert 4 * 1000 * (32 + 3 * 48) <= peak <= 4 * 1000 * (4 * 32 + 3 * 48)
    assert block.result_bytes == 4 * 32 * B * n


def test_count_reads_an_exported_graph_directly():
    """The same numbers without depthpass' capture: torch.export of a stock model with fused attention."""
    model = zoo.model("llama", layers=1).to("meta")
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    program = torch.export.export(
        model, (), {"input_ids": ids, "position_ids": ids, "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "position_ids": sizes, "use_cache": None}, strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,  # torch 2.11 has guards on strides of shared keys that hold for all n
    )
    number = count(program.graph_module, part="head")
    whole = sum(p.count.total_flops("dense") for p in tiny(layers=1).parts)
    assert sp.expand(number.total_flops("dense") - whole) == 0
    assert len(number.sites) == 1
    assert number.gemm_flops["mlp"] == 6 * 32 * 48 * B * n


def test_count_covers_the_matmul_ops_of_other_models():
    """Convolutions, einsum, batched and grouped products, against torch's counter."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(8, 6, 3, padding=1, groups=2)
            self.w = torch.nn.Parameter(torch.randn(6, 5))

        def forward(self, x):
            y = self.conv(x.transpose(1, 2)).transpose(1, 2)
            z = torch.einsum("btd,de->bte", y, self.w)
            return torch.bmm(z, z.transpose(1, 2)) + torch.baddbmm(z @ z.mT, y, y.mT) + torch.matmul(z, z.mT)

    net, dims = Net(), {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
    program = torch.export.export(net, (torch.randn(3, 7, 8),), dynamic_shapes=(dims,), strict=False)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(BATCH, TOKENS, 8))
    number = count(program.graph_module)
    assert at(number.total_flops()) == counter.get_total_flops()
    assert number.uncounted == ()


def test_unknown_ops_are_named_and_missing_sizes_are_errors():
    class Net(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(Net(), (torch.randn(3, 7, 8),), dynamic_shapes=(dims,), strict=False)
    assert count(program.graph_module).uncounted == ("linalg_svdvals",)
    captured = zoo.model("qwen3_moe", layers=1)
    from depthpass.capture import capture

    ids = torch.zeros(2, 7, dtype=torch.long)
    block = capture(captured, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}).blocks[0]
    shapes = {"hidden": (B, n, 32)}
    for name, p in captured.model.layers[0].named_parameters():
        shapes["p_" + name.replace(".", "_")] = tuple(p.shape)
    with pytest.raises(UnsupportedModelError, match="attention call 0, expected its sizes"):
        count(block.template.graph, inputs=shapes, experts={"mlp.experts": Experts(1, 4)})
    with pytest.raises(UnsupportedModelError, match=r"expert layer 'mlp\.experts', expected its sizes"):
        count(block.template.graph, inputs=shapes, sites=[AttentionSite(4, 2, 8, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in zoo.SUPPORTED if x not in FAMILIES])
def test_count_equals_torchs_flop_counter_everywhere(name):
    model = zoo.model(name, layers=2)
    counted = sum(p.count.total_flops("dense") for p in model_cost(model).parts)
    assert at(counted) == forward_flops(model)


def test_a_32_block_config_takes_as_many_traces_as_it_has_kinds(monkeypatch):
    import depthpass.capture.export as export

    traced = []
    original = export.trace
    monkeypatch.setattr(export, "trace", lambda m, *args: traced.append(len(m.model.layers)) or original(m, *args))
    model = llama_on_meta(
        num_hidden_layers=32, hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=99
    )
    assert len(model_cost(model).blocks) == 32
    assert traced == [1]
