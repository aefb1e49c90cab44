"""Passes: frozen dataclasses that rewrite programs, found by name in a registry and run by a pipeline."""

from depthpass.passes.base import Context, Numerics, Pass
from depthpass.passes.pipeline import apply_spec
from depthpass.passes.registry import pass_class, pass_names, register

__all__ = ["Context", "Numerics", "Pass", "apply_spec", "pass_class", "pass_names", "register"]
