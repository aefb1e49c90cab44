"""Text form of lowered programs: prints, parses, round-trips."""

from __future__ import annotations

import re
from dataclasses import replace

from depthpass.errors import ParseError
from depthpass.ir.program import Op
from depthpass.ir.text import NOTE_COLUMN, format_op, parse_op
from depthpass.lowered.ops import LoweredOp
from depthpass.lowered.program import Kind, Line, LoweredProgram, LoweredRegion

_HEADER = re.compile(r"lowered\s+(\S+)\s+call=(\w+)\s+level=([\w-]+)\s+blocks=(\d+)\s+width=(\d+)$")
_REGION = re.compile(r"region (\d+) (parallel|chunks of (\d+)|step of at most (\d+)) level ([\w-]+)(?: because (.*))?$")
_LINE = re.compile(r"line %([\w.]+) \(%([\w.]+)\) tokens (\d+)$")
_WORDS = "row|reads|writes|past|line|side inputs|uncut"
_ACCESS = re.compile(rf"\s{{2}}({_WORDS}) (.*?)(?=\s{{2}}(?:{_WORDS}) |$)")


def format_lowered(program: LoweredProgram) -> str:
    """Print a lowered program; :func:`parse_lowered` reads it back."""
    p = program
    lines = [f"lowered {p.model} call={p.call} level={p.level} blocks={p.blocks} width={p.width}"]
    for number, region in enumerate(p.regions):
        how = {"parallel": "parallel", "chunks": f"chunks of {region.chunk}", "step": f"step of at most {region.chunk}"}
        because = f" because {region.reason}" if region.reason else ""
        lines.append(f"region {number} {how[region.kind]} level {region.level}{because}")
        lines += [f"  {word} {_values(names)}" for word, names in (("in", region.inputs),) if names]
        lines += [_format_op(o) for o in region.ops]
        lines += [f"  line %{line.name} (%{line.source}) tokens {line.tokens}" for line in region.lines]
        lines += [f"  {word} {_values(names)}" for word, names in (("out", region.outputs), ("last", region.last)) if names]
    return "\n".join(lines)


def _values(names: tuple[str, ...]) -> str:
    return ", ".join(f"%{n}" for n in names)


def _format_op(o: LoweredOp) -> str:
    access = [
        ("row", "" if o.row is None else str(o.row)), ("reads", ", ".join(f"slot {s}" for s in o.reads)),
        ("past", "" if o.past is None else f"slot {o.past}"), ("line", f"%{o.line}" if o.line else ""),
        ("side inputs", ", ".join(map(str, o.side_inputs))), ("writes", "" if o.writes is None else f"slot {o.writes}"),
        ("uncut", o.uncut or ""),
    ]
    text = f"  {format_op(o.op)}" + "".join(f"  {word} {what}" for word, what in access if what)
    return f"{text:<{NOTE_COLUMN}}  # {o.op.note}" if o.op.note else text


def parse_lowered(text: str) -> LoweredProgram:
    """Read the text of a lowered program.

    Raises:
        ParseError: with the line number, what was expected and what was found.
    """
    lines = [(i, raw.rstrip()) for i, raw in enumerate(text.splitlines(), 1) if raw.split("#")[0].strip()]
    head = _HEADER.match(lines[0][1].split("#")[0].strip()) if lines else None
    if head is None:
        raise ParseError("expected 'lowered NAME call=.. level=.. blocks=.. width=..' as the first line.")
    regions: list[LoweredRegion] = []
    for number, line in lines[1:]:
        body = line.strip()
        if match := _REGION.match(body.split("  #")[0].strip()):
            kind: Kind = "parallel" if match[2] == "parallel" else "chunks" if match[3] else "step"
            size = match[3] or match[4]
            regions.append(LoweredRegion(kind, (), int(size) if size else None, match[5], match[6]))
        elif not regions:
            raise ParseError(f"line {number}: expected 'region 0 ..', got {body!r}.")
        else:
            regions[-1] = _add(regions[-1], number, line)
    return LoweredProgram(head[1], head[2], head[3], int(head[4]), int(head[5]), tuple(regions))


def _add(region: LoweredRegion, number: int, line: str) -> LoweredRegion:
    """A region with one more line of text."""
    body, _, note = line.strip().partition("  # ")
    word, _, rest = body.strip().partition(" ")
    if match := _LINE.match(body.strip()):
        return replace(region, lines=(*region.lines, Line(match[1], match[2], int(match[3]))))
    if word in ("in", "out", "last") and rest.startswith("%"):
        key = {"in": "inputs", "out": "outputs", "last": "last"}[word]
        return replace(region, **{key: tuple(v.strip().removeprefix("%") for v in rest.split(","))})
    return replace(region, ops=(*region.ops, _parse_op(number, body.strip(), note.strip())))


def _parse_op(number: int, body: str, note: str) -> LoweredOp:
    access = dict(_ACCESS.findall(body))
    op: Op = replace(parse_op(number, _ACCESS.sub("", body), parts=True), note=note)

    def slots(word: str) -> tuple[int, ...]:
        return tuple(int(s.removeprefix("slot ")) for s in access[word].split(", ")) if word in access else ()

    try:
        return LoweredOp(
            op, slots("reads"), next(iter(slots("writes")), None), next(iter(slots("past")), None),
            access["line"].removeprefix("%") if "line" in access else None,
            tuple(int(s) for s in access["side inputs"].split(", ")) if "side inputs" in access else (),
            int(access["row"]) if "row" in access else None, access.get("uncut"),
        )
    except ValueError:
        raise ParseError(f"line {number}: expected accesses such as 'reads slot 1, slot 2', got {body!r}.") from None
