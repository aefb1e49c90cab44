"""Where the hooks of a model are, as far as its decoder runs captured graphs instead of modules.

A tool may also put an object of its own in place of a module's ``forward`` (nnsight does). Functions there are part of
what a model computes, and traced; such an object acts at run time, like a hook.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

from torch import nn

from depthpass.capture.quiet import global_hook_tables
from depthpass.errors import UnsupportedModelError
from depthpass.hf.modules.placement import is_flattened, is_placed, is_reentrant, is_wrapper, own_forward, unwrapped

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_LIBRARIES = ("torch.", "accelerate.", "transformers.", "depthpass.")


def hook_tables(module: nn.Module) -> tuple[dict, ...]:
    """Where a module keeps what runs around its forward."""
    return tuple(getattr(module, name) for name in _TABLES)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its forward.

    Torch's wrapper around it that checkpoints its activations counts; what accelerate puts around it to move tensors does not.
    What transformers and PEFT put on embeddings for reentrant checkpoints, which are refused, does not count.
    """
    return is_controlled(module) or is_wrapper(module) or any(
        not getattr(h, "__name__", "").startswith("make_inputs_require_grad")
        for table in hook_tables(module) for h in table.values()
    )


def is_controlled(module: nn.Module) -> bool:
    """Whether a tool's object stands in place of a module's forward."""
    if "_hf_hook" in module.__dict__ and not is_placed(module):
        return True
    forward = own_forward(module)
    return forward is not None and not isinstance(forward, types.FunctionType | types.MethodType | functools.partial)


def is_wrapped(block: nn.Module) -> bool:
    """Whether something was put around the forward that a transform has given a block."""
    forward = own_forward(unwrapped(block))
    return forward is not None and getattr(getattr(forward, "func", None), "__name__", "") != "block_forward"


@dataclass(frozen=True)
class Hooked:
    """Hooks of a decoder.

    Attributes:
        inside: blocks with hooks on modules inside them.
        outer: whether the embedding, a position table or the final norm has hooks.
        parameters: whether new modules (under ``depth.``) have hooks.
        own: blocks with hooks of a user's on them or in them, or something around their forward: not those of FSDP,
            accelerate or transformers.
    """

    inside: frozenset[int]
    outer: bool
    parameters: bool
    own: frozenset[int]

    @property
    def live(self) -> bool:
        """Whether something has to run as modules."""
        return bool(self.inside or self.outer)


def _of_library(hook: object) -> bool:
    """Whether a hook is of a library that knows what it sees."""
    function = getattr(hook, "func", hook)
    return (getattr(function, "__module__", None) or "").startswith(_OF_LIBRARIES)


def check_rows_alike(module: nn.Module) -> None:
    """Refuse PEFT's batches of several adapters, whose hooks hand one adapter name for each row of the call to every layer.

    Raises:
        UnsupportedModelError: naming the argument.
    """
    for hook in module._forward_pre_hooks.values():
        if getattr(getattr(hook, "func", None), "__name__", "") == "_adapter_names_pre_forward_hook":
            raise UnsupportedModelError(
                "adapter_names: rows with different adapters in one call are not supported; visits run on other rows than the "
                "call's, and each adapter has new parameters of its own. Call the model once for each adapter."
            )


def find_hooks(decoder: nn.Module, layers: nn.ModuleList, depth: nn.Module | None) -> Hooked:
    """The hooks of a decoder and its blocks."""
    inside, own, within = set(), set(), set()
    for index, block in enumerate(layers):
        if is_wrapped(block) and not _of_library(block.forward):
            own.add(index)
        for module in block.modules():
            within.add(module)
            if has_hooks(module):
                check_rows_alike(module)
                if module is not block and not (is_wrapper(block) and module is unwrapped(block)):
                    inside.add(index)
                if is_controlled(module) or not all(_of_library(h) for table in hook_tables(module) for h in table.values()):
                    own.add(index)
    new = set() if depth is None else set(depth.modules())
    outer = any(has_hooks(m) for m in decoder.modules() if m not in within and m not in new and m is not decoder)
    return Hooked(frozenset(inside), outer, any(map(has_hooks, new)), frozenset(own))


def drop_capturing_hooks(model: nn.Module) -> None:
    """Remove the hooks that transformers leaves on a model after one call with ``output_hidden_states=True``.

    They only fill those outputs, which a transformed model does not hand out. The model must be a copy: the stock model
    keeps its own, and installs them again when it is asked for the outputs.
    """
    for module in model.modules():
        for key in [k for k, h in module._forward_hooks.items() if getattr(h, "__name__", "") == "output_capturing_hook"]:
            del module._forward_hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def without_hooks(model: nn.Module) -> nn.Module:
    """Make a private copy traceable: no hooks (a block's own run when it is called) and no checkpoints."""
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
                      module._backward_pre_hooks):
            table.clear()
        if getattr(module, "gradient_checkpointing", False):
            module.__dict__["gradient_checkpointing"] = False
    return model


def check_hooks() -> None:
    """Refuse hooks of all modules: inside the decoder only what has hooks of its own is called as modules.

    Raises:
        UnsupportedModelError: naming such a hook.
    """
    for hook in (h for t in global_hook_tables()[:4] for h in t.values()):
        # Torch's own count and look: they change nothing.
        if not getattr(hook, "__module__", "").startswith("torch."):
            raise UnsupportedModelError(
                f"{getattr(hook, '__qualname__', repr(hook))} is a hook of all modules (torch.nn.modules.module."
                "register_module_*_hook), which a transformed model would run on its blocks but not inside them: these run as "
                "captured graphs. Remove it, or register hooks on the modules themselves."
            )


def check_wrappers(model: nn.Module) -> None:
    """Refuse wrappers that keep values from the program: reentrant ones for activation checkpoints, and FSDP1.

    Raises:
        UnsupportedModelError: naming the module.
    """
    for name, module in model.named_modules():
        if is_flattened(module):
            raise UnsupportedModelError(
                f"{name or type(model).__name__}: FullyShardedDataParallel (FSDP1) flattens parameters into one and hands out "
                "views of it that end with a module's call; a program reads them between calls as well. Use "
                "torch.distributed.fsdp.fully_shard, in accelerate fsdp_version: 2 (docs/distributed.md)."
            )
        if is_reentrant(module):
            raise UnsupportedModelError(
                f"{name}: checkpoint_impl=CheckpointImpl.REENTRANT would lose the gradient through keys, values and delays, "
                "which leave a block besides its output. Use CheckpointImpl.NO_REENTRANT, the default of checkpoint_wrapper."
            )
