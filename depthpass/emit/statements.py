"""A program as Python statements: one line per op, on the streams of a decoder's forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from depthpass.errors import SpecError
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.structural_ops import TIME_WIDTH
from depthpass.ir.verify import infer

_WHY = {
    "route": "it chooses tokens as it runs",
    "gather": "it runs some of the tokens only",
    "scatter": "it runs some of the tokens only",
    "noise": "it starts from random numbers",
    "pad": "it inserts tokens into every row",
    "trim": "it inserts tokens into every row",
    "loss": "it trains with a loss of its own",
    "ffn": "its blocks run in two parts",
    "point": "its blocks run in two parts",
    "logits": "it decides by the logits of unfinished states",
    "distance": "it decides by how far a state has moved",
    "ahead": "its attention sees later tokens",
    "denoise": "it runs several times to fill tokens in",
}
_ACTIVATIONS = {"sigmoid": "torch.sigmoid({})", "silu": "nn.functional.silu({})", "tanh": "torch.tanh({})",
                "gelu": "nn.functional.gelu({})", "relu": "nn.functional.relu({})", "softmax": "torch.softmax({}, -1)"}


def check_expressible(program: Program) -> None:
    """Refuse a program that no plain forward can express.

    Raises:
        SpecError: naming the pass and what it does.
    """
    # What a program with routes does besides follows from them.
    for o in sorted(program, key=lambda o: o.kind != "route"):
        why = _WHY.get(o.kind)
        if o.kind == "block":
            if o["past"] is not None:
                why = "its keys depend on how tokens are split into calls"
            elif len(o.args) == 2 and not o["memory"]:
                why = "some of the tokens only ask"
        if why:
            raise SpecError(f"emit: expected a program that a plain forward can express, got {o.note or 'one'} with {o.kind}: "
                            f"{why}. Loops, layer programs, bridges, ParallelLoop, feedback, taps, shared keys, timesteps, "
                            "scales and LoRA can be emitted; serve this one with depthpass, or fix its choice first "
                            "(dp.set_loops, dp.switch).")
    last = program.ops[-1].args[0]
    if program.defs[last].kind != "norm":
        raise SpecError(f"emit: expected a program whose output is the final norm's, got {program.defs[last].kind}.")


@dataclass
class Body:
    """Statements of a program.

    Attributes:
        lines: the statements, without indentation.
        parts: names of :mod:`depthpass.emit.parts` that they use.
        chunk: tokens that may run at once; None = any number.
        attends: visits whose attention shares keys, by place.
        modulated: visits whose branches are scaled, by place.
        taps: taps by name: whether they are logits.
        ages: whether they need the tokens' ages.
        past: whether they need to know what a cache holds.
    """

    lines: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    chunk: int | None = None
    attends: tuple[int, ...] = ()
    modulated: tuple[int, ...] = ()
    taps: dict[str, bool] = field(default_factory=dict)
    ages: bool = False
    past: bool = False


def body_of(program: Program, norm: str, cache: str) -> Body:
    """The statements between ``hidden_states`` as the embedding and as what the final norm reads.

    Args:
        norm: expression of the stock final norm.
        cache: name of the cache in the stock forward.
    """
    return _Writer(program, norm, cache).write()


class _Writer:
    def __init__(self, program: Program, norm: str, cache: str):
        self.program, self.norm, self.cache = program, norm, cache
        self.types, self.body = infer(program), Body()
        self.places = {o.name: p for p, o in enumerate(program.visits)}
        self.slots = {writes_slot(o): p for p, o in enumerate(program.visits) if writes_slot(o) is not None}
        shared = {o["keys"] for o in program.visits if o["keys"] is not None}
        self.sharing = {p for p, o in enumerate(program.visits)
                        if o["slot"] in shared or o["keys"] is not None or o["memory"]}
        delayed = dict.fromkeys(a for o in program if o.kind == "delay" for a in o.args)
        self.lines_at = {name: len(program.visits) + i for i, name in enumerate(delayed)}
        self.embed = program.entry

    def write(self) -> Body:
        body = self.body
        body.attends = tuple(sorted(self.sharing))
        body.modulated = tuple(p for p, o in enumerate(self.program.visits) if o["modulate"])
        if body.attends:
            body.parts |= {"attend", "near_mask"}
            self._say("slots = {}", "keys and values of this call's visits")
        early = [o["tokens"] for o in self.program if o.kind == "delay" and self._later(o)]
        body.chunk = min(early) if early else None
        if self.lines_at:
            body.parts |= {"line_layer", "earlier"}
        last = self.program.defs[self.program.output]
        # The stock code after the loop applies the final norm; a tap of its result wants it here as well.
        skipped = None if any(last.name in o.args for o in self.program.ops[:-1]) else last
        for o in self.program:
            if o is not skipped and o.kind not in ("output", "average", "retire"):
                self._one(o)
        self._say(f"hidden_states = {_v(last.args[0])}")
        if any(o["gate"] for o in self.program.visits) or self.lines_at:
            body.past = True
        return body

    def _later(self, delay: Op) -> bool:
        return self.program.index[delay.args[0]] > self.program.index[delay.name]

    def _say(self, line: str, note: str = "") -> None:
        self.body.lines.append(f"{line}  # {note}" if note else line)

    def _one(self, o: Op) -> None:
        if o.kind == "tap":
            self._tap(o)
            return
        self._say(f"{_v(o.name)} = {self._value(o)}", o.note)
        if o.name in self.lines_at and o.kind != "tap":
            self.body.parts.add("keep")
            self._say(f"line{self.lines_at[o.name]} = keep({self.cache}, {self.lines_at[o.name]}, {_v(o.name)})")

    def _tap(self, o: Op) -> None:
        self.body.taps[o["name"]] = bool(o["head"])
        if self.types[o.args[0]].is_route:
            raise SpecError(f"emit: expected taps of streams, got tap {o['name']!r} of a route.")
        self._say("if taps is not None:")
        self._say(f"    taps.setdefault({o['name']!r}, []).append({_v(o.args[0])})")

    def _value(self, o: Op) -> str:
        args = [_v(a) for a in o.args]
        match o.kind:
            case "embed":
                return "hidden_states"
            case "zeros":
                width = o["width"] or self.program.width
                return f"torch.zeros_like({_v(self.embed)}[..., :{width}])" if width <= self.program.width else (
                    f"{_v(self.embed)}.new_zeros(*{_v(self.embed)}.shape[:-1], {width})")
            case "block":
                return self._visit(o, args)
            case "delay":
                return self._delay(o)
            case "linear":
                x = args[0] if len(args) == 1 else f"torch.cat(({', '.join(args)}), -1)"
                return f"self.depth.{o['name']}({x})"
            case "weigh":
                return f"self.depth.{o['name']}({args[0]})"
            case "scale":
                return f"{o['by']!r} * {args[0]}"
            case "add":
                return " + ".join(self._there(o, a) for a in o.args)
            case "mul":
                return f"{args[0]} * {args[1]}"
            case "act":
                return _ACTIVATIONS[o["fn"]].format(args[0])
            case "pick":
                return f"{args[0]}[..., {o['index']} : {o['index'] + 1}]"
            case "rms":
                self.body.parts.add("rms")
                x = f"rms({args[0]}, {o['eps']!r})"
                return f"self.depth.{o['name']}({x})" if o["name"] else x
            case "rescale":
                self.body.parts.add("rescaled")
                return f"rescaled({args[0]}, {o['eps']!r}, {o['limit']!r})"
            case "norm":
                return f"{self.norm}({args[0]})"
            case "detach":
                return f"{args[0]}.detach()"
            case "select":
                self.body.parts.add("leave")
                half = len(args) // 2
                return f"leave([{', '.join(args[:half])}], [{', '.join(args[half:])}], {o['cdf']!r})"
        raise SpecError(f"emit: expected ops that a plain forward can express, got {o.kind} of {o.note or 'its own'}.")

    def _there(self, o: Op, name: str) -> str:
        """A summand, with nothing where it does not exist and others do."""
        first = self.types[name].absent
        if first <= self.types[o.name].absent:
            return _v(name)
        self.body.ages = True
        self.body.parts |= {"since", "ages"}
        return f"since(age, {first}, {_v(name)})"

    def _delay(self, o: Op) -> str:
        source = o.args[0]
        number = self.lines_at[source]
        if self._later(o):
            self.body.parts.add("kept")
            like = _v(self.embed)
            line = f"kept({self.cache}, {number}, {like}, {self.types[source].width})"
        else:
            line = f"line{number}"
        count = f"{_v(self.embed)}.shape[1]"
        if o["group"] is not None:
            self.body.ages = True
            self.body.parts |= {"group_before", "ages"}
            return f"group_before({line}, age, {o['group']}, past, {count})"
        return f"earlier({line}, {o['tokens']}, past, {count})"

    def _visit(self, o: Op, args: Sequence[str]) -> str:
        place, more = self.places[o.name], []
        if place in self.sharing:
            more.append("slots=slots")
        if o["memory"]:
            more = ["None", *more, f"reads={place}"]
        elif o["keys"] is not None:
            more.append(f"reads={self.slots[o['keys']]}")
            if o["gate"] is None:
                # It has no keys of its own to keep.
                more.insert(0, "None")
            else:
                self.body.past = True
                more += [f"gate=self.depth.{o['gate']}", f"window={o['window']}", f"hidden={args[0]}", "past=past"]
        if o["modulate"]:
            self.body.parts.add("scaled")
            time = f"self.depth.{o['clock']}({o['step']})" if o["clock"] else ""
            more.append(f"factors=scaled(self.depth.{o['modulate']}({time}), {o['base']!r})")
        if o["memory"]:
            # The layer runs on the memory first, for its keys alone.
            first = [m for m in more if m != "None" and not m.startswith("reads=")]
            self._say(f"visit({', '.join([str(place), args[1], *first])})")
        return f"visit({', '.join([str(place), args[0], *more])})"


def _v(name: str) -> str:
    return "x" + name.replace(".", "_")


def new_modules(program: Program, sizes: dict[str, Sequence[int]]) -> dict[str, tuple[str, set[str]]]:
    """New parameters as expressions that make their modules, by name, with the parts they use.

    Args:
        sizes: shapes of the transformed model's new parameters, by name.
    """
    types, found = infer(program), {}
    for o in program:
        if o.kind == "block" and o["gate"]:
            heads, width = sizes[f"{o['gate']}.weight"]
            kind = "QueryGate" if o["gate_input"] == "query" else "HiddenGate"
            found[o["gate"]] = f"{kind}({heads}, {width})", {kind} | ({"Weigh", "rms"} if kind == "HiddenGate" else set())
        if o.kind == "block" and o["modulate"]:
            found |= _modulating(o, program.width)
        elif o.kind == "linear":
            wide = sum(types[a].width for a in o.args)
            found[o["name"]] = f"nn.Linear({wide}, {o['out']}{'' if o['bias'] else ', bias=False'})", set()
        elif o.kind in ("weigh", "rms") and o["name"]:
            found[o["name"]] = f"Weigh({types[o.args[0]].width})", {"Weigh"}
    return found


def _modulating(o: Op, width: int) -> dict[str, tuple[str, set[str]]]:
    """Modules of a modulated visit."""
    if not o["clock"]:
        return {o["modulate"]: (f"Factors({width})", {"Factors"})}
    return {o["clock"]: (f"TimeEncoder({width}, {TIME_WIDTH})", {"TimeEncoder"}),
            o["modulate"]: (f"TimeFactors({width})", {"TimeFactors"})}
