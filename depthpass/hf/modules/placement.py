"""Where tools keep the tensors of a model between uses, and how to have them at hand for a time.

Two tools take parameters away between calls of modules. FSDP2 (``fully_shard``) gathers a unit's shards in a hook of the
unit. accelerate (``device_map``, ``cpu_offload``, ``disk_offload``) puts an object with its own ``forward`` around modules,
which brings their weights from memory or disk and moves what they are called with. A captured graph calls no modules, so
whoever runs one asks here for the tensors that it reads. Neither library is imported: their objects are known by what they
have.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from depthpass.capture.export import sharing_copy
from depthpass.errors import UnsupportedModelError
from depthpass.ir.program import Program

_WRAPPED = "_checkpoint_wrapped_module"


def unwrapped(module: nn.Module) -> Any:
    """The module inside torch's wrappers for activation checkpoints and offloading (``apply_activation_checkpointing``)."""
    while (inner := module._modules.get(_WRAPPED)) is not None:
        module = inner
    return module


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only wraps another one in an activation checkpoint."""
    return module._modules.get(_WRAPPED) is not None


def is_reentrant(module: nn.Module) -> bool:
    """Whether a module wraps another one in a reentrant checkpoint."""
    return is_wrapper(module) and getattr(getattr(module, "checkpoint_impl", None), "name", "") == "REENTRANT"


# accelerate


def align_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that move tensors between devices."""
    hook = module.__dict__.get("_hf_hook")
    hooks = [] if hook is None else getattr(hook, "hooks", [hook])
    return [h for h in hooks if hasattr(h, "execution_device") and hasattr(h, "io_same_device")]


def is_placed(module: nn.Module) -> bool:
    """Whether what accelerate has put around a module's forward only moves tensors."""
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and len(align_hooks(module)) == len(getattr(hook, "hooks", [hook]))


def own_forward(module: nn.Module) -> Callable | None:
    """The forward that was put on a module itself, inside of accelerate's; None = its class's."""
    if "_hf_hook" not in module.__dict__:
        return module.__dict__.get("forward")
    inner = module.__dict__.get("_old_forward")
    bound = getattr(inner, "__self__", None) is module
    plain = bound and getattr(type(module), "forward", None) is getattr(inner, "__func__", None)
    return None if plain else inner


def set_forward(module: nn.Module, forward: Callable | None) -> None:
    """Give a module a forward of its own, or its class's back (None), inside of accelerate's."""
    if "_hf_hook" in module.__dict__:
        module.__dict__["_old_forward"] = type(module).forward.__get__(module) if forward is None else forward
    elif forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward


def copied(model: nn.Module) -> Any:
    """A copy of a module tree that shares its tensors, and where accelerate keeps those that are not loaded."""
    new_model = sharing_copy(model, _weights(model))
    for old, new in zip(model.modules(), new_model.modules(), strict=True):
        if "_hf_hook" in old.__dict__:
            # accelerate warns in these that a dispatched model should not be moved; they know the old model.
            for name in ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"):
                if isinstance(held := new.__dict__.get(name), types.FunctionType):
                    new.__dict__[name] = _of(held, old, new)
    return new_model


def _of(function: Any, old: nn.Module, new: nn.Module) -> Any:
    """A function that closes over one model, for another one."""
    def mapped(value: Any) -> Any:
        if value is old:
            return new
        return types.MethodType(value.__func__, new) if getattr(value, "__self__", None) is old else value

    cells = tuple(types.CellType(mapped(c.cell_contents)) for c in function.__closure__ or ())
    rebound = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    rebound.__dict__.update(function.__dict__)
    return rebound


def _weights(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        for hook in align_hooks(module):
            for held in (hook.weights_map, hook.tied_params_map):
                if held is not None:
                    yield held


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves tensors of this model."""
    return any(map(align_hooks, model.modules()))


def home(model: nn.Module) -> torch.device:
    """The device that a model's streams are on: that of its tensors, or the one that offloaded ones are brought to."""
    for module in model.modules():
        for hook in align_hooks(module):
            if hook.execution_device is not None:
                device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(iter(model.parameters())).device


def check_devices(blocks: Iterable[nn.Module], program: Program) -> None:
    """Refuse blocks on several devices for programs whose visits keep more than keys and values there.

    Raises:
        UnsupportedModelError: naming the devices.
    """
    held = {h.execution_device for block in blocks for m in block.modules() for h in align_hooks(m)} - {None}
    devices = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in held}
    shares = any(o["gate"] or o["keys"] is not None for o in program.visits)
    if len(devices) > 1 and (shares or any(o.kind == "route" for o in program)):
        raise UnsupportedModelError(
            f"device_map: blocks run on {', '.join(sorted(devices))}, but routed tokens and keys that visits share have to be on "
            "one device. Put the blocks on one (offloading to CPU or disk does not count)."
        )


@contextmanager
def resident(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have the weights of modules loaded for a time, those that accelerate offloads."""
    with ExitStack() as stack:
        for module in modules:
            for hook in align_hooks(module):
                if hook.offload:
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield


def keep_streams_home(blocks: Iterable[nn.Module], new: nn.Module) -> None:
    """Let blocks and new modules on other devices return what they compute to where their input was."""
    for module in (*blocks, *new.modules()):
        for hook in align_hooks(module):
            hook.io_same_device = True


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, offloaded ones as accelerate keeps them (files stay mapped, not read)."""
    state = model.state_dict()
    for path, module in model.named_modules():
        for hook in align_hooks(module):
            if not hook.offload:
                continue
            for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                key = f"{path}.{name}" if path else name
                if t.is_meta and key in state:
                    state[key] = hook.weights_map[name]
    return state


# FSDP2


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is spread over processes (a DTensor)."""
    return tensor is not None and hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def _state(module: nn.Module) -> Any:
    """FSDP2's state of a unit; None for other modules."""
    get = getattr(module, "_get_fsdp_state", None)
    return None if get is None else get()


def _groups(module: nn.Module) -> list[Any]:
    state = _state(module)
    if state is None:
        return []
    many = getattr(state, "_fsdp_param_groups", None)
    one = None if many is not None else state._fsdp_param_group
    return many if many is not None else [] if one is None else [one]


def is_flattened(module: nn.Module) -> bool:
    """Whether FSDP1 (``FullyShardedDataParallel``) has flattened parameters of a module into one; FSDP2 keeps them apart."""
    if "_fsdp_wrapped_module" in module._modules or module.__dict__.get("_fsdp_use_orig_params") is False:
        return True
    # While the wrapper around them runs, parameters are plain views of the flat one; FSDP2's stay parameters.
    return "_is_fsdp_managed_module" in module.__dict__ and any(
        p is not None and (not isinstance(p, nn.Parameter) or getattr(p, "_fsdp_flattened", False))
        for p in module._parameters.values()
    )


def sharded_dtypes(modules: Iterable[nn.Module]) -> dict[int, torch.dtype]:
    """The dtypes in which FSDP2's mixed precision hands out sharded parameters, by the ids of the shards."""
    return {
        id(p.sharded_param): group.mp_policy.param_dtype
        for module in modules for group in _groups(module) if group.mp_policy.param_dtype is not None
        for p in group.fsdp_params if p.sharded_param.is_floating_point()
    }


def gather_new(new: nn.Module) -> None:
    """Have the new parameters whole that are FSDP units of their own: not all of them are called as modules.

    FSDP2 takes them back, and reduces their gradients, at the end of the backward pass.
    """
    for module in new.modules():
        if _state(module) is not None:
            cast(Any, module).unshard()


def needs_root(model: nn.Module) -> bool:
    """Whether a part of a model is called outside of a call of the model, which FSDP2 has to see: it gathers the parameters
    that no unit inside it has."""
    state = _state(model)
    return state is not None and state._training_state.name != "FORWARD"


def gathered_state(model: nn.Module) -> Mapping[str, Tensor] | None:
    """All weights of a sharded model, in the first process; every process has to ask. None = the model is not sharded."""
    # Between passes the root unit may have its parameters whole, which a state dict takes back first.
    if not any(map(_state, model.modules())) and not any(map(is_sharded, model.parameters())):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
