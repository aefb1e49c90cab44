"""Passes by name: a lazy table, entry points of other packages, and passes registered at run time."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata

from depthpass.errors import SpecError, did_you_mean
from depthpass.passes.base import Pass

GROUP = "depthpass.passes"
"""Entry-point group for passes of other packages: ``my_pass = "my_package.module:MyPass"``."""

BUILTIN: dict[str, str] = {
    "bidirectional": "depthpass.passes.bidirectional:Bidirectional",
    "coconut": "depthpass.passes.coconut:Coconut",
    "feedback_transformer": "depthpass.passes.feedback:FeedbackTransformer",
    "identity": "depthpass.passes.identity:Identity",
    "inner_thinking": "depthpass.passes.inner_thinking:InnerThinking",
    "intra_layer_recurrence": "depthpass.passes.recurrence:IntraLayerRecurrence",
    "layer_program": "depthpass.passes.layer_program:LayerProgram",
    "loop": "depthpass.passes.loop:Loop",
    "masked_diffusion": "depthpass.passes.masked_diffusion:MaskedDiffusion",
    "mixture_of_depths": "depthpass.passes.mixture_of_depths:MixtureOfDepths",
    "mixture_of_recursions": "depthpass.passes.mixture_of_recursions:MixtureOfRecursions",
    "pad": "depthpass.passes.pad:Pad",
    "parallel_loop": "depthpass.passes.parallel_loop:ParallelLoop",
    "recurrent_loop": "depthpass.passes.recurrent_loop:RecurrentLoop",
    "relaxed_recursion": "depthpass.passes.relaxed_recursion:RelaxedRecursion",
    "repeat": "depthpass.passes.recurrence:Repeat",
    "skip": "depthpass.passes.layer_program:Skip",
    "same_layer_state": "depthpass.passes.same_layer_state:SameLayerState",
    "sum_norms": "depthpass.passes.sum_norms:SumNorms",
    "t2mlr": "depthpass.passes.t2mlr:T2MLR",
    "taps": "depthpass.passes.taps:Taps",
    "turboconn": "depthpass.passes.turboconn:TurboConn",
}

ALIASES = {
    "mor": "mixture_of_recursions", "itt": "inner_thinking", "plt": "parallel_loop", "ilr": "intra_layer_recurrence",
    "mod": "mixture_of_depths",
}
"""Short names that specs may use; they are written back in full."""

_registered: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Make a pass known by its name; usable as a class decorator.

    Raises:
        SpecError: the name is empty or belongs to another pass.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)) or not cls.name:
        raise SpecError(f"register: expected a subclass of Pass with a class attribute `name`, got {cls!r}.")
    known = _table()
    if known.get(cls.name, cls) is not cls and _load(cls.name, known[cls.name]) is not cls:
        raise SpecError(f"register: the name {cls.name!r} already belongs to {known[cls.name]!r}. Choose another name.")
    _registered[cls.name] = cls
    return cls


def pass_names() -> tuple[str, ...]:
    """Names of all known passes, sorted; imports none of them."""
    return tuple(sorted(_table()))


def pass_class(name: str) -> type[Pass]:
    """The pass of this name or alias.

    Raises:
        SpecError: no such pass, two packages claim the name, or the pass cannot be imported.
    """
    table = _table()
    if name not in table:
        name = ALIASES.get(name, name)
    if name not in table:
        raise SpecError(f"pass: unknown name {name!r}.{did_you_mean(name, (*table, *ALIASES))} "
                        f"Known: {', '.join(sorted(table))}.")
    return _load(name, table[name])


def _table() -> dict[str, str | type[Pass]]:
    table: dict[str, str | type[Pass]] = {**BUILTIN}
    for point in _entry_points():
        # An editable install may list the same distribution twice; the same target is no conflict.
        if table.setdefault(point.name, point.value) != point.value:
            raise SpecError(
                f"two passes are called {point.name!r}: {table[point.name]} and {point.value} "
                f"(entry point of {point.dist.name if point.dist else 'an unknown package'}). Rename or uninstall one."
            )
    return {**table, **_registered}


@cache
def _entry_points() -> tuple[metadata.EntryPoint, ...]:
    """Entry points of the group; reading them scans every installed package, so once per process."""
    return tuple(metadata.entry_points(group=GROUP))


def _load(name: str, target: str | type[Pass]) -> type[Pass]:
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"pass {name!r} is registered as {target!r}, which cannot be imported: {error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)) or cls.name != name:
        raise SpecError(f"pass {name!r} is registered as {target!r}: expected a subclass of Pass with that name, "
                        f"got {cls!r}.")
    return cls
