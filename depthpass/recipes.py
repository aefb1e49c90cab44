"""Recipes: published systems as a spec for a given model, with the settings that go with it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from depthpass.annotations import checked
from depthpass.errors import SpecError, did_you_mean
from depthpass.limits import VISITS, shown
from depthpass.passes.base import Pass
from depthpass.passes.layer_program import LayerProgram
from depthpass.passes.loop import Loop
from depthpass.prompt import at_prompt


@at_prompt
@dataclass(frozen=True)
class Recipe:
    """What it takes to train and run a published system.

    Attributes:
        name: of the system.
        spec: for :func:`depthpass.transform`.
        training: arguments of the loss or callback that :meth:`callback` and the paper's text name.
        notes: what the spec does not say.
    """

    name: str
    spec: tuple[Pass, ...]
    training: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def transform(self, model: Any, **options: Any) -> Any:
        """``dp.transform(model, recipe.spec, **options)``."""
        from depthpass.hf.transform import transform

        return transform(model, self.spec, **options)

    def callback(self) -> Any:
        """The Trainer callback of its curriculum.

        Raises:
            SpecError: it has none.
        """
        if "curriculum" not in self.training:
            raise SpecError(f"recipe {self.name}: expected one with a curriculum, got one without. Use a Trainer as it is.")
        from depthpass.hf.training.callbacks import RecurrenceCurriculum

        return RecurrenceCurriculum(**self.training["curriculum"])

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {', '.join(p.label for p in self.spec)}", *self.notes])


@checked("recipes.huginn", SpecError)
def huginn(
    blocks: Any, *, prelude: int = 2, core: int = 4, coda: int = 2, mean: float | None = 32.0, most: int | None = None,
    bptt: int = 8, ramp: float = 0.25, keep: str = "late", **options: Any,
) -> Recipe:
    """Huginn's recurrent depth (arXiv 2502.05171) on a stock model, as in the retrofit of arXiv 2511.07384.

    The first ``prelude`` blocks, ``core`` blocks that run r times on an adapter of (state, prelude's result) and start from
    cut-off noise, then the last ``coda`` blocks; blocks in between are left out. Training draws r around ``mean`` and takes
    gradients through the last ``bptt`` iterations; evaluation runs ``mean`` of them, rounded.

    Args:
        blocks: the model, its config, or its number of blocks.
        prelude, core, coda: how many blocks.
        mean: of the iterations; None = a fixed number, ``times=`` among the options.
        most: largest count that is drawn; None = four times the mean.
        bptt: iterations with gradients.
        ramp: share of the steps over which the curriculum raises the mean from 0; 0 = none.
        keep: whether the core is made of the blocks before the coda (``late``) or behind the prelude (``early``).
        options: of :class:`depthpass.Loop`: ``exit``, ``criterion``, ``kv``, ...

    Raises:
        SpecError: more blocks than the model has, or options that the loop does not know.
    """
    total = _blocks(blocks)
    _check_options("huginn", options)
    for name, value, least in (("prelude", prelude, 0), ("core", core, 1), ("coda", coda, 0)):
        if value < least:
            raise SpecError(f"recipes.huginn.{name}: expected an integer of at least {least}, got {value!r}.")
    if prelude + core + coda > total:
        raise SpecError(f"recipes.huginn: expected at most the model's {total} blocks in prelude, core and coda, got "
                        f"{prelude} + {core} + {coda}.")
    if keep not in ("late", "early"):
        raise SpecError(f"recipes.huginn.keep: expected 'late' or 'early', got {keep!r}.")
    first = total - coda - core if keep == "late" else prelude
    kept = [*range(prelude), *range(first, first + core), *range(total - coda, total)]
    whole, passes = kept == list(range(total)), []
    if not whole:
        passes.append(LayerProgram(kept))
    note = f"blocks {kept} of {total}; {total - len(kept)} left out"
    if mean is None:
        return Recipe("huginn", (*passes, Loop.huginn(prelude, prelude + core, **options)), {}, (note,))
    top, fixed = max(1, round(4 * mean)) if most is None else most, max(1, round(mean))
    loop = Loop.huginn(prelude, prelude + core, **{"times": (1, top), "mean": float(mean), "bptt": bptt, **options})
    curriculum = {"mean": float(mean), "most": top, "ramp": ramp, "eval_times": fixed}
    return Recipe("huginn", (*passes, loop), {"curriculum": curriculum} if ramp else {}, (
        note, f"evaluation runs {fixed} iterations; dp.set_loops(model, r) any other number",
    ))


@checked("recipes.ouro", SpecError)
def ouro(*, times: int = 4, exit: float = 0.5, stage: int = 1, **options: Any) -> Recipe:
    """Ouro / LoopLM (arXiv 2510.25741): the whole stack ``times`` times, the final norm in between, a learned exit gate.

    Stage 1 trains everything with ``dp.exit_loss(out, labels, form="expected", beta=0.1)`` (the public code:
    ``form="mixture"``); stage 2 the gate alone: ``dp.only_gates(model)`` and ``dp.gate_loss(out, labels)``. Decode with
    ``dp.set_exit(model, q, skip=True)``.

    Args:
        times: iterations.
        exit: q, the cumulative exit probability at which a token leaves when decoding.
        stage: 1 or 2; 0 = for decoding: tokens that left skip visits, nothing is tapped.
        options: of :class:`depthpass.Loop`.

    Raises:
        SpecError: an unknown stage, or options that the loop does not know.
    """
    if stage not in (0, 1, 2):
        raise SpecError(f"recipes.ouro.stage: expected 1, 2, or 0 for decoding, got {stage!r}.")
    _check_options("ouro", options)
    train = stage > 0
    loop = Loop(**{"times": times, "normalize": "loop", "exit": exit, "skip": not train, "taps": train, **options})
    training = {1: {"loss": "exit_loss", "form": "expected", "beta": 0.1}, 2: {"loss": "gate_loss"}}.get(stage, {})
    return Recipe("ouro", (loop,), training)


def from_huginn(config: Any, tensors: Any, **options: Any) -> Any:
    """The public Huginn checkpoint as a transformed Llama; see :func:`depthpass.hf.checkpoints.public.huginn_model`."""
    from depthpass.hf.checkpoints.public import huginn_model

    return huginn_model(config, tensors, **options)


def from_ouro(config: Any, tensors: Any, **options: Any) -> Any:
    """The public Ouro checkpoint as a transformed GLM-4; see :func:`depthpass.hf.checkpoints.public.ouro_model`."""
    from depthpass.hf.checkpoints.public import ouro_model

    return ouro_model(config, tensors, **options)


def _check_options(recipe: str, options: dict[str, Any]) -> None:
    known = [f.name for f in fields(Loop)]
    for name in options:
        if name not in known:
            raise SpecError(f"recipes.{recipe}: unknown option {name!r}.{did_you_mean(name, known)} Options are those of "
                            "dp.Loop.")


def _blocks(source: Any) -> int:
    """Blocks of a model or config, or the number itself."""
    if type(source) is int:
        if not 1 <= source <= VISITS:
            raise SpecError(f"recipes: expected 1 to {VISITS} blocks, got {shown(source)}.")
        return source
    config = getattr(source, "config", source)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    blocks = getattr(text, "num_hidden_layers", None)
    if type(blocks) is not int:
        raise SpecError(f"recipes: expected a model, a config or a number of blocks, got {type(source).__name__}.")
    return blocks
