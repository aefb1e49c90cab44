"""What the options of T2MLR have to fulfil together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthpass.passes.base import require

if TYPE_CHECKING:
    from depthpass.passes.t2mlr import T2MLR

TWO = ("learned", "rezero")
"""Gates r and i of their own."""
SCORED = (*TWO, "coupled", "variance", "exponential")
"""Gates that are computed from the streams."""
_MEANT = {
    "recurrent": (*SCORED, "constant", "weight"), "input": (*TWO, "constant", "exponential"), "init": SCORED, "reads": SCORED,
    "layers": SCORED, "normalized": TWO, "added": ("coupled", "variance"),
}
"""Gates that an option says something about."""


def check_t2mlr(spec: T2MLR) -> None:
    """Check the options of a T2MLR against each other.

    Raises:
        SpecError: naming the field.
    """
    require(0 <= spec.start <= spec.end, "t2mlr.start", "visits 0 <= start <= end", f"{spec.start}..{spec.end}")
    defaults = {n: f.default for n, f in type(spec).__dataclass_fields__.items()}
    for name, gates in _MEANT.items():
        value = getattr(spec, name)
        advice = "gate='rezero' adds the mixture of two gates." if name == "added" else f"Gates that have it: {', '.join(gates)}."
        require(spec.gate in gates or value == defaults[name], f"t2mlr.{name}", f"{defaults[name]!r} with gate={spec.gate!r}",
                value, advice)
    for name in ("recurrent", "input"):
        value = getattr(spec, name)
        inside = 0 <= value <= 1 if spec.gate == "constant" else 0 < value < 1
        require(inside, f"t2mlr.{name}", f"a share in {'[0, 1]' if spec.gate == 'constant' else '(0, 1)'}", value)
    for name in ("hidden", "activation"):
        alone = spec.layers == 1 and getattr(spec, name) != defaults[name]
        require(not alone, f"t2mlr.{name}", "layers above 1 beside it", spec.layers)
    require(spec.gate == "rezero" or spec.added or not spec.per_channel, "t2mlr.per_channel", "False where nothing is added by "
            "learned shares", spec.per_channel)
    require(spec.layers >= 1, "t2mlr.layers", "at least 1", spec.layers)
    require(spec.hidden is None or spec.hidden >= 1, "t2mlr.hidden", "a width of at least 1", spec.hidden)
    require(spec.project is False or spec.project >= 1, "t2mlr.project", "True, False or a width of at least 1", spec.project)
    require(spec.norm == "rms" or spec.normed in ("streams", "both"), "t2mlr.normed", "'streams' or 'both' with norm='layer'",
            spec.normed)
    rescales = spec.rescaled or spec.normed in ("mixture", "both")
    require(rescales or spec.limit == defaults["limit"], "t2mlr.limit", "something that is rescaled beside it", spec.limit)
    require(spec.into == "memory" or spec.residual != 0, "t2mlr.residual", "a share that is not 0 with into='stream'",
            spec.residual)
    require(spec.detached != "residual" or spec.residual != 0, "t2mlr.residual", "a share that is not 0 with "
            "detached='residual'", spec.residual)
    require(spec.init >= 0, "t2mlr.init", "a standard deviation of at least 0", spec.init)
    require(spec.limit >= 1, "t2mlr.limit", "a factor of at least 1", spec.limit)
    require(spec.scope.isidentifier(), "t2mlr.scope", "a plain name of letters, digits and _", spec.scope)
