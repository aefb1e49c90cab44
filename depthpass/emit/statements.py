"""A program as Python statements: one line per op, on the streams of a decoder's forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from depthpass.errors import SpecError
from depthpass.ir.program import Op, Program, writes_slot
from depthpass.ir.structural_ops import TIME_WIDTH
from depthpass.ir.verify import infer

_WHY = {
    "pad": "it inserts tokens into every row, of which the caches, masks and positions that transformers counts know nothing",
    "trim": "it inserts tokens into every row, of which the caches, masks and positions that transformers counts know nothing",
    "ahead": "its attention sees later tokens",
    "denoise": "it runs several times to fill tokens in",
}
_ACTIVATIONS = {"sigmoid": "torch.sigmoid({})", "silu": "nn.functional.silu({})", "tanh": "torch.tanh({})",
                "gelu": "nn.functional.gelu({})", "relu": "nn.functional.relu({})", "softmax": "torch.softmax({}, -1)",
                "sqrt": "torch.sqrt({})", "exp": "torch.exp({})", "softplus": "nn.functional.softplus({})",
                "reciprocal": "torch.reciprocal({})", "centre": "centred({})"}


def check_expressible(program: Program) -> None:
    """Refuse a program that no plain forward can express.

    Raises:
        SpecError: naming the pass and what it does.
    """
    for o in program:
        why = _WHY.get(o.kind)
        if o.kind == "block" and o["past"] is not None:
            why = "its keys depend on how tokens are split into calls"
        if o.kind == "route" and o["rule"] == "topk":
            why = ("it chooses among all tokens of a row, later ones too, so no token can be decoded. Route by thresholds "
                   "(mode='threshold', dp.calibrate) or by token choice")
        if why:
            raise SpecError(f"emit: expected a program that a plain forward can express, got {o.note or 'one'} with {o.kind}: "
                            f"{why}. Loops, layer programs, bridges, ParallelLoop, feedback, taps, shared keys, timesteps, "
                            "scales, LoRA, routes by thresholds and exits can be emitted; serve this one with depthpass, or fix "
                            "its choice first (dp.set_loops, dp.switch).")
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
        halved: visits that run their attention and their network apart, by place.
        taps: taps by name: whether they are logits.
        ages: whether they need the tokens' ages.
        past: whether they need to know what a cache holds.
        routed: whether visits see the keys of some tokens only.
        predicts: whether they ask the head what it makes of unfinished states.
        lost: losses of the program's own, which emitted code does not have.
    """

    lines: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    chunk: int | None = None
    attends: tuple[int, ...] = ()
    modulated: tuple[int, ...] = ()
    halved: tuple[int, ...] = ()
    taps: dict[str, bool] = field(default_factory=dict)
    ages: bool = False
    past: bool = False
    routed: bool = False
    predicts: bool = False
    lost: tuple[str, ...] = ()


def body_of(program: Program, norm: str, cache: str, beside: bool = False) -> Body:
    """The statements between ``hidden_states`` as the embedding and as what the final norm reads.

    Args:
        norm: expression of the stock final norm.
        cache: name of the cache in the stock forward.
        beside: whether the branches of its blocks run beside each other.
    """
    return _Writer(program, norm, cache, beside).write()


class _Writer:
    def __init__(self, program: Program, norm: str, cache: str, beside: bool):
        self.program, self.norm, self.cache, self.beside = program, norm, cache, beside
        self.types, self.body = infer(program), Body()
        self.places = {o.name: p for p, o in enumerate(program.visits)}
        self.slots = {writes_slot(o): p for p, o in enumerate(program.visits) if writes_slot(o) is not None}
        shared = {o["keys"] for o in program.visits if o["keys"] is not None}
        # The route whose tokens alone have keys in a slot.
        self.holds = {writes_slot(o): self.types[o.args[0]].tokens for o in program.visits if writes_slot(o) is not None}
        self.sharing = {p for p, o in enumerate(program.visits)
                        if o["slot"] in shared or o["keys"] is not None or o["memory"] or self.types[o.args[0]].tokens}
        delayed = [a for o in program if o.kind == "delay" for a in o.args]
        kept = dict.fromkeys((*delayed, *(route for route in self.holds.values() if route)))
        self.lines_at = {name: len(program.visits) + i for i, name in enumerate(kept)}
        self.embed = program.entry

    def write(self) -> Body:
        body = self.body
        body.attends = tuple(sorted(self.sharing))
        body.halved = tuple(p for p, o in enumerate(self.program.visits) if o["part"] != "whole")
        body.modulated = tuple(p for p, o in enumerate(self.program.visits) if o["modulate"])
        if body.attends:
            body.parts |= {"attend", "near_mask", "Slots"}
            self._say("slots = Slots()", "keys and values of this call's visits")
        early = [o["tokens"] for o in self.program if o.kind == "delay" and self._later(o)]
        body.chunk = min(early) if early else None
        if self.lines_at:
            body.parts.add("line_layer")
        if self.program.losses:
            self.body.lost = tuple(dict.fromkeys(o["name"] for o in self.program.losses))
        last = self.program.defs[self.program.output]
        # The stock code after the loop applies the final norm; a tap of its result wants it here as well.
        skipped = None if any(last.name in o.args for o in self.program.ops[:-1]) else last
        for o in self.program:
            if o is not skipped and o.kind not in ("output", "average", "retire", "loss"):
                self._one(o)
        self._say(f"hidden_states = {_v(last.args[0])}")
        if any(o["gate"] for o in self.program.visits) or self.lines_at or body.ages:
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
            # Which tokens were chosen is kept as a stream, too.
            line = f"{_v(o.name)}[..., None].to({_v(self.embed)})" if o.kind == "route" else _v(o.name)
            self._say(f"line{self.lines_at[o.name]} = keep({self.cache}, {self.lines_at[o.name]}, {line})")

    def _tap(self, o: Op) -> None:
        self.body.taps[o["name"]] = bool(o["head"])
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
            case "point":
                return args[0 if self.beside else 1]
            case "ffn":
                before = self.program.ops[: self.program.index[o.name]]
                own = next(p for p in reversed(before) if p.kind == "block" and p["index"] == o["index"])
                read = "" if args[0] == args[1] else f", read={args[1]}"
                return f'visit({self.places[own.name]}, {args[0]}, part="ffn"{read})'
            case "delay":
                return self._delay(o)
            case "route":
                return self._route(o, args)
            case "gather":
                return args[0]
            case "scatter":
                base, new, route = args
                put = f"{base} + {new}" if o["mode"] == "add" else new
                return f"torch.where({route}[..., None], {put}, {base})"
            case "noise":
                return self._noise(o)
            case "select":
                self.body.parts.add("leave")
                half = len(args) // 2
                return f"leave([{', '.join(args[:half])}], [{', '.join(args[half:])}], {o['cdf']!r})"
        return self._local(o, args)

    def _noise(self, o: Op) -> str:
        self.body.ages = True
        self.body.parts |= {"ages", "noise", "drawn"}
        number = [p.name for p in self.program if p.kind == "noise"].index(o.name)
        width = o["width"] or self.program.width
        return f"noise(age, {number}, {_v(self.embed)}, {width}, {o['std']!r}, {o['cut']!r}, self.training)"

    def _local(self, o: Op, args: Sequence[str]) -> str:
        """A token's value from values of the same token."""
        match o.kind:
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
                if o["fn"] == "centre":
                    self.body.parts.add("centred")
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
            case "logits":
                self.body.predicts = True
                return f"predict({args[0]})"
            case "distance":
                self.body.parts.add("moved")
                return f"moved({args[0]}, {args[1]}, {o['rule']!r})"
        raise SpecError(f"emit: expected ops that a plain forward can express, got {o.kind} of {o.note or 'its own'}.")

    def _route(self, o: Op, args: Sequence[str]) -> str:
        """Which tokens are chosen, ``[batch, tokens]``. Streams of chosen tokens are those of all tokens, of which the others
        are dropped again: one text for every number of tokens."""
        score = f"{args[0]}.detach()" + (f" + self.depth.{o['bias']}.bias" if o["bias"] else "")
        match o["rule"]:
            case "threshold":
                chosen = f"({score})[..., 0] >= {o['threshold']!r}"
            case "above":
                chosen = f"({score})[..., 0] > {o['threshold']!r}"
            case _:
                chosen = f"({score}).argmax(-1) + 1 >= {o['depth']}"
        self.body.ages = True
        self.body.parts.add("ages")
        return f"({chosen}) & {args[1] if len(args) == 2 else '(age >= 0)'}"

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
        self.body.parts.add("earlier")
        return f"earlier({line}, {o['tokens']}, past, {count})"

    def _visit(self, o: Op, args: Sequence[str]) -> str:
        place, arguments = self.places[o.name], []
        if place in self.sharing:
            arguments.append("slots=slots")
        if o["memory"]:
            arguments = ["None", *arguments, f"reads={place}"]
        elif o["keys"] is not None:
            arguments.append(f"reads={self.slots[o['keys']]}")
            if o["update"]:
                arguments.append("update=True")
            elif o["gate"] is None:
                # It has no keys of its own to keep.
                arguments.insert(0, "None")
            else:
                self.body.past = True
                arguments += [f"gate=self.depth.{o['gate']}", f"window={o['window']}", f"hidden={args[0]}", "past=past"]
        arguments += self._some_keys(o)
        if o["part"] != "whole":
            arguments.append(f'part="{o["part"]}"')
        if o["modulate"]:
            self.body.parts.add("scaled")
            time = f"self.depth.{o['clock']}({o['step']})" if o["clock"] else ""
            arguments.append(f"factors=scaled(self.depth.{o['modulate']}({time}), {o['base']!r})")
        if o["memory"]:
            # The layer runs on the memory first, for its keys alone.
            first = [m for m in arguments if m != "None" and not m.startswith("reads=")]
            self._say(f"visit({', '.join([str(place), args[1], *first])})")
        return f"visit({', '.join([str(place), args[0], *arguments])})"


    def _some_keys(self, o: Op) -> list[str]:
        """Arguments of a visit that sees the keys of some tokens only.

        Raises:
            SpecError: it would mix the keys of two sets of tokens.
        """
        own = self.holds[o["slot"]] if writes_slot(o) is not None else None
        far = None if o["keys"] is None else self.holds[o["keys"]]
        if far is not None and (o["gate"] or o["update"]):
            raise SpecError(f"emit: expected gated and updated keys beside those of all tokens, got {o.note or 'a visit'} beside "
                            "keys of routed tokens.")
        if own is not None and o["gate"]:
            raise SpecError(f"emit: expected a gate on visits of all tokens, got {o.note or 'one'} on routed tokens.")
        route = own if o["keys"] is None or o["update"] else far
        if route is None:
            return []
        self.body.past = self.body.routed = True
        self.body.parts |= {"some_keys", "narrowed", "taken"}
        past = [] if o["gate"] else ["past=past"]
        return [f"taken_by=line{self.lines_at[route]}", *past]


def _v(name: str) -> str:
    return "x" + name.replace(".", "_")


def new_modules(program: Program, sizes: dict[str, Sequence[int]]) -> dict[str, tuple[str, set[str]]]:
    """New parameters as expressions that make their modules, by name, with the parts they use.

    Args:
        sizes: shapes of the transformed model's new parameters, by name.
    """
    types, modules = infer(program), {}
    for o in program:
        if o.kind == "block" and o["gate"]:
            heads, width = sizes[f"{o['gate']}.weight"]
            kind = "QueryGate" if o["gate_input"] == "query" else "HiddenGate"
            modules[o["gate"]] = f"{kind}({heads}, {width})", {kind} | ({"Weigh", "rms"} if kind == "HiddenGate" else set())
        if o.kind == "block" and o["modulate"]:
            modules |= _modulating(o, program.width)
        elif o.kind == "linear":
            wide = sum(types[a].width for a in o.args)
            modules[o["name"]] = f"nn.Linear({wide}, {o['out']}{'' if o['bias'] else ', bias=False'})", set()
        elif o.kind == "route" and o["bias"]:
            modules[o["bias"]] = f"Balance({types[o.args[0]].width})", {"Balance"}
        elif o.kind in ("weigh", "rms") and o["name"]:
            modules[o["name"]] = f"Weigh({types[o.args[0]].width})", {"Weigh"}
    return modules


def _modulating(o: Op, width: int) -> dict[str, tuple[str, set[str]]]:
    """Modules of a modulated visit."""
    if not o["clock"]:
        return {o["modulate"]: (f"Factors({width})", {"Factors"})}
    return {o["clock"]: (f"TimeEncoder({width}, {TIME_WIDTH})", {"TimeEncoder"}),
            o["modulate"]: (f"TimeFactors({width})", {"TimeFactors"})}
