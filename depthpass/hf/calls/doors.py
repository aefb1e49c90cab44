"""The doors of a transformed model: its inner decoder is where the program runs, whoever calls it.

Tools call a model in two ways: as a whole, or its decoder (``model.model``, ``get_decoder()``, ``base_model``) with a head
and a loss of their own. The decoder's forward is the program up to the final norm, and everything around it, the outer
class included, is stock code. A call of the outer class leaves a :class:`Frame` for its decoder: what only the outer call
knows (labels, where the prompt ends), and what the program made besides the decoder's stock outputs.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from depthpass.capture import Capture
from depthpass.errors import InputError, SpecError, UnsupportedModelError
from depthpass.hf.caches.cache import NAMES, STOCK_NAME
from depthpass.hf.modules.placement import needs_root

if TYPE_CHECKING:
    _Stock = PreTrainedModel
else:
    _Stock = object

DISABLED = "a transformed model runs its program itself: pass lowering='inductor' to dp.transform to have it compiled"
"""What Dynamo says where it has to compile a whole graph."""

DECODER = "_depth_decoder"
"""Argument of an outer model that only its decoder is wanted for, with the decoder's arguments: hooks of the model run."""


@dataclass(eq=False)
class Left:
    """What a run of the program leaves besides the stock outputs.

    Attributes:
        captured: the capture that it ran on.
        streams: of the output and of every tap, by name, ``[batch, tokens, width]``.
        heads: taps by name: whether they are handed out as logits.
        losses: training losses by name and their sum with coefficients; None = not computed.
        sweeps: how each serial region was swept; None = not swept.
    """

    captured: Capture
    streams: Mapping[str, Tensor]
    heads: Mapping[str, bool]
    losses: tuple[dict[str, Tensor], Any] | None
    sweeps: tuple | None


@dataclass(eq=False)
class Frame:
    """A call of an outer class, as its decoder sees it.

    Attributes:
        decoder: whom it is for; another model's decoder does not see it.
        model: the outer model.
        arguments: of the outer call, by name.
        cache_name: the argument that a cache was given as.
        answer: what the decoder returns without running anything: the head is being applied to another stream.
        left: what the program left, once it ran.
    """

    decoder: nn.Module
    model: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cache_name: str | None = None
    answer: object = None
    left: Left | None = None


_frame: ContextVar[Frame | None] = ContextVar("depthpass_frame", default=None)


@contextmanager
def inside(frame: Frame | None) -> Iterator[Frame | None]:
    """Let the decoders that are called here see a frame, or none."""
    before = _frame.set(frame)
    try:
        yield frame
    finally:
        _frame.reset(before)


class Door:
    """Leads from a decoder to the model it belongs to, without making the model a submodule of its own part."""

    def __init__(self, model: nn.Module):
        self.model = model


class DepthDecoder(_Stock):
    """Mixin of the inner decoder of a transformed model; the class in front of it stays."""

    _depth_door: Door
    _stock_class: ClassVar[Any]

    @property
    def depth_model(self) -> Any:
        """The transformed model that this decoder belongs to."""
        return self._depth_door.model

    @property
    def depth_program(self):
        return self.depth_model.depth_program

    def save_pretrained(self, *args, **kwargs):
        """Refused: the decoder's own weights are the stock model's, and would be loaded as such.

        Raises:
            SpecError: always.
        """
        raise SpecError(f"save_pretrained: this {type(self).__name__} is the decoder of a transformed "
                        f"{type(self.depth_model).__name__}, which holds the new parameters. Save the whole model.")

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        return (rebuilt, (decoder_class, type(self)._stock_class), *reduced[2:])

    def _answer(self, arguments: dict[str, object]):
        frame = _frame.get()
        if frame is None or frame.decoder is not self:
            if self.depth_model is not self and needs_root(self.depth_model):
                return self.depth_model(**{DECODER: arguments})
            return self.depth_model._run_program(self, arguments, None)
        if frame.answer is not None:
            return frame.answer
        # What runs inside may call decoders as well: not for this frame.
        with inside(None):
            return frame.model._run_program(self, arguments, frame)


def untraced(run: Callable) -> Callable:
    """A forward that graph tracers do not look into: Dynamo runs it as it is and says so, the others are refused.

    Raises:
        UnsupportedModelError: ``torch.export``, ``torch.jit.trace`` or ``torch.fx`` traces the model.
    """
    hidden = torch.compiler.disable(run, reason=DISABLED)

    @functools.wraps(run)
    def forward(self, *args, **kwargs):
        if _exports():
            _refuse_trace(self, "torch.export")
        if torch.compiler.is_dynamo_compiling():
            _say_compiled(self)
        elif torch._C._is_tracing():
            _refuse_trace(self, "torch.jit.trace")
        elif isinstance(args, fx.Proxy) or any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values())):
            _refuse_trace(self, "torch.fx")
        return hidden(self, *args, **kwargs)

    del forward.__wrapped__  # torch.fx would take the arguments of what it wraps for its own
    return forward


def _refuse_script(self) -> None:
    """``torch.jit.script`` asks a module for what to compile instead of it."""
    _refuse_trace(self, "torch.jit.script")


def _exports() -> bool:
    """Whether this thread exports. torch's flag is the whole process's: another thread may be making a capture.

    The flag itself is read: where Dynamo of torch 2.11 compiles, it takes ``torch.compiler.is_exporting()`` for true.
    """
    return torch.compiler._is_exporting_flag and (
        torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0
    )


def _refuse_trace(model: Any, tracer: str) -> None:
    raise UnsupportedModelError(
        f"{tracer}: a transformed {type(model).__name__} decides in Python, for every call, how its program runs (chunks of a "
        "token loop, slots, delay lines), which is no one graph. Export the stock model, dp.restore(model), or for a program "
        "without delays and shared keys dp.materialize(model), which is a stock model."
    )


@functools.partial(torch.compiler.disable, reason=DISABLED)
def _say_compiled(model: Any) -> None:
    whole = getattr(model, "depth_model", model)
    if whole._depth.lowering in ("auto", "eager", "scheduled") and not whole._depth.said_compiled:
        whole._depth.said_compiled = True
        warnings.warn(
            f"torch.compile (also Trainer's torch_compile=True) does nothing to a transformed {type(model).__name__}: "
            f"{DISABLED}.", UserWarning, stacklevel=2,
        )


def rebuilt(class_of: Callable[[type], type], stock: type) -> Any:
    """An empty object of the class that ``class_of`` makes of a stock one, for pickle to fill."""
    cls: Any = class_of(stock)
    return cls.__new__(cls)


def mixed(mixin: type, stock: Any, forward: Callable, **body: Any) -> Any:
    """A class of a mixin in front of a stock class, whose name, text and signature it keeps."""
    body |= {
        "forward": untraced(forward), "_stock_forward": stock.forward, "_stock_class": stock,
        "__prepare_scriptable__": _refuse_script,
        "__doc__": stock.__doc__, "__module__": stock.__module__, "__qualname__": stock.__qualname__,
    }
    body["forward"].__signature__ = inspect.signature(stock.forward)
    return type(stock.__name__, (mixin, stock), body)


@functools.cache
def decoder_class(stock: Any) -> Any:
    """The class of decoders of transformed models; it keeps the stock class's name."""

    @functools.wraps(stock.forward)
    def forward(self, *args, prompt_length=None, **kwargs):
        arguments, _ = bind(type(self)._stock_class, self, args, kwargs)
        if prompt_length is not None:
            arguments["prompt_length"] = prompt_length
        return self._answer(arguments)

    return mixed(DepthDecoder, stock, forward)


def decoder_path(model: nn.Module, layers: str) -> str:
    """Path of the innermost transformers model around the blocks, ``""`` for the model itself."""
    path = layers
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            return path
    return ""


@functools.cache
def call_names(cls: type) -> tuple[str, ...]:
    """Names of the arguments of a class's forward: its own, and its parents' as far as it passes unknown ones on."""
    names: dict[str, None] = {}
    for signature in _forwards(cls):
        kinds = [p.kind for p in signature.parameters.values()]
        names |= dict.fromkeys(
            n for n, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n != "self"
        )
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return tuple(names)


def _forwards(cls: type) -> list[inspect.Signature]:
    return [inspect.signature(vars(c)["forward"]) for c in cls.__mro__
            if "forward" in vars(c) and c is not nn.Module]


@functools.cache
def _named(cls: type) -> inspect.Signature:
    """The first signature of a class's forward that names its positional arguments."""
    variadic = inspect.Parameter.VAR_POSITIONAL
    return next((s for s in _forwards(cls) if all(p.kind is not variadic for p in s.parameters.values())),
                inspect.signature(cls.forward))


def bind(cls: type, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call by the names of the stock forward, and those that the stock forward takes by keyword.

    A cache may have either of its two names; the stock forward gets it under its own.
    """
    signature = _named(cls)
    named_caches = {n: kwargs[n] for n in NAMES if n in kwargs}
    rest = {n: v for n, v in kwargs.items() if n not in named_caches or n in signature.parameters}
    arguments = dict(signature.bind_partial(model, *args, **rest).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(name, ()):
            raise InputError(f"{cls.__name__}: expected arguments by name, got some by position that no forward names.")
    arguments.pop(next(iter(signature.parameters)), None)
    given = {n: v for n, v in kwargs.items() if n not in named_caches}
    if caches := [c for c in named_caches.values() if c is not None]:
        given[next((n for n in NAMES if n in call_names(cls)), STOCK_NAME)] = caches[0]
    return arguments | named_caches, given


def replaced(cls: type, args: tuple, kwargs: dict[str, Any], name: str, value: object) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another value for one of them, by position or by name as it was given."""
    names = list(_named(cls).parameters)[1:]
    at = names.index(name) if name in names else len(args)
    if at < len(args):
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}
