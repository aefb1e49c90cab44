"""The rules of the depth IR, checked after every pass, and the types of values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from depthpass.errors import VerifyError, did_you_mean
from depthpass.ir.definitions import NEVER, Param, Type, expect, where
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.structural_ops import asks
from depthpass.limits import INTEGER, check_program, shown

_NAME = re.compile(r"\w[\w.]*")


def infer(program: Program) -> dict[str, Type]:
    """Type of every value.

    Raises:
        VerifyError: an op got a value of the wrong type.
    """
    shapes, absent = _shapes(program), _absences(program)
    delays = [o for o in program.ops if OPS[o.kind].forward_refs]
    # Delays may read values defined later; everything else is typed in one walk.
    later = {a: Type(shapes[a][0], None, absent[a], shapes[a][1]) for o in delays for a in o.args if a in shapes}
    types: dict[str, Type] = {}
    for o in program.ops:
        if absent.get(o.name, 0) >= NEVER:
            raise VerifyError(f"{where(o)}: expected a value that exists at some token, got one that never does: its "
                              "delay cycle meets no stream that every token has. Add such a stream on the cycle.")
        result = _result(program, o, [types.get(a) or later[a] for a in o.args])
        if o.name:
            types[o.name] = result
    for o in delays:
        _result(program, o, [types[o.args[0]]])
        expect(types[o.args[0]] == later[o.args[0]], o, "a value of fixed width and padding",
               "one that grows along its own delay cycle")
    return types


def _shapes(program: Program) -> dict[str, tuple[int, int]]:
    """Width and pads of every value as far as the syntax tells; enough to type delays of later values."""
    shapes: dict[str, tuple[int, int]] = {}
    # Every sweep carries what is known across one more delay of a later value, and corrects what was guessed before.
    for _ in range(3 + 2 * sum(OPS[o.kind].forward_refs for o in program.ops)):
        before = dict(shapes)
        for o in program.ops:
            known = [shapes[a] for a in o.args if a in shapes]
            if o.name and (known or not o.args):
                shapes[o.name] = _shape(program, o, known)
        if shapes == before:
            break
    return shapes


def _shape(program: Program, o: Op, args: list[tuple[int, int]]) -> tuple[int, int]:
    definition, widths = OPS[o.kind], [w for w, _ in args]
    whole = len(args) == len(o.args)
    width = definition.width(o, widths, program.width) if whole else max(widths)
    return width, definition.pads(o, max((p for _, p in args), default=0))


def _absences(program: Program) -> dict[str, int]:
    """How many first tokens of a row lack each value.

    Found from above: a value is as absent as its least absent summand or its most absent factor, so starting from
    "never there" every sweep over the program settles what lies behind one more delay of a later value.
    """
    absent = {o.name: NEVER for o in program.ops if o.name}
    for _ in range(2 + sum(OPS[o.kind].forward_refs for o in program.ops)):
        before = dict(absent)
        for o in program.ops:
            if o.name:
                definition = OPS[o.kind]
                absent[o.name] = min(NEVER, definition.begins(o, definition.absent([absent[a] for a in o.args])))
        if absent == before:
            break
    return absent


def _result(program: Program, o: Op, args: Sequence[Type]) -> Type:
    """Type of an op's result: by its own rule, else that of streams over the same tokens."""
    definition = OPS[o.kind]
    if definition.typed is not None:
        return definition.typed(program, o, args)
    expect(not any(a.is_route for a in args), o, "streams", "a route")
    expect(len({(a.tokens, a.pads) for a in args}) <= 1, o, "arguments over the same tokens", "different routes or paddings")
    definition.accepts(program, o, args)
    first = args[0] if args else Type(program.width)
    return Type(definition.width(o, [a.width for a in args], program.width), first.tokens,
                definition.absent([a.absent for a in args]), definition.pads(o, first.pads))


def verify(program: Program) -> Program:
    """Check a program and return it.

    Raises:
        VerifyError: the text of the program is attached as a note.
    """
    try:
        _verify(program)
    except VerifyError as error:
        error.add_note(str(program))
        raise
    return program


def _verify(program: Program) -> None:
    defined, everything, slot_writers = set(), set(program.defs), {}
    if not program.model or re.search(r"[\s#]", program.model):
        raise VerifyError(f"expected a model name without spaces and '#', got {program.model!r}.")
    if program.blocks < 1 or program.width < 1:
        raise VerifyError(f"expected blocks and width of at least 1, got {program.blocks} and {program.width}.")
    check_program(len(program.visits), len(program.ops))
    if not program.ops or [o.kind for o in program.ops].count("output") != 1 or program.ops[-1].kind != "output":
        raise VerifyError("expected exactly one output, as the last op.")
    for o in program.ops:
        spec = OPS.get(o.kind)
        if spec is None:
            raise VerifyError(f"unknown op {o.kind!r}.{did_you_mean(o.kind, OPS)}")
        if bool(o.name) != spec.defines:
            raise VerifyError(f"{where(o)}: {'needs a' if spec.defines else 'has no'} result.")
        if o.name and not _NAME.fullmatch(o.name):
            raise VerifyError(f"{where(o)}: a value's name has letters, digits, '_' and '.', got {o.name!r}.")
        if o.name in defined:
            raise VerifyError(f"%{o.name} is defined twice.")
        low, high = spec.args
        if len(o.args) < low or (high is not None and len(o.args) > high):
            count = f"{low}" if high == low else f"{low} or more" if high is None else f"{low}..{high}"
            raise VerifyError(f"{where(o)}: expected {count} arguments, got {len(o.args)}.")
        for a in o.args:
            if a not in everything:
                raise VerifyError(f"{where(o)}: %{a} is not defined anywhere.")
            if a not in defined and not spec.forward_refs:
                raise VerifyError(f"{where(o)}: %{a} is used before it is defined; only delay may do that.")
        _check_attrs(program, o)
        if o.kind == "block" and (slot := writes_slot(o)) is not None:
            if slot in slot_writers:
                raise VerifyError(f"{where(o)}: slot {slot} is already written by %{slot_writers[slot].name}.")
            slot_writers[slot] = o
        if o.name:
            defined.add(o.name)
    names = [o["name"] for o in program.taps]
    if len(set(names)) != len(names):
        raise VerifyError(f"tap names must differ, got {names}.")
    types = infer(program)
    _check_latents(program)
    gates: dict[str, Op] = {}
    for o in program.visits:
        _check_keys(program, o, slot_writers, types)
        first = gates.setdefault(o["gate"], o) if o["gate"] else o
        for key in ("gate_input", "gate_init"):
            if first[key] != o[key]:
                raise VerifyError(f"{where(o)}: expected {key} {first[key]} as at %{first.name}, which has the same gate "
                                  f"{o['gate']!r}, got {o[key]}. Give it a gate of its own.")
    parameters(program, types)


def _check_latents(program: Program) -> None:
    """Latents run one after another, so nothing may ask for the whole row, or for where a call ends."""
    fed = next((o for o in program if o.kind == "pad" and o["feed"]), None)
    if fed is None:
        return
    for o in program:
        what = "later tokens" if o.kind == "route" and o["rule"] == "topk" else None
        if o.kind == "block" and o["past"] is not None:
            what = "where a call begins"
        if o.kind == "pad" and o is not fed:
            what = "other pads"
        if what:
            raise VerifyError(f"{where(o)}: expected ops that go on token by token beside latents (%{fed.name} = pad feed), got "
                              f"one that depends on {what}. Use threshold routing, keys of the first loop or own ones, and "
                              "one pass with pads.")


def _check_attrs(program: Program, o: Op) -> None:
    for key, spec in OPS[o.kind].attrs.items():
        value = dict(o.attrs).get(key)
        if value is None:
            if spec.required:
                raise VerifyError(f"{where(o)}: attribute {key!r} is missing.")
            continue
        if not isinstance(value, spec.type) or (spec.type is not bool and isinstance(value, bool)):
            raise VerifyError(f"{where(o)}: {key!r} must be a {spec.type.__name__}, got {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise VerifyError(f"{where(o)}: {key!r} must be a finite number, got {value!r}.")
        if isinstance(value, str) and not _NAME.fullmatch(value):
            raise VerifyError(f"{where(o)}: {key!r} must be a name of letters, digits, '_' and '.', got {value!r}.")
        if spec.choices and value not in spec.choices:
            raise VerifyError(f"{where(o)}: {key!r} must be one of {', '.join(spec.choices)}, got {value!r}.")
    for key, spec in OPS[o.kind].attrs.items():
        for index in (o[key] if isinstance(o[key], tuple) else (o[key],)) if spec.block and o[key] is not None else ():
            if not isinstance(index, int) or not 0 <= index < program.blocks:
                raise VerifyError(f"{where(o)}: expected a block in 0..{program.blocks - 1}, got {index}.")
    for key, spec in OPS[o.kind].attrs.items():
        if spec.needs and key in dict(o.attrs) and o[spec.needs] is None:
            raise VerifyError(f"{where(o)}: {key!r} means nothing without {spec.needs!r}. Give both or neither.")
    for key, spec in OPS[o.kind].attrs.items():
        if spec.low is not None and o[key] is not None and o[key] < spec.low:
            raise VerifyError(f"{where(o)}: expected {key} of at least {spec.low}, got {o[key]}.")
        if spec.bounded and o[key] is not None and o[key] > max(INTEGER, program.width):
            raise VerifyError(f"{where(o)}: expected {key} of at most {max(INTEGER, program.width)}, got {shown(o[key])}.")
    OPS[o.kind].check(program, o)


def _check_keys(program: Program, o: Op, writers: dict[int, Op], types: dict[str, Type]) -> None:
    if o["update"] and (o["gate"] is not None or o["memory"] or types[o.args[0]].tokens is None):
        raise VerifyError(f"{where(o)}: expected 'update' on a visit of routed tokens without a gate and a memory: of all tokens "
                          "nothing would be left of the slot that it reads.")
    if o["memory"] and o["keys"] is not None and o["gate"] is None:
        raise VerifyError(f"{where(o)}: a visit that reads slot {o['keys']} has no keys of its own to take from a second stream.")
    if asks(o) and o["keys"] is not None:
        raise VerifyError(f"{where(o)}: a visit that reads slot {o['keys']} needs no keys of its own tokens. Gather the "
                          "routed tokens and visit them instead of passing the route.")
    if o["gate"] is not None and (o["keys"] is None or o["window"] is None or o["window"] < 1):
        raise VerifyError(f"{where(o)}: a gate needs keys (a slot) and a window of at least 1.")
    if o["past"] is not None:
        _check_past(o, writers.get(o["past"]), types)
    if o["keys"] is None:
        return
    writer = writers.get(o["keys"])
    if writer is None:
        raise VerifyError(f"{where(o)}: reads slot {o['keys']}, which no visit writes.")
    if program.index[writer.name] > program.index[o.name]:
        raise VerifyError(f"{where(o)}: reads slot {o['keys']} before %{writer.name} writes it.")
    if writer["past"] is not None:
        raise VerifyError(f"{where(o)}: expected keys of a visit that keeps them, got slot {o['keys']} of %{writer.name}, "
                          "which has a past.")
    if writer["index"] != o["index"]:
        raise VerifyError(f"{where(o)}: expected keys of the same block {o['index']}, got slot {o['keys']}, which "
                          f"holds keys of block {writer['index']}.")


def _check_past(o: Op, writer: Op | None, types: dict[str, Type]) -> None:
    past = o["past"]
    if o["keys"] is not None or o["gate"] is not None:
        raise VerifyError(f"{where(o)}: 'past' stands for earlier entries of the visit's own slot, so it goes with neither "
                          "keys nor gate.")
    if writer is None or writer is o:
        got = "its own slot" if writer is o else f"slot {past}, which no visit writes"
        raise VerifyError(f"{where(o)}: expected the slot of another visit as past, got {got}.")
    if writer["past"] is not None or writer["gate"] is not None:
        raise VerifyError(f"{where(o)}: expected a past slot that keeps every call's entries, got slot {past} of "
                          f"%{writer.name}, which has a {'past' if writer['past'] is not None else 'window'} itself.")
    if writer["index"] != o["index"]:
        raise VerifyError(f"{where(o)}: expected a past of the same block {o['index']}, got slot {past}, which holds keys "
                          f"of block {writer['index']}.")
    if types[writer.name] != types[o.name]:
        raise VerifyError(f"{where(o)}: expected a past over the same tokens, got slot {past} over others.")


def parameters(program: Program, types: dict[str, Type] | None = None) -> dict[str, Param]:
    """The new parameters of a program by name.

    Parameters of attention gates and per-visit LoRA depend on the model's own shapes and are declared
    by the op (``gate``, ``lora``); the transform sizes them from the captured block.

    Raises:
        VerifyError: two ops share a name but not a shape.
    """
    types = types or infer(program)
    declared: dict[str, Param] = {}

    def add(o: Op, param: Param) -> None:
        if declared.setdefault(param.name, param) != param:
            raise VerifyError(f"{where(o)}: parameter {param.name!r} is declared twice with different shapes or "
                              f"inits: {declared[param.name]} and {param}.")

    for o in program.ops:
        for param in OPS[o.kind].parameters(o, [types[a].width for a in o.args], program.width):
            add(o, param)
    return declared
