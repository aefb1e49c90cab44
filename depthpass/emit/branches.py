"""The stock forward of a block with its two residual branches scaled (what attention and MLP read, and what they add), or
run one by one.

The source is read as the captured graph is elsewhere: a chain of sums from the block's input to its result. What is added to the
stream is a branch; the one that the attention made is the attention branch, the other the MLP branch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from torch import nn

from depthpass.emit.stock import source_of
from depthpass.errors import UnsupportedModelError

STREAM, READ, ATTENTION, MLP, BOTH = "stream", "read", "attention", "mlp", "both"
"""What a value is: the residual stream, something of it that no linear map has read, a branch's, the sum of both branches."""

HALVES = "Passes between a block's attention and its network"
FACTORS = ("read_attention", "add_attention", "read_mlp", "add_mlp")
_SAME = ("view", "reshape", "to", "contiguous", "clone", "flatten", "type_as", "float")
"""Methods that hand a value on."""


def modulated_forward(blocks: Sequence[nn.Module], attention: str) -> str:
    """The forward of the blocks' class, which takes its four ``factors`` besides.

    Args:
        blocks: blocks of one class, whose settings may lead through different branches of its code.
        attention: their attribute that holds the attention.

    Raises:
        UnsupportedModelError: the code is no chain of two residual branches.
    """
    cls = type(blocks[0])
    text, tree = source_of(cls.forward)
    if tree.args.kwarg is None or tree.args.kwarg.arg != "kwargs":
        raise _unfit(cls, "a forward with **kwargs")
    edits: dict[tuple[int, int, int, int], str] = {}
    for block in blocks:
        own = _Reader(block, attention, tree).edits()
        if missing := set(FACTORS) - set(own.values()):
            raise _unfit(cls, "two residual branches, each added to the stream", f"no place for {', '.join(sorted(missing))}")
        edits |= own
    lines = text.splitlines()
    for (first, start, last, end), factor in sorted(edits.items(), reverse=True):
        # Columns of the tree count bytes; what is inserted behind comes first, so earlier columns stay as they are.
        lines[last - 1] = _at(lines[last - 1], end, ")")
        lines[first - 1] = _at(lines[first - 1], start, f"{factor} * (")
    text = "\n".join(_bare(line) for line in lines)
    at = tree.body[0].lineno - 1
    lines = text.splitlines()
    return "\n".join([*lines[:at], f'    {", ".join(FACTORS)} = kwargs.pop("factors")', *lines[at:]])


def halved_forward(blocks: Sequence[nn.Module], attention: str) -> str:
    """The forward of the blocks' class, which runs one half if ``part`` names it: the stream with what the attention adds, or
    the stream that it is given with what the network adds, which reads ``read`` in its place.

    Raises:
        UnsupportedModelError: the code is no attention branch that is added before the network's branch reads the stream.
    """
    cls = type(blocks[0])
    text, tree = source_of(cls.forward)
    if tree.args.kwarg is None or tree.args.kwarg.arg != "kwargs":
        raise _unfit(cls, "a forward with **kwargs", what=HALVES)
    if beside(blocks[0], attention):
        return _beside_forward(blocks, attention)
    cuts = {_Reader(block, attention, tree).halves() for block in blocks}
    if len(cuts) != 1:
        raise _unfit(cls, "blocks that are cut in one place", what=HALVES)
    (at, reads), stream = cuts.pop(), tree.args.args[1].arg
    first, second = tree.body[: at + 1], tree.body[at + 1 :]
    stored = {n.id for s in first for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if left := (stored - {stream}) & _free(second)[0]:
        raise _unfit(cls, f"a second half that reads {stream} alone", ", ".join(sorted(left)), HALVES)
    # Some blocks lay the tokens of all rows in one line.
    flat = any(f".{name}(" in ast.unparse(s) for s in second for name in ("reshape", "view", "flatten"))
    given, lines = f"read.reshape({stream}.shape)" if flat else "read", text.splitlines()
    for number, start, end in sorted(reads, reverse=True):
        raw = lines[number - 1].encode()
        lines[number - 1] = (raw[:start] + given.encode() + raw[end:]).decode()
    top, cut, tail = tree.body[0].lineno - 1, first[-1].end_lineno, lines[first[-1].end_lineno :]
    return "\n".join([
        *lines[:top], '    part, read = kwargs.pop("part", None), kwargs.pop("read", None)', '    if part != "ffn":',
        *("    " + line if line.strip() else line for line in lines[top:cut]), '    if part == "attention":',
        f"        return {stream}", f"    read = {stream} if read is None else read", *tail])


def beside(block: nn.Module, attention: str) -> bool:
    """Whether a block's branches run beside each other: both read what the block is given."""
    cls = type(block)
    reader = _Reader(block, attention, source_of(cls.forward)[1])
    reader.edits()
    return reader.meets


def _beside_forward(blocks: Sequence[nn.Module], attention: str) -> str:
    """As :func:`halved_forward`, of branches beside each other: the one that does not run adds zeros, and sums take the stream
    that is given in the place of what the network reads.

    Raises:
        UnsupportedModelError: a branch is more than one call.
    """
    cls = type(blocks[0])
    text, tree = source_of(cls.forward)
    lines, stream, edits = text.splitlines(), tree.args.args[1].arg, {}
    for block in blocks:
        reader = _Reader(block, attention, tree)
        reader.edits()
        if not reader.meets or {k: len(v) for k, v in reader.calls.items()} != {ATTENTION: 1, MLP: 1} or not reader.taken:
            raise _unfit(cls, "two branches of one call each, added to the stream", what=HALVES)
        nothing = f"torch.zeros_like({stream})"
        for kind, part, zeros in ((ATTENTION, "ffn", f"({nothing}, None)"), (MLP, "attention", nothing)):
            edits[next(iter(reader.calls[kind]))] = (f'({zeros} if part == "{part}" else ', ")")
        edits |= dict.fromkeys(reader.taken, ("given", None))
    for (first, start, last, end), (before, behind) in sorted(edits.items(), reverse=True):
        if behind is None:
            raw = lines[first - 1].encode()
            lines[first - 1] = (raw[:start] + before.encode() + raw[end:]).decode()
        else:
            lines[last - 1] = _at(lines[last - 1], end, behind)
            lines[first - 1] = _at(lines[first - 1], start, before)
    top = tree.body[0].lineno - 1
    return "\n".join([
        *lines[:top], '    part, read = kwargs.pop("part", None), kwargs.pop("read", None)',
        f"    given, {stream} = {stream}, {stream} if read is None else read", *lines[top:]])


def _free(statements: Sequence[ast.stmt]) -> tuple[set[str], set[str]]:
    """Names that statements read before they write them, and those that they write in any case."""
    free: set[str] = set()
    written: set[str] = set()
    for s in statements:
        if isinstance(s, ast.If):
            (one, theirs), (other, others) = _free(s.body), _free(s.orelse)
            read, names = one | other | {n.id for n in ast.walk(s.test) if isinstance(n, ast.Name)}, theirs & others
        else:
            every = [n for n in ast.walk(s) if isinstance(n, ast.Name)]
            read, names = ({n.id for n in every if isinstance(n.ctx, kind)} for kind in (ast.Load, ast.Store))
        free, written = free | (read - written), written | names
    return free, written


def _at(line: str, column: int, text: str) -> str:
    raw = line.encode()
    return (raw[:column] + text.encode() + raw[column:]).decode()


def _bare(line: str) -> str:
    """Without parentheses around a name."""
    return re.sub(r"\* \((\w+)\)", r"* \1", line)


class _Reader:
    """One walk through the code with a block's own settings."""

    def __init__(self, block: nn.Module, attention: str, tree: ast.FunctionDef):
        self.block, self.attention, self.tree = block, attention, tree
        self.kinds: dict[str, str | None] = {}
        self.factors: dict[tuple[int, int, int, int], str] = {}
        self.reads: set[tuple[int, int, int]] = set()
        self.calls: dict[str, set[tuple[int, int, int, int]]] = {ATTENTION: set(), MLP: set()}
        self.taken: set[tuple[int, int, int, int]] = set()
        self.meets = False
        self.result: str | None = None

    def edits(self) -> dict[tuple[int, int, int, int], str]:
        """Expressions to multiply, by where they stand, with the names of their factors."""
        self.kinds[self.tree.args.args[1].arg] = STREAM
        self._statements(self.tree.body)
        if self.result != STREAM:
            raise _unfit(type(self.block), "a result that is the stream with its branches added", self.result or "none")
        return self.factors

    def halves(self) -> tuple[int, frozenset[tuple[int, int, int]]]:
        """The statement that adds the attention to the stream, and where the code behind it reads the stream as a network does:
        line, first and last column."""
        stream = self.tree.args.args[1].arg
        self.kinds[stream], at = STREAM, None
        for i, s in enumerate(self.tree.body):
            self._statements([s])
            done = set(self.factors.values())
            if at is None and "add_attention" in done:
                whole = "read_mlp" not in done and self.kinds.get(stream) == STREAM
                if not whole:
                    raise _unfit(type(self.block), "branches in statements of their own", "both in one", HALVES)
                at, self.reads = i, set()
        if at is None or self.result != STREAM or not self.reads:
            raise _unfit(type(self.block), "two residual branches, each added to the stream", what=HALVES)
        return at, frozenset(self.reads)

    def _statements(self, body: Sequence[ast.stmt]) -> bool:
        """Whether the forward goes on behind them."""
        for s in body:
            match s:
                case ast.Assign(targets=[target]):
                    self._assign(target, self._kind(s.value))
                case ast.AnnAssign(value=ast.expr() as value):
                    self._assign(s.target, self._kind(value))
                case ast.If():
                    if not self._statements(s.body if self._holds(s.test) else s.orelse):
                        return False
                case ast.Return():
                    value = s.value.elts[0] if isinstance(s.value, ast.Tuple) else s.value
                    self.result = None if value is None else self._kind(value)
                    return False
                case ast.Expr(value=ast.Constant()) | ast.Pass():
                    pass
                case _:
                    raise _unfit(type(self.block), "assignments and conditions", ast.unparse(s))
        return True

    def _assign(self, target: ast.expr, kind: str | None) -> None:
        # Of several results the first is the hidden one.
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for i, name in enumerate(names):
            if isinstance(name, ast.Name):
                self.kinds[name.id] = kind if i == 0 else None

    def _holds(self, test: ast.expr) -> bool:
        """A condition on the block's settings, or on arguments that a decoder leaves out."""
        known = {"self": self.block} | {a.arg: None for a in self.tree.args.args[2:]}
        try:
            return bool(eval(compile(ast.Expression(test), "block", "eval"), {}, known))
        except Exception:
            raise _unfit(type(self.block), "conditions on its own settings", ast.unparse(test)) from None

    def _kind(self, e: ast.expr) -> str | None:
        match e:
            case ast.Name():
                return self.kinds.get(e.id)
            case ast.BinOp(op=ast.Add()):
                return self._sum(e)
            case ast.BinOp():
                return self._of(e, [self._kind(e.left), self._kind(e.right)])
            case ast.Call():
                return self._call(e)
            case ast.IfExp():
                return self._kind(e.body if self._holds(e.test) else e.orelse)
            case ast.Subscript() | ast.Attribute():
                kind = self._kind(e.value)
                return kind if isinstance(e, ast.Subscript) and kind in (ATTENTION, MLP) else None
        return None

    def _sum(self, e: ast.BinOp) -> str | None:
        left, right = self._kind(e.left), self._kind(e.right)
        if {left, right} == {ATTENTION, MLP}:
            self._scale(e.left, f"add_{left}")
            self._scale(e.right, f"add_{right}")
            return BOTH
        for kind, branch, value, own in ((left, right, e.right, e.left), (right, left, e.left, e.right)):
            if kind == STREAM and branch in (ATTENTION, MLP, BOTH):
                if isinstance(own, ast.Name):
                    self.taken.add(_place(own))
                if branch != BOTH:
                    self._scale(value, f"add_{branch}")
                return STREAM
        return self._of(e, [left, right])

    def _of(self, e: ast.expr, kinds: Sequence[str | None]) -> str | None:
        """What an elementwise function of values is."""
        present = {k for k in kinds if k is not None}
        if len(present) > 1:
            raise _unfit(type(self.block), "branches that meet in sums only", ast.unparse(e))
        kind = next(iter(present), None)
        return READ if kind == STREAM else kind

    def _call(self, e: ast.Call) -> str | None:
        values = [*e.args, *(k.value for k in e.keywords)]
        f = e.func
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "self":
            module = getattr(self.block, f.attr, None)
            if isinstance(module, nn.Module):
                return self._module(f.attr, module, e, values)
        if isinstance(f, ast.Attribute) and (kind := self._kind(f.value)) is not None:
            for value in values:
                self._kind(value)
            return kind if f.attr in _SAME else None if f.attr == "size" else self._of(e, [kind])
        return self._of(e, [self._kind(v) for v in values])

    def _module(self, name: str, module: nn.Module, e: ast.Call, values: Sequence[ast.expr]) -> str | None:
        kinds = [self._kind(v) for v in values]
        self.reads |= {(v.lineno, v.col_offset, v.end_col_offset or 0) for v, k in zip(values, kinds)
                       if k == STREAM and isinstance(v, ast.Name)}
        attends = name == self.attention
        if not attends and not any(p.dim() > 1 for p in module.parameters()):
            return self._of(e, kinds)
        for value, kind in zip(values, kinds):
            if kind in (STREAM, READ):
                self._scale(value, "read_attention" if attends else "read_mlp")
        if attends or STREAM in kinds or READ in kinds:
            self.calls[ATTENTION if attends else MLP].add(_place(e))
            self.meets |= not attends and "add_attention" not in self.factors.values()
        if attends:
            return ATTENTION
        branches = {k for k in kinds if k in (ATTENTION, MLP)}
        return ATTENTION if ATTENTION in branches else MLP

    def _scale(self, e: ast.expr, factor: str) -> None:
        self.factors[_place(e)] = factor


def _place(e: ast.expr) -> tuple[int, int, int, int]:
    """Where an expression stands: its first line and column, its last ones."""
    assert e.end_lineno is not None and e.end_col_offset is not None
    return e.lineno, e.col_offset, e.end_lineno, e.end_col_offset


def _unfit(cls: type, wanted: str, got: str = "another one", what: str = "Timesteps and scales") -> UnsupportedModelError:
    return UnsupportedModelError(f"emit: expected a {cls.__name__} with {wanted}, got {got}. {what} cannot be "
                                 "written into this architecture's code; leave them out, or serve the model with depthpass.")
