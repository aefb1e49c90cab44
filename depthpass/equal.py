"""``twin``: the stock model that costs what a program costs, to train beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from depthpass.errors import SpecError, did_you_mean
from depthpass.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from depthpass.report.report import Report

BY = ("flops", "params")
_STEP = 8
"""Feed-forward widths stay multiples of this where the stock one is."""


def twin(report: Report, by: Literal["flops", "params"] = "flops") -> PreTrainedConfig:
    """The config of a stock model with the forward FLOPs, or the parameters, of a report.

    It has as many blocks as stay below, and then wider feed-forward layers up to the number (the nearest number of blocks
    where the config has no single width). Everything else is as in the reported model's own config. The logger ``depthpass``
    says at level INFO how near it came::

        report = dp.report(model, spec, seq_len=512)
        rival = AutoModelForCausalLM.from_config(dp.twin(report, by="flops"))

    Args:
        report: of a model or config, with its cost where FLOPs are asked for.
        by: ``flops``: of a forward pass at the report's length and batch; ``params``: distinct parameters, new ones counted.

    Raises:
        SpecError: the report is of a program without a model, has no cost, does not know the size of its new parameters, or
            asks for less than one block.
    """
    if by not in BY:
        raise SpecError(f"twin: by: expected 'flops' or 'params', got {by!r}.{did_you_mean(str(by), BY)}")
    config = None if report.facts is None else report.facts.config
    if config is None:
        raise SpecError("twin: expected a report on a model or config, got one on a program alone.")
    target, count = _target(report, by), _counter(report, by)
    # Of the report's own model; blocks that follow are like those before them.
    blocks = len(report.facts.block_parameters) if report.facts is not None else 0
    layers = _layers(lambda n: count(resized(config, blocks, n)), blocks, target)
    rival = _widened(resized(config, blocks, layers), count, target)
    if rival is None:
        options = [resized(config, blocks, n) for n in (layers, layers + 1)]
        rival = min(options, key=lambda c: abs(count(c) - target))
    reached = count(rival)
    logger.info("twin by %s: %.6g of %.6g (%+.2f %%)", by, reached, target, 100 * (reached / target - 1))
    return rival


def _target(report: Report, by: str) -> float:
    if by == "flops":
        if report.cost is None:
            raise SpecError("twin: by='flops' needs a report with its cost, got one without. Leave cost=False out, or use "
                            "by='params'.")
        return report.cost.at("FLOPs forward", report.seq_len, report.batch)
    if report.unsized_parameters:
        raise SpecError(f"twin: by='params': the report does not know the size of {', '.join(report.unsized_parameters)}. Report "
                        "on the transformed model.")
    assert report.facts is not None
    return float(report.facts.parameters + report.new_parameters)


def _counter(report: Report, by: str) -> Callable[[Any], float]:
    """Counts a config as the report was counted."""
    from depthpass.hf.facts import model_facts
    from depthpass.report.subject import Subject

    def count(config: Any) -> float:
        if by == "params":
            return float(model_facts(config).parameters)
        cost = Subject.of(config).report(seq_len=report.seq_len, batch=report.batch).cost
        assert cost is not None
        return cost.at("FLOPs forward", report.seq_len, report.batch)

    known: dict[str, float] = {}

    def once(config: Any) -> float:
        key = config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = count(config)
        return known[key]

    return once


def _layers(count: Callable[[int], float], blocks: int, target: float) -> int:
    """The most blocks that stay at or below the target."""
    step = count(blocks + 1) - count(blocks)
    layers = max(1, blocks + int((target - count(blocks)) // step))
    while layers > 1 and count(layers) > target:
        layers -= 1
    while count(layers + 1) <= target:
        layers += 1
    if count(layers) > target:
        raise SpecError(f"twin: expected at least what one block costs, {count(1):.6g}, got a report of {target:.6g}.")
    return layers


def resized(config: Any, blocks: int, layers: int) -> Any:
    """A config with another number of blocks; lists with an entry per block go on as they began."""
    resized_config = copy.deepcopy(config)
    for held in {id(c): c for c in (resized_config, resized_config.get_text_config(decoder=True))}.values():
        for name, value in list(vars(held).items()):
            if isinstance(value, list | tuple) and len(value) == blocks and blocks > 1 and name != "architectures":
                setattr(held, name, [value[i % blocks] for i in range(layers)])
        if hasattr(held, "num_hidden_layers"):
            held.num_hidden_layers = layers
    return resized_config


def _widened(config: Any, count: Callable[[Any], float], target: float) -> Any | None:
    """The config with wider feed-forward layers; None where no one width decides about them."""
    width = getattr(config.get_text_config(decoder=True), "intermediate_size", None)
    if not isinstance(width, int):
        return None
    step = _STEP if width % _STEP == 0 else 1

    def at(size: int) -> Any:
        wider = copy.deepcopy(config)
        wider.get_text_config(decoder=True).intermediate_size = size
        return wider

    slope = (count(at(width + step)) - count(config)) / step
    if slope <= 0:
        return None
    return at(width + step * round((target - count(config)) / slope / step))
