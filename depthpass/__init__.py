"""depthpass: a compiler pass for transformer depth.

Rewire any stock Hugging Face decoder over layers and tokens, read how deep it now is, train it, generate from it.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> module that defines it. Everything is imported on first use, so that `import depthpass` stays quick.
_PUBLIC = {
    "transform": "depthpass.hf.transform",
    "restore": "depthpass.hf.transform",
    "new_parameters": "depthpass.hf.transform",
    "materialize": "depthpass.hf.materialize",
    "emit": "depthpass.emit",
    "switch": "depthpass.hf.switch",
    "using": "depthpass.hf.switch",
    "set_loops": "depthpass.hf.switch",
    "loops_of": "depthpass.hf.switch",
    "FlopsLedger": "depthpass.hf.callbacks",
    "ShiftSchedule": "depthpass.hf.callbacks",
    "RecurrenceCurriculum": "depthpass.hf.callbacks",
    "LatentCurriculum": "depthpass.hf.latent_curriculum",
    "from_pretrained": "depthpass.hf.save",
    "set_ratios": "depthpass.hf.ratios",
    "capacity_warmup": "depthpass.hf.ratios",
    "CapacityWarmup": "depthpass.hf.ratios",
    "routing_of": "depthpass.hf.routing",
    "plot_depth": "depthpass.report.tokens",
    "DepthCache": "depthpass.hf.cache",
    "DepthModel": "depthpass.hf.model",
    "report": "depthpass.report",
    "search": "depthpass.search",
    "SearchResult": "depthpass.search",
    "FixedPoint": "depthpass.schedule.fixed_point",
    "contraction": "depthpass.analysis.contraction",
    "Program": "depthpass.ir",
    "parse_program": "depthpass.ir",
    "load_spec": "depthpass.spec",
    "dump_spec": "depthpass.spec",
    "attach": "depthpass.hf.attach",
    "logit_lens": "depthpass.analysis.lens",
    "aligned_targets": "depthpass.losses",
    "relay_loss": "depthpass.losses",
    "exit_loss": "depthpass.losses",
    "gate_loss": "depthpass.losses",
    "LoopContrast": "depthpass.hf.contrast",
    "calibrate": "depthpass.hf.calibrate",
    "set_exit": "depthpass.hf.exits",
    "only_gates": "depthpass.hf.exits",
    "recipes": "depthpass.recipes",
    "gradients": "depthpass.analysis.gradients",
    "denoise": "depthpass.diffusion",
    "diffusion_loss": "depthpass.diffusion",
    "CoevolutionaryDiffusion": "depthpass.diffusion",
    **dict.fromkeys(
        ("DepthpassError", "SpecError", "CheckpointError", "UnsupportedModelError", "VerifyError", "ParseError", "PassError",
         "InputError", "CacheError", "LoweringError"),
        "depthpass.errors",
    ),
}
_PACKAGES = {"lowering": "depthpass_lowering", "kernels": "depthpass_kernels", "tasks": "depthpass.tasks"}


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(_PACKAGES[name])
    if name == "recipes":
        return importlib.import_module("depthpass.recipes")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if not name.startswith("_"):
        from depthpass.passes.registry import BUILTIN

        for target in BUILTIN.values():
            module, _, cls = target.partition(":")
            if cls == name:
                return getattr(importlib.import_module(module), cls)
    raise AttributeError(f"module 'depthpass' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_PACKAGES})


# Saved models load through the Auto classes of transformers, whichever of the two is imported first.
importlib.import_module("depthpass.hf.auto").announce()
