"""depthpass: a compiler pass for transformer depth.

Rewire any stock Hugging Face decoder over layers and tokens, read how deep it now is, train it, generate from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import depthpass_kernels as kernels
    import depthpass_lowering as lowering

    from depthpass import recipes, tasks
    from depthpass.analysis.contraction import contraction
    from depthpass.analysis.gradients import gradients
    from depthpass.analysis.lens import logit_lens
    from depthpass.compared import compare, sweep
    from depthpass.diffusion import denoise, diffusion_loss
    from depthpass.emit import emit
    from depthpass.equal import twin
    from depthpass.errors import (
        CacheError,
        CheckpointError,
        DepthpassError,
        InputError,
        LoweringError,
        ParseError,
        PassError,
        SpecError,
        UnsupportedModelError,
        VerifyError,
    )
    from depthpass.hf.attach import attach
    from depthpass.hf.caches.cache import DepthCache
    from depthpass.hf.checkpoints.materialize import materialize
    from depthpass.hf.checkpoints.pretrained import from_pretrained
    from depthpass.hf.decoding.coevolution import CoevolutionaryDiffusion
    from depthpass.hf.decoding.contrast import LoopContrast
    from depthpass.hf.model import DepthModel
    from depthpass.hf.summary import summary
    from depthpass.hf.switching.exits import only_gates, set_exit
    from depthpass.hf.switching.ratios import CapacityWarmup, capacity_warmup, set_ratios
    from depthpass.hf.switching.routing import routing_of
    from depthpass.hf.switching.switch import loops_of, set_loops, switch, using
    from depthpass.hf.training.calibrate import calibrate
    from depthpass.hf.training.callbacks import FlopsLedger, RecurrenceCurriculum, ShiftSchedule, StopAtFlops
    from depthpass.hf.training.latent_curriculum import LatentCurriculum
    from depthpass.hf.transform import new_parameters, restore, transform
    from depthpass.ir import Program, parse_program
    from depthpass.log import progress
    from depthpass.losses import aligned_targets, exit_loss, gate_loss, relay_loss
    from depthpass.passes.bidirectional import Bidirectional
    from depthpass.passes.coconut import Coconut
    from depthpass.passes.feedback import FeedbackTransformer
    from depthpass.passes.identity import Identity
    from depthpass.passes.inner_thinking import InnerThinking
    from depthpass.passes.layer_program import LayerProgram, Skip
    from depthpass.passes.loop import Loop
    from depthpass.passes.masked_diffusion import MaskedDiffusion
    from depthpass.passes.mixture_of_depths import MixtureOfDepths
    from depthpass.passes.mixture_of_recursions import MixtureOfRecursions
    from depthpass.passes.pad import Pad
    from depthpass.passes.parallel_loop import ParallelLoop
    from depthpass.passes.recurrence import IntraLayerRecurrence, Repeat
    from depthpass.passes.recurrent_loop import RecurrentLoop
    from depthpass.passes.relaxed_recursion import RelaxedRecursion
    from depthpass.passes.same_layer_state import SameLayerState
    from depthpass.passes.sum_norms import SumNorms
    from depthpass.passes.t2mlr import T2MLR
    from depthpass.passes.taps import Taps
    from depthpass.passes.turboconn import TurboConn
    from depthpass.report import report
    from depthpass.report.tokens import plot_depth
    from depthpass.schedule.fixed_point import FixedPoint
    from depthpass.search import SearchResult, search
    from depthpass.spec import dump_spec, load_spec

__version__ = "0.1.0"

# Group -> public name -> module that defines it. Everything is imported on first use, so that `import depthpass` stays
# quick. The imports above say the same to type checkers and editors.
GROUPS: dict[str, dict[str, str]] = {
    "transform": {
        "transform": "depthpass.hf.transform",
        "restore": "depthpass.hf.transform",
        "new_parameters": "depthpass.hf.transform",
        "materialize": "depthpass.hf.checkpoints.materialize",
        "emit": "depthpass.emit",
        "from_pretrained": "depthpass.hf.checkpoints.pretrained",
        "attach": "depthpass.hf.attach",
        "load_spec": "depthpass.spec",
        "dump_spec": "depthpass.spec",
        "DepthModel": "depthpass.hf.model",
        "DepthCache": "depthpass.hf.caches.cache",
        "FixedPoint": "depthpass.schedule.fixed_point",
    },
    "passes": {
        "Bidirectional": "depthpass.passes.bidirectional",
        "Coconut": "depthpass.passes.coconut",
        "FeedbackTransformer": "depthpass.passes.feedback",
        "Identity": "depthpass.passes.identity",
        "InnerThinking": "depthpass.passes.inner_thinking",
        "IntraLayerRecurrence": "depthpass.passes.recurrence",
        "LayerProgram": "depthpass.passes.layer_program",
        "Loop": "depthpass.passes.loop",
        "MaskedDiffusion": "depthpass.passes.masked_diffusion",
        "MixtureOfDepths": "depthpass.passes.mixture_of_depths",
        "MixtureOfRecursions": "depthpass.passes.mixture_of_recursions",
        "Pad": "depthpass.passes.pad",
        "ParallelLoop": "depthpass.passes.parallel_loop",
        "RecurrentLoop": "depthpass.passes.recurrent_loop",
        "RelaxedRecursion": "depthpass.passes.relaxed_recursion",
        "Repeat": "depthpass.passes.recurrence",
        "Skip": "depthpass.passes.layer_program",
        "SameLayerState": "depthpass.passes.same_layer_state",
        "SumNorms": "depthpass.passes.sum_norms",
        "T2MLR": "depthpass.passes.t2mlr",
        "Taps": "depthpass.passes.taps",
        "TurboConn": "depthpass.passes.turboconn",
    },
    "analyse": {
        "report": "depthpass.report",
        "compare": "depthpass.compared",
        "sweep": "depthpass.compared",
        "twin": "depthpass.equal",
        "summary": "depthpass.hf.summary",
        "plot_depth": "depthpass.report.tokens",
        "contraction": "depthpass.analysis.contraction",
        "gradients": "depthpass.analysis.gradients",
        "logit_lens": "depthpass.analysis.lens",
        "search": "depthpass.search",
        "SearchResult": "depthpass.search",
        "Program": "depthpass.ir",
        "parse_program": "depthpass.ir",
    },
    "run-time switches": {
        "switch": "depthpass.hf.switching.switch",
        "using": "depthpass.hf.switching.switch",
        "set_loops": "depthpass.hf.switching.switch",
        "loops_of": "depthpass.hf.switching.switch",
        "set_exit": "depthpass.hf.switching.exits",
        "set_ratios": "depthpass.hf.switching.ratios",
        "routing_of": "depthpass.hf.switching.routing",
        "calibrate": "depthpass.hf.training.calibrate",
        "progress": "depthpass.log",
    },
    "training": {
        "FlopsLedger": "depthpass.hf.training.callbacks",
        "RecurrenceCurriculum": "depthpass.hf.training.callbacks",
        "LatentCurriculum": "depthpass.hf.training.latent_curriculum",
        "StopAtFlops": "depthpass.hf.training.callbacks",
        "ShiftSchedule": "depthpass.hf.training.callbacks",
        "CapacityWarmup": "depthpass.hf.switching.ratios",
        "capacity_warmup": "depthpass.hf.switching.ratios",
        "aligned_targets": "depthpass.losses",
        "exit_loss": "depthpass.losses",
        "gate_loss": "depthpass.losses",
        "only_gates": "depthpass.hf.switching.exits",
        "relay_loss": "depthpass.losses",
        "LoopContrast": "depthpass.hf.decoding.contrast",
    },
    "diffusion": {
        "denoise": "depthpass.diffusion",
        "diffusion_loss": "depthpass.diffusion",
        "CoevolutionaryDiffusion": "depthpass.hf.decoding.coevolution",
    },
    "errors": {
        "DepthpassError": "depthpass.errors",
        "SpecError": "depthpass.errors",
        "CheckpointError": "depthpass.errors",
        "UnsupportedModelError": "depthpass.errors",
        "VerifyError": "depthpass.errors",
        "ParseError": "depthpass.errors",
        "PassError": "depthpass.errors",
        "InputError": "depthpass.errors",
        "CacheError": "depthpass.errors",
        "LoweringError": "depthpass.errors",
    },
}
"""Public names by what they are for."""

_PUBLIC = {name: module for group in GROUPS.values() for name, module in group.items()}
_PACKAGES = {
    "lowering": "depthpass_lowering", "kernels": "depthpass_kernels", "tasks": "depthpass.tasks", "recipes": "depthpass.recipes",
}

__doc__ = (__doc__ or "") + "\n" + "".join(f"{group}: {', '.join(names)}.\n" for group, names in GROUPS.items())

# A literal: type checkers read it. tests/packaging/test_layering.py holds it against the groups.
__all__ = [
    "Bidirectional", "CacheError", "CapacityWarmup", "CheckpointError", "Coconut", "CoevolutionaryDiffusion",
    "DepthCache", "DepthModel", "DepthpassError", "FeedbackTransformer", "FixedPoint", "FlopsLedger", "GROUPS",
    "Identity", "InnerThinking", "InputError", "IntraLayerRecurrence", "LatentCurriculum", "LayerProgram",
    "Loop", "LoopContrast", "LoweringError", "MaskedDiffusion", "MixtureOfDepths", "MixtureOfRecursions", "Pad",
    "ParallelLoop", "ParseError", "PassError", "Program", "RecurrenceCurriculum", "RecurrentLoop",
    "RelaxedRecursion", "Repeat", "SameLayerState", "SearchResult", "ShiftSchedule", "Skip", "SpecError",
    "StopAtFlops", "SumNorms", "T2MLR", "Taps", "TurboConn", "UnsupportedModelError", "VerifyError",
    "aligned_targets", "attach", "calibrate", "capacity_warmup", "compare", "contraction", "denoise",
    "diffusion_loss", "dump_spec", "emit", "exit_loss", "from_pretrained", "gate_loss", "gradients", "kernels",
    "load_spec", "logit_lens", "loops_of", "lowering", "materialize", "new_parameters", "only_gates",
    "parse_program", "plot_depth", "progress", "recipes", "relay_loss", "report", "restore", "routing_of",
    "search", "set_exit", "set_loops", "set_ratios", "summary", "sweep", "switch", "tasks", "transform", "twin",
    "using",
]


if not TYPE_CHECKING:  # checkers know every name from the imports above, and report all others

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return importlib.import_module(_PACKAGES[name])
        if name in _PUBLIC:
            module = importlib.import_module(_PUBLIC[name])
            # `search`, `report` and `emit` are callable packages: the import above put them here, for good.
            return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
        from depthpass.errors import did_you_mean
        from depthpass.passes.registry import ALIASES, BUILTIN

        known = {*_PUBLIC, *_PACKAGES, "__version__"}
        alias = ALIASES.get(name.lower())
        near = f" Did you mean {BUILTIN[alias].partition(':')[2]!r}?" if alias else did_you_mean(name, known)
        raise AttributeError(f"module 'depthpass' has no attribute {name!r}.{near}")


def __dir__() -> list[str]:
    return sorted({*__all__, "GROUPS", "__version__", "__doc__", "__all__"})


# Saved models load through the Auto classes of transformers, whichever of the two is imported first.
importlib.import_module("depthpass.hf.auto").announce()
