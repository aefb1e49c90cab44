"""Arms of an experiment: stock models, programs on them, and twins that cost as much as another arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

import depthpass as dp
from examples.harness.settings import Settings, merge

By = Literal["params", "flops", "seconds", "training FLOPs"]


@dataclass(frozen=True)
class Arm:
    """One curve.

    Attributes:
        name: as it stands in tables.
        spec: passes; None = the stock class itself.
        model: over the experiment's ``model`` settings.
        train: over its ``train`` settings.
        twin: name of an arm that this one equals: a stock model of as many parameters (``params``) or FLOPs per forward pass
            (``flops``), made by ``dp.twin`` from that arm's report; or this arm's own model, trained for as many ``seconds`` or
            ``training FLOPs`` as that arm took with the same seed.
        by: in what.
        facts: what the experiment itself reads.
        control: an arm without the treatment; drawn dashed.
    """

    name: str
    spec: Any = None
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    twin: str | None = None
    by: By | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False

    def plain(self) -> dict[str, Any]:
        """Plain data, for fingerprints and files."""
        fields = asdict(self) | {"spec": None if self.spec is None else dp.dump_spec(self.spec)}
        return fields


def config(given: Mapping[str, Any], vocabulary: int) -> PreTrainedConfig:
    """A Llama, or with ``window`` a Mistral, whose tokens see so many tokens back, themselves counted."""
    g = Settings(given)
    common = dict(
        vocab_size=vocabulary, hidden_size=g.width, intermediate_size=g.feedforward, num_hidden_layers=g.blocks,
        num_attention_heads=g.heads, num_key_value_heads=g.heads, max_position_embeddings=g.get("positions", 1024),
        pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=g.get("tied", False),
        initializer_range=g.get("init", 0.02), rope_parameters={"rope_type": "default", "rope_theta": g.get("theta", 10000.0)},
    )
    window = g.get("window")
    return LlamaConfig(**common) if window is None else MistralConfig(**common, sliding_window=window)


def stock(stock_config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A stock model with the random weights of a seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(stock_config)


def config_of(arm: Arm, arms: Mapping[str, Arm], settings: Settings, vocabulary: int) -> PreTrainedConfig:
    """The stock config below an arm; of a twin the one that ``dp.twin`` makes."""
    own = config(merge(settings.model, arm.model), vocabulary)
    if arm.twin is None or arm.by not in ("params", "flops"):
        return own
    other = arms[arm.twin]
    base = stock(config_of(other, arms, settings, vocabulary), 0)
    model = base if other.spec is None else dp.transform(base, other.spec)
    report = dp.report(model, seq_len=settings.train.length, batch=settings.train.rows)
    return dp.twin(report, by=arm.by)


def transformed(model: PreTrainedModel, arm: Arm, seed: int) -> PreTrainedModel:
    """The arm's program on a stock model; new parameters start from the seed too."""
    if arm.spec is None:
        return model
    torch.manual_seed(10_000 + seed)
    return dp.transform(model, arm.spec)
