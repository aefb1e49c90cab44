"""The rules of the depth IR, checked after every pass, and the types of values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from depthpass.errors import VerifyError, did_you_mean
from depthpass.ir.ops import OPS
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.limits import INTEGER, check_program, shown

NEVER = 1 << 40
"""Tokens that a value is absent for when it never exists."""

_NAME = re.compile(r"\w[\w.]*")
_NEEDS = {
    "route": {"rate": "bias"},
    "block": {"window": "gate", "gate_input": "gate", "gate_init": "gate", "lora": "lora_rank", "lora_rank": "lora",
              "clock": "modulate", "step": "clock", "base": "modulate"},
}
_AT_MOST = {"delay": "tokens", "pad": "tokens", "linear": "out", "block": "lora_rank", "zeros": "width", "noise": "width"}
"""Attributes that memory is made for, whatever the model."""
_BLOCKS = ("block", "average", "retire")
_AT_LEAST = {
    "block": {"slot": 0, "keys": 0, "past": 0, "lora_rank": 1, "step": 0},
    "zeros": {"width": 1, "pads": 0},
    "logits": {"width": 1},
    "pad": {"token": 0, "at": 1, "behind": 0},
    "noise": {"width": 1, "std": 0.0, "cut": 0.0, "pads": 0},
    "linear": {"out": 1, "init": 0.0},
    "pick": {"index": 0},
    "loss": {"coefficient": 0.0},
    "rms": {"eps": 0.0},
    "ahead": {"tokens": 0},
    "denoise": {"steps": 1, "token": 0, "carry": 0},
    "route": {"depth": 1, "rate": 0.0},
}


@dataclass(frozen=True)
class Type:
    """Type of a value.

    Attributes:
        width: width of a stream; 0 for a route.
        tokens: route whose tokens a sub-stream holds; None = all tokens.
        absent: the first so many real tokens of each row carry no value (they lie before a delay's source).
        pads: pad tokens appended to each row.
    """

    width: int
    tokens: str | None = None
    absent: int = 0
    pads: int = 0

    @property
    def is_route(self) -> bool:
        return self.width == 0


def infer(program: Program) -> dict[str, Type]:
    """Type of every value.

    Raises:
        VerifyError: an op got a value of the wrong type.
    """
    shapes, absent = _shapes(program), _absences(program)
    # Delays may read values defined later; everything else is typed in one walk.
    later = {
        a: Type(shapes[a][0], None, absent[a], shapes[a][1])
        for o in program.ops if o.kind == "delay" for a in o.args if a in shapes
    }
    types: dict[str, Type] = {}
    for o in program.ops:
        if absent.get(o.name, 0) >= NEVER:
            raise VerifyError(f"{_where(o)}: expected a value that exists at some token, got one that never does: its "
                              "delay cycle meets no stream that every token has. Add such a stream on the cycle.")
        known = [types.get(a) or later[a] for a in o.args]
        result = _delay(o, known[0]) if o.kind == "delay" else _result(program, o, known)
        if o.name:
            types[o.name] = result
    for o in program.ops:
        if o.kind == "delay":
            _delay(o, types[o.args[0]])
            _expect(types[o.args[0]] == later[o.args[0]], o, "a value of fixed width and padding",
                    "one that grows along its own delay cycle")
    return types


def _shapes(program: Program) -> dict[str, tuple[int, int]]:
    """Width and pads of every value as far as the syntax tells; enough to type delays of later values."""
    shapes: dict[str, tuple[int, int]] = {}
    # Every sweep carries what is known across one more delay of a later value.
    for _ in range(2 + sum(o.kind == "delay" for o in program.ops)):
        before = dict(shapes)
        for o in program.ops:
            known = [shapes[a] for a in o.args if a in shapes]
            if o.name and (known or not o.args):
                shapes[o.name] = _shape(program, o, known)
        if shapes == before:
            break
    return shapes


def _shape(program: Program, o: Op, args: list[tuple[int, int]]) -> tuple[int, int]:
    width = max((w for w, _ in args), default=program.width)
    if o.kind in ("linear", "zeros", "noise", "route", "logits", "distance", "pick"):
        fixed = {"route": 0, "distance": 1, "pick": 1, "linear": o["out"] if o.kind == "linear" else 0}
        width = fixed[o.kind] if o.kind in fixed else o["width"] or program.width
    pads = o["pads"] if o.kind in ("zeros", "noise") else max((p for _, p in args), default=0)
    return width, 0 if o.kind == "trim" else pads + (o["tokens"] if o.kind == "pad" else 0)


def _absences(program: Program) -> dict[str, int]:
    """How many first tokens of a row lack each value.

    Found from above: a value is as absent as its least absent summand or its most absent factor, so starting from
    "never there" every sweep over the program settles what lies behind one more delay of a later value.
    """
    absent = {o.name: NEVER for o in program.ops if o.name}
    for _ in range(2 + sum(o.kind == "delay" for o in program.ops)):
        before = dict(absent)
        for o in program.ops:
            if o.name:
                join = min if o.kind == "add" else max
                inherited = join((absent[a] for a in o.args), default=0)
                absent[o.name] = min(NEVER, inherited + (o["tokens"] if o.kind == "delay" else 0))
        if absent == before:
            break
    return absent


def _delay(o: Op, source: Type) -> Type:
    _expect(not source.is_route, o, "a stream", "a route")
    _expect(source.tokens is None, o, "a stream over all tokens", "routed tokens; scatter them back first")
    return Type(source.width, None, source.absent + o["tokens"], source.pads)


def _expect(ok: bool, o: Op, want: str, got: str) -> None:
    if not ok:
        raise VerifyError(f"{_where(o)}: expected {want}, got {got}.")


def _where(o: Op) -> str:
    return f"%{o.name} = {o.kind}" if o.name else o.kind


def _result(program: Program, o: Op, args: list[Type]) -> Type:
    kind = o.kind
    if kind not in ("gather", "scatter", "route", "tap", "loss") and not (kind == "block" and len(args) == 2):
        _expect(not any(a.is_route for a in args), o, "streams", "a route")
        places = {(a.tokens, a.pads) for a in args}
        _expect(len(places) <= 1, o, "arguments over the same tokens", "different routes or paddings")
    if kind in ("embed", "average", "retire", "ahead", "denoise"):
        return Type(program.width)
    if kind in ("zeros", "noise"):
        return Type(o["width"] or program.width, pads=o["pads"])
    first = args[0]
    absent = max((a.absent for a in args), default=0)
    if kind in ("block", "norm"):
        _expect(first.width == program.width, o, f"width {program.width}", f"width {first.width}")
        _expect(first.absent == 0, o, "a stream that every token has",
                f"one that is absent at the first {first.absent} tokens; add it to another stream first")
        if len(args) == 2:
            _expect(args[1].is_route and first.tokens is None, o, "(a stream over all tokens, the route that asks)",
                    "something else")
            _expect(args[1].pads == first.pads, o, "a route over the same tokens", "another padding")
            return Type(first.width, o.args[1], 0, first.pads)
        return first
    if kind == "logits":
        _expect(first.width == program.width, o, f"width {program.width}", f"width {first.width}")
        return Type(o["width"], first.tokens, absent, first.pads)
    if kind == "distance":
        _expect(len({a.width for a in args}) == 1, o, "equal widths", f"{[a.width for a in args]}")
        return Type(1, first.tokens, absent, first.pads)
    if kind == "linear":
        return Type(o["out"], first.tokens, absent, first.pads)
    if kind == "add":
        widths = {a.width for a in args} - {1}
        _expect(len(widths) <= 1, o, "equal widths", f"{sorted(widths)}")
        return Type(max(a.width for a in args), first.tokens, min(a.absent for a in args), first.pads)
    if kind == "mul":
        widths = {a.width for a in args} - {1}
        _expect(len(widths) <= 1, o, "equal widths, or one of 1", f"{sorted(widths)}")
        return Type(max(a.width for a in args), first.tokens, absent, first.pads)
    if kind == "select":
        _expect(len(args) % 2 == 0 and all(a.width == program.width for a in args[: len(args) // 2])
                and all(a.width == 1 for a in args[len(args) // 2 :]), o,
                "T streams followed by T gates of width 1", f"widths {[a.width for a in args]}")
        return first
    if kind == "route":
        _expect(not first.is_route and first.absent == 0, o, "a score stream that every token has", "something else")
        choice = o["rule"] == "choice"
        _expect(choice or first.width == 1, o, "a score of width 1", f"width {first.width}")
        _expect(o["rule"] != "topk" or o["capacity"] is not None, o, "capacity for rule topk", "none")
        _expect(not choice or o["depth"] is not None, o, "depth for rule choice", "none")
        _expect(len(args) == 1 or args[1].is_route, o, "a route to nest in as second argument", "a stream")
        _expect(first.tokens == (o.args[1] if len(args) == 2 and first.tokens else first.tokens), o,
                "the score of the enclosing route's tokens", f"tokens of {first.tokens}")
        return Type(0, None, 0, first.pads)
    if kind == "gather":
        _expect(not first.is_route and args[1].is_route, o, "(stream, route)", "something else")
        _expect(first.tokens is None, o, "a stream over all tokens", "routed tokens")
        _expect(first.absent == 0, o, "a stream that every token has", f"one absent at {first.absent} tokens")
        return Type(first.width, o.args[1], 0, first.pads)
    if kind == "scatter":
        base, sub, route = args
        _expect(route.is_route and sub.tokens == o.args[2] and base.tokens is None, o,
                "(stream, stream over the route's tokens, route)", "something else")
        _expect(base.width == sub.width, o, f"width {base.width}", f"width {sub.width}")
        return base
    if kind == "pad":
        return Type(first.width, first.tokens, first.absent, first.pads + o["tokens"])
    if kind == "trim":
        _expect(first.pads == o["tokens"], o, f"{first.pads} pad tokens to trim", str(o["tokens"]))
        return Type(first.width, first.tokens, first.absent, 0)
    if kind == "pick":
        _expect(o["index"] < first.width, o, f"a column in 0..{first.width - 1}", str(o["index"]))
        return Type(1, first.tokens, first.absent, first.pads)
    if kind == "loss":
        _expect(not first.is_route and first.tokens is None and first.absent == 0, o, "a score that every token has",
                "something else")
        _expect(o["rule"] != "bce" or first.width == 1, o, "a score of width 1", f"width {first.width}")
        _expect(len(args) == 1 or (o["rule"] != "balance" and args[1].is_route), o,
                "a route as second argument, of bce or z", "something else")
        return first
    if kind == "tap" and first.is_route:
        _expect(not o["head"], o, "a stream for head true", "a route")
        return first
    if kind in ("tap", "output"):
        _expect(first.tokens is None and first.absent == 0 and not first.is_route, o,
                "a stream that every token has", "a partial one")
        _expect(kind == "tap" or first.width == program.width, o, f"width {program.width}", f"width {first.width}")
        return first
    return first


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
            raise VerifyError(f"{_where(o)}: {'needs a' if spec.defines else 'has no'} result.")
        if o.name and not _NAME.fullmatch(o.name):
            raise VerifyError(f"{_where(o)}: a value's name has letters, digits, '_' and '.', got {o.name!r}.")
        if o.name in defined:
            raise VerifyError(f"%{o.name} is defined twice.")
        low, high = spec.args
        if len(o.args) < low or (high is not None and len(o.args) > high):
            count = f"{low}" if high == low else f"{low} or more" if high is None else f"{low}..{high}"
            raise VerifyError(f"{_where(o)}: expected {count} arguments, got {len(o.args)}.")
        for a in o.args:
            if a not in everything:
                raise VerifyError(f"{_where(o)}: %{a} is not defined anywhere.")
            if a not in defined and not spec.forward_refs:
                raise VerifyError(f"{_where(o)}: %{a} is used before it is defined; only delay may do that.")
        _check_attrs(program, o)
        if o.kind == "block" and (slot := writes_slot(o)) is not None:
            if slot in slot_writers:
                raise VerifyError(f"{_where(o)}: slot {slot} is already written by %{slot_writers[slot].name}.")
            slot_writers[slot] = o
        if o.name:
            defined.add(o.name)
    names = [o["name"] for o in program.taps]
    if len(set(names)) != len(names):
        raise VerifyError(f"tap names must differ, got {names}.")
    _check_ahead(program)
    types = infer(program)
    _check_latents(program)
    gates: dict[str, Op] = {}
    for o in program.visits:
        _check_keys(program, o, slot_writers, types)
        first = gates.setdefault(o["gate"], o) if o["gate"] else o
        for key in ("gate_input", "gate_init"):
            if first[key] != o[key]:
                raise VerifyError(f"{_where(o)}: expected {key} {first[key]} as at %{first.name}, which has the same gate "
                                  f"{o['gate']!r}, got {o[key]}. Give it a gate of its own.")
    parameters(program, types)


def _check_ahead(program: Program) -> None:
    """What sees later tokens cannot wait for them: nothing of the program may go from token to token."""
    for kind in ("ahead", "denoise"):
        if sum(o.kind == kind for o in program.ops) > 1:
            raise VerifyError(f"{kind}: expected it once in a program, got it again.")
    if program.ahead is None:
        return
    for o in program.ops:
        visit = o.kind == "block" and (o["gate"] is not None or o["past"] is not None)
        if o.kind == "delay" or visit or (o.kind == "pad" and o["feed"]):
            what = ("a delay" if o.kind == "delay" else "latents" if o.kind == "pad" else "a gated window"
                    if o["gate"] is not None else "keys of earlier calls")
            raise VerifyError(f"{_where(o)}: expected attention that sees no later token beside {what}, got a program with "
                              "'ahead', whose tokens run together. Leave one of the two out.")


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
            raise VerifyError(f"{_where(o)}: expected ops that go on token by token beside latents (%{fed.name} = pad feed), got "
                              f"one that depends on {what}. Use threshold routing, keys of the first loop or own ones, and "
                              "one pass with pads.")


def _check_attrs(program: Program, o: Op) -> None:
    for key, spec in OPS[o.kind].attrs.items():
        value = dict(o.attrs).get(key)
        if value is None:
            if spec.required:
                raise VerifyError(f"{_where(o)}: attribute {key!r} is missing.")
            continue
        if not isinstance(value, spec.type) or (spec.type is not bool and isinstance(value, bool)):
            raise VerifyError(f"{_where(o)}: {key!r} must be a {spec.type.__name__}, got {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise VerifyError(f"{_where(o)}: {key!r} must be a finite number, got {value!r}.")
        if isinstance(value, str) and not _NAME.fullmatch(value):
            raise VerifyError(f"{_where(o)}: {key!r} must be a name of letters, digits, '_' and '.', got {value!r}.")
        if spec.choices and value not in spec.choices:
            raise VerifyError(f"{_where(o)}: {key!r} must be one of {', '.join(spec.choices)}, got {value!r}.")
    for index in (o["index"], *(o["blocks"] if o.kind == "average" else ())) if o.kind in _BLOCKS else ():
        if not isinstance(index, int) or not 0 <= index < program.blocks:
            raise VerifyError(f"{_where(o)}: expected a block in 0..{program.blocks - 1}, got {index}.")
    if o.kind == "retire" and any(v["index"] == o["index"] for v in program.visits):
        raise VerifyError(f"{_where(o)}: expected a block that no visit runs, got {o['index']}.")
    if o.kind == "average" and not o["blocks"]:
        raise VerifyError(f"{_where(o)}: expected at least one block to average, got none.")
    for key, needs in _NEEDS.get(o.kind, {}).items():
        if key in dict(o.attrs) and o[needs] is None:
            raise VerifyError(f"{_where(o)}: {key!r} means nothing without {needs!r}. Give both or neither.")
    for key, low in _AT_LEAST.get(o.kind, {}).items():
        if o[key] is not None and o[key] < low:
            raise VerifyError(f"{_where(o)}: expected {key} of at least {low}, got {o[key]}.")
    if (key := _AT_MOST.get(o.kind)) and o[key] is not None and o[key] > max(INTEGER, program.width):
        raise VerifyError(f"{_where(o)}: expected {key} of at most {max(INTEGER, program.width)}, got {shown(o[key])}.")
    if o.kind in ("delay", "pad", "trim") and o["tokens"] < 1:
        raise VerifyError(f"{_where(o)}: expected at least 1 token, got {o['tokens']}; a cycle needs a delay.")
    if o.kind == "route":
        for key, rule in (("capacity", "topk"), ("rounding", "topk"), ("threshold", "threshold above"),
                          ("depth", "choice"), ("bias", "choice")):
            if key in dict(o.attrs) and o["rule"] not in rule.split():
                raise VerifyError(f"{_where(o)}: {key!r} belongs to rule {' or '.join(rule.split())}, got rule {o['rule']}.")
        if o["capacity"] is not None and not 0 < o["capacity"] <= 1:
            raise VerifyError(f"{_where(o)}: expected a capacity in (0, 1], got {o['capacity']}.")
    if o.kind == "pad" and o["at"] is not None and o["behind"] is not None:
        raise VerifyError(f"{_where(o)}: expected one place for the pads, got at {o['at']} and behind {o['behind']}.")
    if o.kind == "select" and not 0 < o["cdf"] <= 1:
        raise VerifyError(f"{_where(o)}: expected a cdf in (0, 1], got {o['cdf']}.")


def _check_keys(program: Program, o: Op, writers: dict[int, Op], types: dict[str, Type]) -> None:
    if len(o.args) == 2 and o["keys"] is not None:
        raise VerifyError(f"{_where(o)}: a visit that reads slot {o['keys']} needs no keys of its own tokens. Gather the "
                          "routed tokens and visit them instead of passing the route.")
    if o["gate"] is not None and (o["keys"] is None or o["window"] is None or o["window"] < 1):
        raise VerifyError(f"{_where(o)}: a gate needs keys (a slot) and a window of at least 1.")
    if o["past"] is not None:
        _check_past(o, writers.get(o["past"]), types)
    if o["keys"] is None:
        return
    writer = writers.get(o["keys"])
    if writer is None:
        raise VerifyError(f"{_where(o)}: reads slot {o['keys']}, which no visit writes.")
    if program.index[writer.name] > program.index[o.name]:
        raise VerifyError(f"{_where(o)}: reads slot {o['keys']} before %{writer.name} writes it.")
    if writer["past"] is not None:
        raise VerifyError(f"{_where(o)}: expected keys of a visit that keeps them, got slot {o['keys']} of %{writer.name}, "
                          "which has a past.")
    if writer["index"] != o["index"]:
        raise VerifyError(f"{_where(o)}: expected keys of the same block {o['index']}, got slot {o['keys']}, which "
                          f"holds keys of block {writer['index']}.")


def _check_past(o: Op, writer: Op | None, types: dict[str, Type]) -> None:
    past = o["past"]
    if o["keys"] is not None or o["gate"] is not None:
        raise VerifyError(f"{_where(o)}: 'past' stands for earlier entries of the visit's own slot, so it goes with neither "
                          "keys nor gate.")
    if writer is None or writer is o:
        got = "its own slot" if writer is o else f"slot {past}, which no visit writes"
        raise VerifyError(f"{_where(o)}: expected the slot of another visit as past, got {got}.")
    if writer["past"] is not None or writer["gate"] is not None:
        raise VerifyError(f"{_where(o)}: expected a past slot that keeps every call's entries, got slot {past} of "
                          f"%{writer.name}, which has a {'past' if writer['past'] is not None else 'window'} itself.")
    if writer["index"] != o["index"]:
        raise VerifyError(f"{_where(o)}: expected a past of the same block {o['index']}, got slot {past}, which holds keys "
                          f"of block {writer['index']}.")
    if types[writer.name] != types[o.name]:
        raise VerifyError(f"{_where(o)}: expected a past over the same tokens, got slot {past} over others.")


@dataclass(frozen=True)
class Param:
    """A new parameter a program asks for, under ``depth.`` in the state dict.

    Attributes:
        name: e.g. ``turboconn.s14_d4.down.weight``.
        shape: its shape.
        init: standard deviation of a normal initialisation; 0 = zeros.
        fill: constant the parameter starts from (``weigh``); None = use ``init``.
        trained: False for a buffer that a rule moves.
        identity: the weight of a linear map starts as the identity on the last ``out`` columns, that is on its last
            argument, and zero elsewhere; ``init`` is not used then.
    """

    name: str
    shape: tuple[int, ...]
    init: float = 0.0
    fill: float | None = None
    identity: bool = False
    trained: bool = True


def parameters(program: Program, types: dict[str, Type] | None = None) -> dict[str, Param]:
    """The new parameters of a program by name.

    Parameters of attention gates and per-visit LoRA depend on the model's own shapes and are declared
    by the op (``gate``, ``lora``); the transform sizes them from the captured block.

    Raises:
        VerifyError: two ops share a name but not a shape.
    """
    types = types or infer(program)
    found: dict[str, Param] = {}

    def add(o: Op, param: Param) -> None:
        if found.setdefault(param.name, param) != param:
            raise VerifyError(f"{_where(o)}: parameter {param.name!r} is declared twice with different shapes or "
                              f"inits: {found[param.name]} and {param}.")

    for o in program.ops:
        if o.kind == "linear":
            width = sum(types[a].width for a in o.args)
            if o["identity"] and types[o.args[-1]].width != o["out"]:
                raise VerifyError(f"{_where(o)}: identity needs a last argument of width {o['out']}, "
                                  f"got {types[o.args[-1]].width}.")
            add(o, Param(f"{o['name']}.weight", (o["out"], width), o["init"], identity=bool(o["identity"])))
            if o["bias"]:
                add(o, Param(f"{o['name']}.bias", (o["out"],)))
        elif o.kind == "weigh":
            add(o, Param(f"{o['name']}.weight", (types[o.args[0]].width,), fill=o["init"]))
        elif o.kind == "rms" and o["name"]:
            add(o, Param(f"{o['name']}.weight", (types[o.args[0]].width,), fill=1.0))
        elif o.kind == "block" and o["modulate"]:
            for param in _modulation(o, program.width):
                add(o, param)
        elif o.kind == "route" and o["bias"]:
            add(o, Param(f"{o['bias']}.bias", (types[o.args[0]].width,), fill=0.0, trained=False))
    return found


TIME_WIDTH = 256
"""Width of the sinusoid that a time encoder reads."""


def _modulation(o: Op, width: int) -> list[Param]:
    """Parameters of a modulated visit: its factors start at zero, a time encoder (two linear maps) as usual."""
    name, clock = o["modulate"], o["clock"]
    if clock is None:
        return [Param(f"{name}.weight", (4, width))]
    return [
        Param(f"{name}.weight", (4 * width, width)), Param(f"{name}.bias", (4 * width,)),
        Param(f"{clock}.rise.weight", (width, TIME_WIDTH), 0.02), Param(f"{clock}.rise.bias", (width,)),
        Param(f"{clock}.mix.weight", (width, width), 0.02), Param(f"{clock}.mix.bias", (width,)),
    ]
