"""The depth IR: ops, programs, text form, rules."""

from depthpass.ir.ops import OPS, OpDef
from depthpass.ir.program import Op, Program, op, plain, reads_slots, writes_slot
from depthpass.ir.text import format_program, parse_program
from depthpass.ir.verify import Param, Type, infer, parameters, verify

__all__ = [
    "OPS", "Op", "OpDef", "Param", "Program", "Type", "format_program", "infer", "op", "parameters",
    "parse_program", "plain", "reads_slots", "verify", "writes_slot",
]
