"""The depth IR: ops, programs, text form, rules."""

from depthpass.ir.definitions import AttrDef, OpDef, Param, Type, Work
from depthpass.ir.ops import OPS, register
from depthpass.ir.program import Op, Program, op, plain, reads_slots, writes_slot
from depthpass.ir.text import format_program, parse_program
from depthpass.ir.verify import infer, parameters, verify

__all__ = [
    "OPS", "AttrDef", "Op", "OpDef", "Param", "Program", "Type", "Work", "format_program", "infer", "op", "parameters",
    "parse_program", "plain", "reads_slots", "register", "verify", "writes_slot",
]
