"""What vLLM's Transformers modeling backend asks of a model, acted out on emitted folders.

The facts are those of its public source and of its page on custom models: AutoModel makes the decoder from the config on the
meta device, with the attention implementation "vllm"; every linear map is replaced by one of vLLM's own, those of queries,
keys and values by one of all three with a forward bound to their module, and every other parameter made anew; every weight has
to be in the file; attention module number ``layer_idx`` finds its own paged cache in ``attention_instances``; a batch is one row
of tokens of several requests, with positions and no mask.
vLLM itself is not run here.
"""

import inspect
import textwrap
import types

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from turbos import transformed

import depthpass as dp


class Pages:
    """One layer's keys and values by request, as an engine keeps them."""

    def __init__(self, config, layer):
        kinds = getattr(config, "layer_types", None)
        self.window = config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None
        self.dim, self.kept, self.calls = config.head_dim, {}, 0
        self.scale = self.dim**-0.5

    def forward(self, query, key, value, requests):
        """``[tokens, heads * dim]`` of several requests -> the same."""
        self.calls += 1
        out, start = [], 0
        for request, count in requests:
            q, k, v = (x[start : start + count].view(count, -1, self.dim).transpose(0, 1) for x in (query, key, value))
            start += count
            if request in self.kept:
                k, v = (torch.cat((old, new), 1) for old, new in zip(self.kept[request], (k, v)))
            self.kept[request] = k, v
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            distance = torch.arange(k.shape[1] - count, k.shape[1])[:, None] - torch.arange(k.shape[1])
            seen = (distance >= 0) & (distance < (self.window or 1 << 30))
            scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~seen, -torch.inf)
            out.append((scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1))
        return torch.cat(out)


def engine_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert attention_mask is None
    pages = attention_instances[module.layer_idx]
    pages.scale = pages.scale if scaling is None else float(scaling)
    count = query.shape[-2]
    query, key, value = (x.transpose(1, 2).reshape(count, -1) for x in (query, key, value))
    return pages.forward(query, key, value, kwargs["requests"]), None


class Stacked(nn.Linear):
    """Three maps of one input in one."""

    def part(self, number, x):
        return self(x).split(self.sizes, -1)[number]


def fuse(attention):
    """Put one map in the place of those of queries, keys and values, and bind a forward to the module that calls it."""
    cls, names = type(attention), ("q_proj", "k_proj", "v_proj")
    maps = [attention._modules.pop(n) for n in names]
    sizes = [m.out_features for m in maps]
    attention.qkv_proj = Stacked(maps[0].in_features, sum(sizes), maps[0].bias is not None)
    attention.qkv_proj.sizes = sizes
    function = inspect.unwrap(cls.forward)
    source = textwrap.dedent(inspect.getsource(function))
    source = "from __future__ import annotations\n" + source[source.index("def forward") :]
    for number, name in enumerate(names):
        assert source.count(f"self.{name}(") == 1
        source = source.replace(f"self.{name}(", f"self.qkv_proj.part({number}, ")
    exec(compile(source, "fused", "exec", dont_inherit=True), space := dict(function.__globals__))
    attention.forward = types.MethodType(space["forward"], attention)


class Engine:
    def __init__(self, folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert config.auto_map["AutoModel"]
        config._attn_implementation = "vllm"
        with torch.device("meta"):
            self.model = AutoModel.from_config(config, trust_remote_code=True)
        assert type(self.model).is_backend_compatible()
        (layers,) = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
        assert layers is self.model.layers
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, nn.Linear(child.in_features, child.out_features, child.bias is not None))
        for module in self.model.modules():
            if {"q_proj", "k_proj", "v_proj"} <= module._modules.keys():
                fuse(module)
        for module in self.model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.is_meta:
                    setattr(module, name, nn.Parameter(torch.empty_like(p, device="cpu")))
        with torch.device("cpu"):
            fresh = AutoModel.from_config(config, trust_remote_code=True)
        for name, buffer in fresh.named_buffers():  # vLLM makes buffers on the device at once
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)._buffers[leaf] = buffer
        self.config, self.pages = config, {i: Pages(config, i) for i in range(config.num_hidden_layers)}
        self.head = self._load(folder)

    def _load(self, folder):
        weights = load_file(folder / "model.safetensors")
        for key in [k for k in weights if ".q_proj." in k]:
            actual = [weights.pop(key.replace("q_proj", n)) for n in ("q_proj", "k_proj", "v_proj")]
            weights[key.replace("q_proj", "qkv_proj")] = torch.cat(actual)
        wanted = {f"model.{n}": p for n, p in self.model.named_parameters()}
        missing = wanted.keys() - weights.keys()
        if missing:
            raise ValueError(f"Following weights were not initialized from checkpoint: {sorted(missing)}")
        for name, p in wanted.items():
            p.data.copy_(weights.pop(name))
        assert weights.keys() <= {"lm_head.weight"}
        return weights.get("lm_head.weight", wanted["model.embed_tokens.weight"])

    @torch.no_grad()
    def step(self, rows):
        """Logits of every request's new tokens; ``rows``: request -> (ids, first position)."""
        ids = torch.cat([ids for ids, _ in rows.values()])[None]
        positions = torch.cat([torch.arange(start, start + len(ids)) for ids, start in rows.values()])[None]
        outputs = self.model(
            input_ids=ids, inputs_embeds=None, use_cache=False, position_ids=positions, attention_instances=self.pages,
            return_dict=False, requests=[(r, len(ids)) for r, (ids, _) in rows.items()],
        )
        logits = outputs[0][0] @ self.head.T
        return dict(zip(rows, logits.split([len(ids) for ids, _ in rows.values()])))


@pytest.fixture(autouse=True)
def _engine():
    ALL_ATTENTION_FUNCTIONS.register("vllm", engine_attention)
    yield
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("vllm", None)


@pytest.mark.filterwarnings("ignore:emit")
@pytest.mark.parametrize(
    ("name", "spec", "copies"),
    [
        ("llama", dp.Loop(start=1, end=3, times=2, damped=True, inject="concat"), False),
        ("llama", dp.Loop(start=1, end=3, times=2), True),
        ("gemma3_text", dp.LayerProgram([0, 1, 2, 1, 0, 3]), False),  # windows by list
    ],
)
def test_an_engine_serves_it(name, spec, copies, tmp_path):
    model = transformed(name, spec, torch.float32)
    dp.emit(model, tmp_path / "out", copies=copies)
    engine = Engine(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    rows = {r: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator) for r, n in (("a", 9), ("b", 6))}
    # Two prompts in one batch, one of them in two parts, then single tokens beside a part.
    actual = {"a": [], "b": []}
    for step in ({"a": (0, 5), "b": (0, 4)}, {"a": (5, 8), "b": (4, 5)}, {"b": (5, 6)}, {"a": (8, 9)}):
        out = engine.step({r: (rows[r][i:j], i) for r, (i, j) in step.items()})
        for r, logits in out.items():
            actual[r].append(logits)
    assert all(p.calls == 4 for p in engine.pages.values()) and len(engine.pages) == len(model.depth_program.visits)
    for r, ids in rows.items():
        torch.testing.assert_close(torch.cat(actual[r]), model(input_ids=ids[None]).logits[0], rtol=2e-4, atol=2e-4)


def test_what_an_engine_refuses(tmp_path):
    turbo = transformed("llama", dp.TurboConn(bridges=((3, 0),), group=2, rank=4), torch.float32)
    dp.emit(turbo, tmp_path / "turbo")
    with pytest.raises(AssertionError):
        Engine(tmp_path / "turbo")
    reloaded = AutoModel.from_pretrained(tmp_path / "turbo", trust_remote_code=True)
    ids = torch.tensor([[4, 5]])
    with pytest.raises(NotImplementedError, match="vLLM"):
        reloaded(input_ids=ids, attention_instances={0: None})
    reloaded.config._attn_implementation = "vllm"  # newer ones hang their layers on the modules and pass nothing
    with pytest.raises(NotImplementedError, match="vLLM"):
        reloaded(input_ids=ids, use_cache=False)
