"""``summary``: a transformed model in one line."""

from __future__ import annotations

from typing import Any

from torch import nn

from depthpass.hf.calls.host import depth_module
from depthpass.hf.modules.parameters import counted
from depthpass.hf.switching.switch import transformed


def summary(model: nn.Module) -> str:
    """What a transformed model is, in one line: its spec, visits, parameters, those that are new and those that train.

    Distinct parameters count once. Inside a PEFT wrapper adapters are counted with the rest::

        >>> print(dp.summary(turbo))                                                                # doctest: +SKIP
        LlamaForCausalLM, turboconn(group=4): 16 visits of 16 blocks || new params: 983,040 || all params: 1,236,797,440
        || trainable: 983,040 (0.0795%)

    Raises:
        SpecError: the model is not transformed.
    """
    inner: Any = transformed(model, "summary")
    sizes = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    whole, trained = sum(n for n, _ in sizes.values()), sum(n for n, trains in sizes.values() if trains)
    program = inner.depth_program
    passes = " + ".join(p.label for p in inner._depth.plan.passes)
    return (f"{type(inner).__name__}, {passes}: {len(program.visits)} visits of {program.blocks} blocks || new params: "
            f"{counted(depth_module(inner)):,} || all params: {whole:,} || trainable: {trained:,} ({100 * trained / whole:.4f}%)")
