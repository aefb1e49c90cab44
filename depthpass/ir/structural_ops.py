"""The ops that have a past, choose tokens, change the row or hand something out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from depthpass.errors import VerifyError
from depthpass.ir.definitions import CHUNK, EVERYWHERE, STEP, SWEEP, AttrDef, OpDef, Param, Type, Work, expect, where
from depthpass.ir.local_ops import NAME, broadcast, everywhere, hidden_width

if TYPE_CHECKING:
    from depthpass.ir.program import Op, Program

ROUTE_RULES = ("topk", "threshold", "above", "choice")
LOSS_RULES = ("bce", "balance", "z")
SCATTER_MODES = ("add", "replace")

TIME_WIDTH = 256
"""Width of the sinusoid that a time encoder reads."""


def _some_token(program: Program, o: Op) -> None:
    if o["tokens"] < 1:
        raise VerifyError(f"{where(o)}: expected at least 1 token, got {o['tokens']}; a cycle needs a delay.")


def _pad_check(program: Program, o: Op) -> None:
    _some_token(program, o)
    if o["at"] is not None and o["behind"] is not None:
        raise VerifyError(f"{where(o)}: expected one place for the pads, got at {o['at']} and behind {o['behind']}.")


# Blocks.


def _block_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    first = args[0]
    hidden_width(program, o, args)
    everywhere(o, first)
    if len(args) == 1:
        expect(not o["memory"], o, "a second stream, which the keys come from", "one argument")
        return first
    if o["memory"]:
        second = args[1]
        expect(not second.is_route and second.width == program.width, o, f"keys from a stream of width {program.width}",
               "a route" if second.is_route else f"width {second.width}")
        expect((second.tokens, second.pads) == (None, first.pads) and first.tokens is None, o,
               "keys from a stream over the same tokens, all of them", "routed tokens, or another padding")
        expect(second.absent == 0, o, "keys from a stream that every token has",
               f"one that is absent at the first {second.absent} tokens; add it to another stream first")
        return first
    expect(args[1].is_route and first.tokens is None, o, "(a stream over all tokens, the route that asks)", "something else")
    expect(args[1].pads == first.pads, o, "a route over the same tokens", "another padding")
    return Type(first.width, o.args[1], 0, first.pads)


def _block_parameters(o: Op, widths: Sequence[int], hidden: int) -> list[Param]:
    """Of a modulated visit: its factors start at zero, a time encoder (two linear maps) as usual."""
    name, clock = o["modulate"], o["clock"]
    if not name:
        return []
    if clock is None:
        return [Param(f"{name}.weight", (4, hidden))]
    return [
        Param(f"{name}.weight", (4 * hidden, hidden)), Param(f"{name}.bias", (4 * hidden,)),
        Param(f"{clock}.rise.weight", (hidden, TIME_WIDTH), 0.02), Param(f"{clock}.rise.bias", (hidden,)),
        Param(f"{clock}.mix.weight", (hidden, hidden), 0.02), Param(f"{clock}.mix.bias", (hidden,)),
    ]


def _part_check(program: Program, o: Op) -> None:
    if o["part"] == "whole":
        return
    for key, what in (("lora", "a LoRA"), ("modulate", "scales")):
        if o[key]:
            raise VerifyError(f"{where(o)}: expected {what} on a visit of a whole block, got one of its attention alone. "
                              "Apply one of the two passes.")
    if asks(o):
        raise VerifyError(f"{where(o)}: expected a visit that every token asks, or routed tokens gathered before it, got a route "
                          "beside part attention.")


def _ffn_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    hidden_width(program, o, args)
    expect(all((a.width, a.tokens, a.pads, a.absent) == (args[0].width, args[0].tokens, args[0].pads, 0) for a in args), o,
           "two streams of the model's width over the same tokens, at all of them", "others")
    return args[0]


def asks(o: Op) -> bool:
    """Whether it is a visit that only the tokens of its second argument, a route, ask."""
    return o.kind == "block" and len(o.args) == 2 and not o["memory"]


def keys_from(visit: Op) -> str:
    """The stream that a visit's own keys and values are computed from."""
    return visit.args[1] if visit["memory"] else visit.args[0]


def slot_written(visit: Op) -> int | None:
    """Slot a visit writes keys and values to, or None when it only reads another visit's keys."""
    return visit["slot"] if visit["keys"] is None or visit["gate"] is not None or visit["update"] else None


def slots_read(visit: Op) -> tuple[int, ...]:
    """Slots a visit attends to."""
    if visit["keys"] is None:
        return (visit["slot"],)
    return (visit["keys"],) if slot_written(visit) is None else (visit["keys"], visit["slot"])


def _block_refuses(o: Op, place: str) -> str | None:
    """Operands of a visit that a place cannot honour."""
    if place == CHUNK and asks(o):
        return f"only routed tokens ask block {o['index']}"
    if place == CHUNK and o["lora"]:
        return f"block {o['index']} has a LoRA of its own for each visit"
    if o["past"] is not None:
        return f"block {o['index']} reads the keys of earlier calls in another visit's slot"
    if place in (CHUNK, STEP) and o["modulate"]:
        return f"block {o['index']} is modulated by its visit"
    return None


# Delays and sums.


def _delay_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    source = args[0]
    expect(not source.is_route, o, "a stream", "a route")
    expect(source.tokens is None, o, "a stream over all tokens", "routed tokens; scatter them back first")
    return Type(source.width, None, _delay_begins(o, source.absent), source.pads)


def _delay_check(program: Program, o: Op) -> None:
    _some_token(program, o)
    if o["group"] is not None and o["tokens"] != 1:
        raise VerifyError(f"{where(o)}: expected 1 token beside a group, whose tokens read the last one of the group before, got "
                          f"{o['tokens']}.")


def _delay_begins(o: Op, first: int) -> int:
    group = o["group"]
    return first + o["tokens"] if group is None else group * (first // group + 1)


# Routes.


def _route_check(program: Program, o: Op) -> None:
    for key, rule in (("capacity", "topk"), ("rounding", "topk"), ("threshold", "threshold above"), ("depth", "choice"),
                      ("bias", "choice")):
        if key in dict(o.attrs) and o["rule"] not in rule.split():
            raise VerifyError(f"{where(o)}: {key!r} belongs to rule {' or '.join(rule.split())}, got rule {o['rule']}.")
    if o["capacity"] is not None and not 0 < o["capacity"] <= 1:
        raise VerifyError(f"{where(o)}: expected a capacity in (0, 1], got {o['capacity']}.")


def _route_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    first = args[0]
    expect(not first.is_route and first.absent == 0, o, "a score stream that every token has", "something else")
    choice = o["rule"] == "choice"
    expect(choice or first.width == 1, o, "a score of width 1", f"width {first.width}")
    expect(o["rule"] != "topk" or o["capacity"] is not None, o, "capacity for rule topk", "none")
    expect(not choice or o["depth"] is not None, o, "depth for rule choice", "none")
    expect(len(args) == 1 or args[1].is_route, o, "a route to nest in as second argument", "a stream")
    expect(first.tokens == (o.args[1] if len(args) == 2 and first.tokens else first.tokens), o,
           "the score of the enclosing route's tokens", f"tokens of {first.tokens}")
    return Type(0, None, 0, first.pads)


def _route_parameters(o: Op, widths: Sequence[int], hidden: int) -> list[Param]:
    return [Param(f"{o['bias']}.bias", (widths[0],), fill=0.0, trained=False)] if o["bias"] else []


def _gather_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    first = args[0]
    expect(not first.is_route and args[1].is_route, o, "(stream, route)", "something else")
    expect(first.tokens is None, o, "a stream over all tokens", "routed tokens")
    expect(first.absent == 0, o, "a stream that every token has", f"one absent at {first.absent} tokens")
    return Type(first.width, o.args[1], 0, first.pads)


def _scatter_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    base, sub, route = args
    expect(route.is_route and sub.tokens == o.args[2] and base.tokens is None, o,
           "(stream, stream over the route's tokens, route)", "something else")
    expect(base.width == sub.width, o, f"width {base.width}", f"width {sub.width}")
    return base


# What changes the row, and what is handed out.


def _trim_accepts(program: Program, o: Op, args: Sequence[Type]) -> None:
    expect(args[0].pads == o["tokens"], o, f"{args[0].pads} pad tokens to trim", str(o["tokens"]))


def _loss_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    first = args[0]
    expect(not first.is_route and first.tokens is None and first.absent == 0, o, "a score that every token has", "something else")
    expect(o["rule"] != "bce" or first.width == 1, o, "a score of width 1", f"width {first.width}")
    expect(len(args) == 1 or (o["rule"] != "balance" and args[1].is_route), o, "a route as second argument, of bce or z",
           "something else")
    return first


def _whole(o: Op, first: Type) -> None:
    expect(first.tokens is None and first.absent == 0 and not first.is_route, o, "a stream that every token has", "a partial one")


def _tap_typed(program: Program, o: Op, args: Sequence[Type]) -> Type:
    if args[0].is_route:
        expect(not o["head"], o, "a stream for head true", "a route")
    else:
        _whole(o, args[0])
    return args[0]


def _output_accepts(program: Program, o: Op, args: Sequence[Type]) -> None:
    _whole(o, args[0])
    hidden_width(program, o, args)


# What happens to weights before anything runs.


def _average_check(program: Program, o: Op) -> None:
    if not o["blocks"]:
        raise VerifyError(f"{where(o)}: expected at least one block to average, got none.")


def _once_check(program: Program, o: Op) -> None:
    if sum(other.kind == o.kind for other in program.ops) > 1:
        raise VerifyError(f"{o.kind}: expected it once in a program, got it again.")


def _ahead_check(program: Program, o: Op) -> None:
    """What sees later tokens cannot wait for them: nothing of the program may go from token to token."""
    _once_check(program, o)
    for other in program.ops:
        if waiting := waits(other):
            raise VerifyError(f"{where(other)}: expected attention that sees no later token beside {waiting}, got a program with "
                              "'ahead', whose tokens run together. Leave one of the two out.")


def waits(o: Op) -> str | None:
    """What of an op lets a token wait for earlier ones, in words; None = nothing."""
    if o.kind == "delay":
        return "a delay"
    if o.kind == "pad" and o["feed"]:
        return "latents"
    if o.kind != "block":
        return None
    operands = {"a gated window": o["gate"], "keys of earlier calls": o["past"], "a memory": o["memory"] or None}
    return next((what for what, value in operands.items() if value is not None), None)


def _retire_check(program: Program, o: Op) -> None:
    if any(v["index"] == o["index"] for v in program.visits):
        raise VerifyError(f"{where(o)}: expected a block that no visit runs, got {o['index']}.")


def _own_width(o: Op, widths: Sequence[int], hidden: int) -> int:
    return o["width"] or hidden


def _own_pads(o: Op, before: int) -> int:
    return o["pads"]


_BLOCK = AttrDef(int, required=True, block=True)
_SLOT = AttrDef(int, low=0)
_PADS = AttrDef(int, 0, low=0)
_SCOPE = AttrDef(str, scope=True)
_TOKENS = AttrDef(int, required=True, bounded=True)
_WIDTH = AttrDef(int, low=1, bounded=True)

STRUCTURAL_OPS = (
    OpDef("embed", None, (0, 0), work=None, runs=frozenset({STEP})),
    OpDef(
        "zeros", None, (0, 0), dict(width=_WIDTH, pads=_PADS), width=_own_width, pads=_own_pads, work=None,
        runs=frozenset({STEP}),
    ),
    OpDef(
        "noise", "std", (0, 0),
        dict(std=AttrDef(float, required=True, low=0.0), width=_WIDTH, cut=AttrDef(float, low=0.0), pads=_PADS),
        width=_own_width, pads=_own_pads, work=None,
    ),
    OpDef(
        "block", "index", (1, 2),
        dict(
            index=_BLOCK, slot=AttrDef(int, required=True, low=0), keys=_SLOT, past=_SLOT,
            gate=_SCOPE, window=AttrDef(int, needs="gate"),
            gate_input=AttrDef(str, "query", choices=("query", "hidden"), needs="gate"),
            gate_init=AttrDef(float, 0.0, needs="gate"),
            lora=AttrDef(str, needs="lora_rank", scope=True), lora_rank=AttrDef(int, low=1, bounded=True, needs="lora"),
            untied=AttrDef(int, needs="lora", block=True),
            modulate=_SCOPE, clock=AttrDef(str, needs="modulate", scope=True), step=AttrDef(int, 0, low=0, needs="clock"),
            base=AttrDef(float, 1.0, needs="modulate"), memory=AttrDef(bool, False),
            update=AttrDef(bool, False, needs="keys"),
            part=AttrDef(str, "whole", choices=("whole", "attention")),
        ),
        token_local=False, check=_part_check, typed=_block_typed, slots_read=slots_read, slot_written=slot_written,
        depth=lambda o: (1, 1) if o["part"] == "whole" else (1, 0), parameters=_block_parameters, work=None, runs=EVERYWHERE,
        refuses=_block_refuses,
    ),
    OpDef("point", "index", (2, 2), dict(index=_BLOCK), typed=_ffn_typed, work=None, runs=EVERYWHERE),
    OpDef(
        "ffn", "index", (2, 2), dict(index=_BLOCK), typed=_ffn_typed, depth=lambda o: (0, 1), work=None, runs=EVERYWHERE,
    ),
    OpDef(
        "delay", "tokens", attrs=dict(tokens=_TOKENS, group=AttrDef(int, low=2, bounded=True)), forward_refs=True,
        token_local=False, check=_delay_check, typed=_delay_typed, lag=lambda o: o["group"] or o["tokens"], begins=_delay_begins,
        work=None, runs=EVERYWHERE,
    ),
    OpDef(
        "add", None, (2, None), dict(lands=AttrDef(str, "output", choices=("output", "input"))),
        accepts=broadcast("equal widths"), absent=lambda absences: min(absences, default=0),
        work=lambda o, widths, out, hidden: Work(elementwise=out * (len(o.args) - 1)), runs=frozenset({CHUNK, STEP, SWEEP}),
    ),
    OpDef(
        "route", "rule", (1, 2),
        dict(
            rule=AttrDef(str, required=True, choices=ROUTE_RULES), capacity=AttrDef(float),
            rounding=AttrDef(str, "floor", choices=("floor", "ceil")), threshold=AttrDef(float, 0.5),
            depth=AttrDef(int, low=1), label=AttrDef(str), bias=_SCOPE, rate=AttrDef(float, low=0.0, needs="bias"),
        ),
        token_local=False, check=_route_check, width=lambda o, widths, hidden: 0, typed=_route_typed,
        waits=lambda o: o["rule"] == "topk", parameters=_route_parameters, work=None,
    ),
    OpDef("gather", None, (2, 2), typed=_gather_typed, work=None),
    OpDef(
        "scatter", None, (3, 3), dict(mode=AttrDef(str, "add", choices=SCATTER_MODES)), typed=_scatter_typed, work=None,
    ),
    OpDef(
        "pad", "tokens",
        attrs=dict(tokens=_TOKENS, token=AttrDef(int, low=0), feed=AttrDef(bool, False), at=AttrDef(int, low=1),
                   behind=AttrDef(int, low=0)),
        token_local=False, check=_pad_check,
        pads=lambda o, before: before + o["tokens"], work=None, runs=frozenset({STEP}),
    ),
    OpDef(
        "trim", "tokens", attrs=dict(tokens=AttrDef(int, required=True)), token_local=False, check=_some_token,
        accepts=_trim_accepts, pads=lambda o, before: 0, work=None, runs=frozenset({STEP}),
    ),
    OpDef(
        "tap", "name", attrs=dict(name=NAME, head=AttrDef(bool, False)), defines=False, typed=_tap_typed, work=None,
        runs=frozenset({STEP}),
    ),
    OpDef(
        "loss", "rule", (1, 2),
        dict(rule=AttrDef(str, required=True, choices=LOSS_RULES), name=NAME, coefficient=AttrDef(float, 1.0, low=0.0)),
        token_local=False, typed=_loss_typed, defines=False, work=None,
    ),
    OpDef(
        "average", "index", (0, 0), dict(index=_BLOCK, blocks=AttrDef(tuple, required=True, block=True)), check=_average_check,
        runs=frozenset({STEP}), defines=False, work=None,
    ),
    OpDef("retire", "index", (0, 0), dict(index=_BLOCK), check=_retire_check, runs=frozenset({STEP}), defines=False, work=None),
    OpDef(
        "ahead", "tokens", (0, 0), dict(tokens=AttrDef(int, required=True, low=0)), check=_ahead_check, defines=False, work=None,
    ),
    OpDef(
        "denoise", "steps", (0, 0),
        dict(steps=AttrDef(int, required=True, low=1), order=AttrDef(str, "confidence"),
             token=AttrDef(int, required=True, low=0), carry=AttrDef(int, 0, low=0)),
        check=_once_check, defines=False, work=None,
    ),
    OpDef("output", accepts=_output_accepts, runs=frozenset({STEP}), defines=False, work=None),
)
