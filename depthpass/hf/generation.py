"""Generation modes that a transformed model cannot run, refused before ``generate`` has done anything."""

from __future__ import annotations

from typing import Any

from depthpass.errors import InputError


def check_generation(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Check the arguments of ``generate``, which may be given by themselves or in a generation config.

    Raises:
        InputError: a cache implementation of transformers, continuous batching, or drafts by the model's own first blocks.
    """
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = [c for c in (given, None if given else getattr(model, "generation_config", None)) if c is not None]

    def value(name: str):
        return next((v for v in (kwargs.get(name), *(getattr(c, name, None) for c in configs)) if v is not None), None)

    implementation = value("cache_implementation")
    if implementation is not None and str(implementation).startswith("paged"):
        model._paged("generate_batch")
    if value("use_cache") is not False:
        check_implementation(implementation)
    if value("assistant_early_exit") is not None:
        raise InputError(
            "assistant_early_exit: the draft would come from the model's own first blocks with their stock wiring, for which "
            "transformers edits num_hidden_layers of the live model; a transformed model's program is not cut that way. Pass "
            "an assistant_model, or leave it out."
        )


def check_implementation(name: str | None) -> None:
    """Raise InputError for a cache implementation other than the dynamic one."""
    if name not in (None, "dynamic"):
        raise InputError(f"cache_implementation={name!r}: a transformed model keeps its own DepthCache (one slot per visit and "
                         "delay lines); leave cache_implementation unset.")
