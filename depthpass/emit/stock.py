"""Source of stock classes, cut open where a program goes in."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from depthpass.errors import UnsupportedModelError

_DROPPED = ("auto_docstring", "add_start_docstrings", "replace_return_docstrings", "add_code_sample_docstrings")
"""Decorators that only write documentation, and want to know which file of transformers they stand in."""


def source_of(function: Callable[..., Any]) -> tuple[str, ast.FunctionDef]:
    """Source of a stock method, without its docstring and what decorates that, and its tree.

    Raises:
        UnsupportedModelError: it has no source (defined at a prompt, compiled).
    """
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        (tree,) = ast.parse(text).body
    except (OSError, TypeError, ValueError, SyntaxError) as error:
        raise UnsupportedModelError(f"emit: expected {getattr(function, '__qualname__', function)} with Python source, got none "
                                    f"({error}). Define the class in a file.") from None
    if not isinstance(tree, ast.FunctionDef):
        raise UnsupportedModelError(f"emit: expected a method, got {type(tree).__name__} for {function!r}.")
    gone: set[int] = set()
    for decorator in tree.decorator_list:
        if any(name in ast.unparse(decorator) for name in _DROPPED):
            gone |= set(range(decorator.lineno, (decorator.end_lineno or decorator.lineno) + 1))
    first = tree.body[0]
    if len(tree.body) > 1 and isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        gone |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = [line for number, line in enumerate(text.splitlines(), 1) if number not in gone]
    text = "\n".join(lines)
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.FunctionDef)
    return text, tree


@dataclass
class Forward:
    """A decoder's stock forward, in three pieces around its loop over blocks.

    Attributes:
        head: its lines up to the first statement; def and decorators.
        before, after: the statements before and after the loop.
        visit: the loop's body as the body of ``visit(place, hidden_states)``.
        cache: name of the cache argument.
        norm: expression of the final norm.
        arguments: names of all arguments.
    """

    head: list[str]
    before: list[str]
    visit: list[str]
    after: list[str]
    cache: str
    norm: str
    arguments: tuple[str, ...]

    @property
    def hands_on(self) -> bool:
        """Whether blocks get the arguments that the decoder does not know."""
        return any("**kwargs" in line for line in self.visit)


def forward_of(cls: type, layers: str) -> Forward:
    """The stock forward of a decoder class.

    Args:
        layers: attribute that holds the blocks.

    Raises:
        UnsupportedModelError: it has no one loop over the blocks, or one whose results the code after it reads by name.
    """
    text, tree = source_of(cls.forward)
    lines = text.splitlines()
    loops = [(i, s) for i, s in enumerate(tree.body) if isinstance(s, ast.For) and f"self.{layers}" in ast.unparse(s.iter)]
    if len(loops) != 1:
        raise _unfit(cls, f"one loop over self.{layers}", f"{len(loops)} of them")
    at, loop = loops[0]
    target = loop.target
    if isinstance(target, ast.Tuple):
        place, block = (ast.unparse(e) for e in target.elts)
    else:
        place, block = "place", ast.unparse(target)
    body = "\n".join(lines[loop.body[0].lineno - 1 : loop.end_lineno])
    written = {n.id for s in loop.body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    read = {n.id for s in tree.body[at + 1 :] for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if "hidden_states" not in written or (written & read) - {"hidden_states"}:
        raise _unfit(cls, "a loop that changes hidden_states alone", f"{', '.join(sorted(written))}")
    arguments = [a.arg for a in (*tree.args.args, *tree.args.kwonlyargs)]
    cache = next((n for n in ("cache", "past_key_values") if n in arguments), "")
    if not cache or tree.args.kwarg is None or tree.args.kwarg.arg != "kwargs":
        raise _unfit(cls, "arguments with a cache and **kwargs", ", ".join(arguments))
    norm = re.search(r"hidden_states = (self\.\w+)\(hidden_states\)", "\n".join(lines[loop.end_lineno :]))
    if norm is None:
        raise _unfit(cls, "a final norm after the loop", "none")
    # A block that is left out keeps the stream.
    body = textwrap.dedent(re.sub(r"(?m)^(\s*)continue$", r"\1return hidden_states", body))
    visit = [f"{block} = self.{layers}[{place}]", *body.splitlines(), "return hidden_states"]
    first = tree.body[0].lineno - 1
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return Forward(
        lines[:first], _dedented(lines[first : loop.lineno - 1]), [f"place={place}", *visit],
        _dedented(lines[loop.end_lineno :]), cache, norm[1],
        tuple(arguments),
    )


def _dedented(lines: Iterable[str]) -> list[str]:
    return [line.removeprefix("    ") for line in lines]


def attention_forward(cls: type) -> str:
    """The stock forward of an attention class, with its attention function called through ``attend``.

    Raises:
        UnsupportedModelError: it calls no attention function of transformers' interface, or not once.
    """
    text, tree = source_of(cls.forward)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "attention_interface"]
    if len(calls) != 1 or not any(k.arg is None for k in calls[0].keywords):
        raise _unfit(cls, "one call of attention_interface with **kwargs", f"{len(calls)}")
    return re.sub(r"= attention_interface\(", "= attend(\n            attention_interface,", text, count=1)


def hands_on(cls: type, path: str) -> bool:
    """Whether blocks give their attention the arguments they do not know: what a visit reads is said in such."""
    return any(k.arg is None for k in _call_of(cls, path).keywords)


def handing_on(cls: type, path: str, text: str) -> str:
    """The forward of a class of blocks, which gives its attention the arguments that it does not know."""
    call = ast.unparse(_call_of(cls, path).func)
    at = text.index(call + "(") + len(call) + 1
    depth, end = 1, at
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    given = text[at : end - 1].rstrip()
    last = given.splitlines()[-1]
    more = "\n" + last[: len(last) - len(last.lstrip())] + "**kwargs," if given.endswith(",") else ", **kwargs"
    return text[:at] + given + more + text[at + len(given) :]


def _call_of(cls: type, path: str) -> ast.Call:
    """Where a class of blocks calls its attention.

    Raises:
        UnsupportedModelError: naming the class, whose forward is of another form.
    """
    _, tree = source_of(cls.forward)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{path}"]
    if len(calls) != 1 or tree.args.kwarg is None or tree.args.kwarg.arg != "kwargs":
        raise _unfit(cls, f"a forward with **kwargs and one call of self.{path}", f"{len(calls)} of them")
    return calls[0]


def makes_by_config(cls: type) -> bool:
    """Whether an outer class lets AutoModel make its decoder."""
    return "AutoModel.from_config(" in source_of(cls.__init__)[0]


def renamed_init(cls: type, inner: type, name: str, path: str) -> str:
    """The stock ``__init__`` of an outer class, which makes the emitted decoder instead of the stock one.

    Args:
        inner: the stock class of its attribute ``path``, which the class ``name`` replaces.

    Raises:
        UnsupportedModelError: it does not make its decoder by name.
    """
    text, _ = source_of(cls.__init__)
    pattern = re.compile(rf"self\.{path} = {inner.__name__}\(")
    if len(pattern.findall(text)) != 1:
        raise _unfit(cls, f"an __init__ that makes self.{path} = {inner.__name__}(config)", "another one")
    text = pattern.sub(f"self.{path} = {name}(", text)
    # What the stock class does first is what the class above it does.
    return re.sub(r"super\(\)\.__init__\(", f"super({cls.__name__}, self).__init__(", text)


def logits_of(cls: type, path: str) -> list[str]:
    """Statements of an outer class's forward that make ``logits`` of its decoder's ``outputs``.

    Raises:
        UnsupportedModelError: there are none such.
    """
    text, tree = source_of(cls.forward)
    lines, statements, inside = text.splitlines(), [], False
    for s in tree.body:
        line = "\n".join(lines[s.lineno - 1 : s.end_lineno])
        if inside and ("loss" in line or "labels" in line or isinstance(s, ast.Return)):
            break
        if inside:
            statements += line.splitlines()
        if re.search(rf"= self\.{path}(\.\w+)*\(", line):
            inside = True
            name = ast.unparse(s.targets[0] if isinstance(s, ast.Assign) else s.target)  # type: ignore[attr-defined]
            if name != "outputs":
                statements.append(f"    {name} = outputs")
    if not any(re.match(r"\s*logits = ", line) for line in statements):
        raise _unfit(cls, "a forward that makes logits of its decoder's outputs", "none")
    return _dedented(statements)


def imports_for(text: str, modules: Iterable[str], defined: Iterable[str]) -> list[str]:
    """Import lines for the names that a file reads and does not define.

    Args:
        modules: names of modules whose globals may be imported, the first that has one is taken.
        defined: names that stand in the file already.

    Raises:
        UnsupportedModelError: a name is in none of them.
    """
    tree, unknown = ast.parse(text), {}
    known = set(defined) | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in known:
            unknown[node.id] = None
    lines: dict[str, list[str]] = {}
    for name in sorted(unknown):
        home = next((m for m in modules if hasattr(sys.modules[m], name)), None)
        if home is None:
            raise UnsupportedModelError(f"emit: expected names that the stock module knows, got {name!r}.")
        value = getattr(sys.modules[home], name)
        if inspect.ismodule(value):
            lines.setdefault(f"import {value.__name__} as {name}", [])
        else:
            lines.setdefault(f"from {home} import ", []).append(name)
    return [_import(head, names) for head, names in sorted(lines.items())]


def _import(head: str, names: list[str]) -> str:
    """An import statement, over several lines where one would be long."""
    if not names or len(head) + len(", ".join(names)) < 115:
        return head + ", ".join(names)
    return head + "(\n" + "".join(f"    {name},\n" for name in names) + ")"


def _unfit(cls: type, wanted: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"emit: expected a {cls.__name__} with {wanted}, got {got}. This architecture's code cannot "
                                 "be cut open for this program; a plain stack of visits can still be emitted.")
