"""Text form of programs: prints, parses, round-trips. Provenance comments are kept but carry no meaning."""

from __future__ import annotations

import re

from depthpass.errors import ParseError, did_you_mean
from depthpass.ir.ops import OPS, PARTS, Attr, AttrDef, definition
from depthpass.ir.program import Op, Program, _ordered

_HEADER = re.compile(r"program\s+(\S+)((?:\s+\w+=\d+)*)\s*$")
_DEF = re.compile(r"%([\w.:]+)\s*=\s*(.*)$")
_TOKEN = re.compile(r"\s*(%[\w.:]+|\(|\)|\[|\]|,|[^\s()\[\],]+)")
NOTE_COLUMN = 48


def format_attr(value: Attr) -> str:
    """Text of one attribute value; floats keep their exact value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(format_attr(v) for v in value) + "]"
    return repr(value) if isinstance(value, float) else str(value)


def format_op(o: Op) -> str:
    """One line of program text, without indentation and comment.

    Prints invalid ops as well: the verifier shows them.
    """
    lead = definition(o.kind).lead if o.kind in OPS or o.kind in PARTS else None
    args = ", ".join(f"%{a}" for a in o.args)
    parts = [o.kind]
    parts += [format_attr(v) for k, v in o.attrs if k == lead]
    if o.args:
        parts.append(args if o.kind == "output" else f"({args})")
    parts += [f"{k} {format_attr(v)}" for k, v in o.attrs if k != lead]
    return (f"%{o.name} = " if o.name else "") + " ".join(parts)


def format_program(program: Program) -> str:
    """Print a program; :func:`parse_program` reads it back."""
    lines = [
        f"program {program.model} blocks={program.blocks} width={program.width} "
        f"visits={len(program.visits)} slots={len(program.slots)}"
    ]
    for o in program.ops:
        line = "  " + format_op(o)
        lines.append(f"{line:<{NOTE_COLUMN}}  # {o.note}" if o.note else line)
    return "\n".join(lines)


def parse_program(text: str) -> Program:
    """Read a program text.

    Raises:
        ParseError: with the line number, what was expected and what was found.
    """
    lines = [(i, raw.rstrip()) for i, raw in enumerate(text.splitlines(), 1) if raw.split("#")[0].strip()]
    if not lines:
        raise ParseError("empty program text: expected a line 'program NAME blocks=.. width=..'.")
    head = _HEADER.match(lines[0][1].split("#")[0].strip())
    fields = dict(f.split("=") for f in head[2].split()) if head else {}
    if not head or not {"blocks", "width"} <= fields.keys():
        raise ParseError(
            f"line {lines[0][0]}: expected 'program NAME blocks=.. width=..', got {lines[0][1].strip()!r}."
        )
    if extra := fields.keys() - {"blocks", "width", "visits", "slots"}:
        raise ParseError(f"line {lines[0][0]}: unknown header field {sorted(extra)[0]!r}.")
    ops = tuple(parse_op(number, line) for number, line in lines[1:])
    program = Program(head[1], int(fields["blocks"]), int(fields["width"]), ops)
    for name, have in (("visits", len(program.visits)), ("slots", len(program.slots))):
        if name in fields and int(fields[name]) != have:
            raise ParseError(f"line {lines[0][0]}: header says {name}={fields[name]}, the ops have {have}.")
    return program


def parse_op(number: int, line: str, parts: bool = False) -> Op:
    """One op of a program text.

    Args:
        parts: whether it may be a part of a visit, which stands in lowered programs alone.

    Raises:
        ParseError: with the line's number.
    """
    body, _, note = line.partition("#")
    body, note = body.strip(), note.strip()
    name = ""
    if match := _DEF.match(body):
        name, body = match[1], match[2]
    tokens = _TOKEN.findall(body)
    kind = tokens[0] if tokens else ""
    if kind not in OPS and not (parts and kind in PARTS):
        raise ParseError(f"line {number}: unknown op {kind!r}.{did_you_mean(kind, OPS)} Known: {', '.join(OPS)}.")
    spec, rest, attrs, args = definition(kind), tokens[1:], {}, []
    if bool(name) != spec.defines:
        raise ParseError(f"line {number}: {kind!r} {'needs a' if spec.defines else 'has no'} result.")
    if kind == "output":
        rest = ["(", *rest, ")"]
    if spec.lead:
        if not rest or rest[0] == "(":
            raise ParseError(f"line {number}: {kind!r} needs {spec.lead!r} right after its name.")
        attrs[spec.lead] = _value(number, spec.lead, spec.attrs[spec.lead], rest.pop(0))
    if rest and rest[0] == "(":
        close = rest.index(")") if ")" in rest else -1
        if close < 0:
            raise ParseError(f"line {number}: '(' is never closed.")
        for word in rest[1:close]:
            if word != "," and not word.startswith("%"):
                raise ParseError(f"line {number}: expected a value like %3 between the brackets, got {word!r}.")
        args = [w[1:] for w in rest[1:close] if w != ","]
        rest = rest[close + 1 :]
    while rest:
        key = rest.pop(0)
        if key not in spec.attrs:
            raise ParseError(f"line {number}: {kind!r} has no attribute {key!r}.{did_you_mean(key, spec.attrs)}")
        if key in attrs:
            raise ParseError(f"line {number}: attribute {key!r} is given twice.")
        if not rest:
            raise ParseError(f"line {number}: attribute {key!r} has no value.")
        if spec.attrs[key].type is tuple:
            attrs[key] = _numbers(number, key, rest)
        else:
            attrs[key] = _value(number, key, spec.attrs[key], rest.pop(0))
    return Op(kind, name, tuple(args), _ordered(kind, attrs), note)


def _numbers(number: int, key: str, rest: list[str]) -> tuple[int, ...]:
    """A list of integers in square brackets, taken off the front of the words."""
    if rest[0] != "[" or "]" not in rest:
        raise ParseError(f"line {number}: {key!r} must be a list like [1, 4], got {rest[0]!r}.")
    close = rest.index("]")
    words, rest[: close + 1] = rest[1:close], []
    try:
        return tuple(int(w) for w in words if w != ",")
    except ValueError:
        raise ParseError(f"line {number}: {key!r} must be a list of integers, got {' '.join(words)}.") from None


def _value(number: int, key: str, spec: AttrDef, word: str) -> Attr:
    try:
        if spec.type is bool:
            return {"true": True, "false": False}[word]
        return spec.type(word)
    except (KeyError, ValueError):
        raise ParseError(f"line {number}: {key!r} must be a {spec.type.__name__}, got {word!r}.") from None
