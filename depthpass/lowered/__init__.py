"""The lowered program: what a schedule and a capture give for one kind of call, and what executors run."""

from depthpass.lowered.build import CALLS, call_kind, lower
from depthpass.lowered.ops import BlockFacts, LoweredOp
from depthpass.lowered.program import Line, LoweredProgram, LoweredRegion
from depthpass.lowered.record import Lowered, LoweredCall, Recorder
from depthpass.lowered.text import format_lowered, parse_lowered
from depthpass.lowered.verify import verify_lowered

__all__ = [
    "CALLS", "BlockFacts", "Line", "Lowered", "LoweredCall", "LoweredOp", "LoweredProgram", "LoweredRegion", "Recorder",
    "call_kind", "format_lowered", "lower", "parse_lowered", "verify_lowered",
]
