"""Which model a Dynamo graph belongs to, and its new parameters."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthpass.errors import SpecError, UnsupportedModelError
from depthpass.ir.program import Program
from depthpass.ir.verify import infer, parameters

_SCORING: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = weakref.WeakKeyDictionary()
"""New parameters of models without attached ones, by spec: all compiled graphs of a model share them."""


def holds_no_model(gm: fx.GraphModule, arguments: Sequence[object]) -> bool:
    """Whether a graph is code around the model that a graph break has cut off, such as a loss: it runs as it is.

    A piece of the model itself is no such case: blocks that are not all in one graph are refused where they are.
    """
    return not any(isinstance(a, nn.Parameter) for a in arguments) and all(
        n.op in ("placeholder", "output", "call_function", "call_method") for n in gm.graph.nodes
    )


def model_of(gm: fx.GraphModule, arguments: Sequence[object]) -> tuple[nn.Module, nn.Module]:
    """The decoder whose parameters are arguments of a graph, and the model that holds its attached parameters.

    Both are the same unless the graph runs the base model of an attached model with a head.

    Raises:
        UnsupportedModelError: no decoder, or several.
    """
    from depthpass.hf.attach import owners

    held = [a for a in arguments if isinstance(a, nn.Parameter)]
    attached = owners(held)
    models = _models_in_scope(gm, held) or attached
    if len(models) != 1:
        names = ", ".join(type(m).__name__ for m in models) or "none"
        raise UnsupportedModelError(
            f"expected one transformers decoder that holds the parameters of this graph, got {names}. Call dp.attach(model, "
            "spec) on the model, and compile one model at a time."
        )
    model = models[0]
    return model, next((a for a in attached if any(m is model for m in a.modules())), model)


def _models_in_scope(gm: fx.GraphModule, weights: Sequence[nn.Parameter]) -> list[nn.Module]:
    """Decoders found at the variables of the compiled frame that Dynamo lifted the parameters from."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    from depthpass.capture.retrace import source_name

    try:
        output = InstructionTranslator.current_tx().output
        scopes = {"L": output.local_scope, "G": output.global_scope}
    except AttributeError:  # another torch keeps them elsewhere: attached models are still found
        return []
    roots: list[nn.Module] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        root = _root(source_name(node), scopes)
        if isinstance(root, nn.Module) and not any(root is r for r in roots):
            roots.append(root)
    wanted = {id(p) for p in weights}
    return [m for m in map(_outermost_decoder, roots) if m is not None and any(id(p) in wanted for p in m.parameters())]


def _root(source: str, scopes: Mapping[str, Mapping[str, object]]) -> object:
    """What a source such as ``L['self']`` starts from; a decorated forward has its model in ``L['args'][0]``."""
    match = re.match(r"([LG])((?:\[(?:\d+|'\w+')\])+)", source)
    value: Any = scopes[match[1]] if match else None
    for number, name in re.findall(r"\[(?:(\d+)|'(\w+)')\]", match[2] if match else ""):
        try:
            value = value[int(number) if number else name]
        except (LookupError, TypeError):
            return None
    return value


def _outermost_decoder(root: nn.Module) -> nn.Module | None:
    from depthpass.capture.screen import find_layers
    from depthpass.hf.modules.context import inner_model

    for module in root.modules():
        # A PEFT wrapper hands on the attributes of the decoder inside it.
        module = inner_model(module)
        try:
            find_layers(module)
        except UnsupportedModelError:
            continue
        return module
    return None


def scoring_parameters(model: nn.Module, key: str, program: Program, arguments: Sequence[Any]) -> nn.Module:
    """New parameters that live in the compiled function only.

    Args:
        key: hash of the spec.

    Raises:
        SpecError: there are some, and the call records gradients: nothing could train them.
    """
    from depthpass.hf.modules.parameters import build

    names = sorted(parameters(program, infer(program)))
    if names and torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise SpecError(
            f"the spec has {len(names)} new parameters (depth.{names[0]}, ...) and the model none attached, so that no "
            "optimizer could train them. Call dp.attach(model, spec) before making the optimizer and compiling; for scoring "
            "call the compiled model under torch.no_grad()."
        )
    cached = _SCORING.setdefault(model, {})
    if key not in cached:
        cached[key] = build(program, next(model.parameters()), model).requires_grad_(False)
        if names:
            warnings.warn(
                f"the {len(names)} new parameters of the spec exist only inside the compiled function, at their initial "
                "values; call dp.attach(model, spec) to hold, train and save them on the model.",
                UserWarning, stacklevel=2,
            )
    return cached[key]
