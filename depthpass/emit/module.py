"""The text of an emitted ``modeling_<name>.py``."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass

import transformers
from torch import nn

from depthpass.emit import parts, visits
from depthpass.emit.decoder import decoder_class
from depthpass.emit.outer import outer_class
from depthpass.emit.stock import imports_for
from depthpass.emit.subject import Subject
from depthpass.ir.program import Program


@dataclass
class Module:
    """An emitted module.

    Attributes:
        text: its source.
        config, outer, base: names of its classes: of the config, of the whole model and of what AutoModel makes.
        stateful: whether layers need more of earlier tokens than each its own keys.
        lost: names of the program's own training losses, which the code does not have.
    """

    text: str
    config: str
    outer: str
    base: str
    stateful: bool
    lost: tuple[str, ...] = ()


def module_of(
    model: nn.Module, program: Program, layers: str, decoder: str, stack: tuple[int, ...] | None, new: nn.Module, model_type: str,
    copies: bool = False,
) -> Module:
    """Write the module of a transformed model.

    Args:
        model: its stock model.
        layers, decoder: paths of the blocks and of the module that runs the program.
        stack: blocks of the visits where the program is a plain stack, which stock code runs as it is.
        new: the new parameters.
        model_type: of the emitted config.
        copies: give visits of one block weights of their own.
    """
    s = Subject.of(model, program, layers, decoder, stack, new, model_type, copies)
    config = type(s.model.config)
    pieces = [_constants(s), _config(s), decoder_class(s), *(outer_class(s, i) for i in s.around())]
    if s.cache:
        pieces.insert(1, _guard(s))
    outer = s.name(s.modules[-1])
    pieces.append(f"known_to_tools({outer})")
    s.used.add("known_to_tools")
    body = "\n\n\n".join(_library(s) + pieces) + "\n"
    homes = dict.fromkeys([*(type(m).__module__ for m in s.modules), config.__module__,
                           *(c.__module__ for m in s.modules for c in type(m).__mro__ if "transformers" in c.__module__)])
    imports = _imports(s)
    given = {a.asname or a.name for line in imports for n in ast.parse(line).body for a in n.names}  # type: ignore[attr-defined]
    more = imports_for(body, (*homes, "transformers.modeling_outputs", "transformers"), given)
    text = _docstring(s) + "\n\n" + "\n".join(_sorted(imports + more)) + "\n\n\n" + body
    return Module(text, s.config, outer, s.name(s.modules[min(_base(s), len(s.modules) - 1)]), s.stateful,
                  () if s.body is None else s.body.lost)


def _imports(s: Subject) -> list[str]:
    """Imports of what is not stock code."""
    imports = ["import sys", "import torch", "import transformers", "from torch import nn",
               "from types import ModuleType"]
    if len(s.used) > 1:
        imports += ["from typing import Any", "from torch import Tensor"]
    if "line_layer" in s.used:
        imports.append("from transformers.cache_utils import DynamicLayer, StaticLayer")
    if s.used & {"TimeEncoder", "noise"}:
        imports.append("import math")
    if "Again" in s.used:
        imports.append("import copy")
    if s.body is not None and s.body.chunk is not None:
        imports.append("from transformers.cache_utils import DynamicCache")
    if s.body is not None and (s.body.taps or s.body.predicts):
        imports.append("from functools import wraps")
    if s.cache:
        imports.append("from inspect import signature")
    return imports


def _base(s: Subject) -> int:
    """Place of the model without its head."""
    prefix = s.model.base_model_prefix
    return next((i for i, p in enumerate(s.paths) if p == prefix), 0)


def _docstring(s: Subject) -> str:
    text = "\n".join("    " + line for line in str(s.program).splitlines())
    return (f'"""{type(s.model).__name__}, rewired: {len(s.blocks)} visits of {len(set(s.blocks))} blocks.\n\n'
            f"Written by depthpass for transformers {transformers.__version__}; needs nothing of depthpass. Every visit is a "
            f"layer of its own with\nits own cache layer; visits of one block "
            f"{'have copies of' if s.copies else 'share'} its weights. The program:\n\n{text}\n\"\"\"")


def _constants(s: Subject) -> str:
    return (f"BLOCKS = {s.blocks}\n"
            '"""Block of the original model that each visit runs."""')


def _guard(s: Subject) -> str:
    """An error in place of silently lost keys: transformers 5.24 gave the cache another name."""
    stock = type(s.modules[0]).__name__
    written = f"this file is for transformers {transformers.__version__}, whose models call their cache {s.cache!r}"
    return (f'if "{s.cache}" not in signature({stock}.forward).parameters:\n'
            f'    raise ImportError("{written}; those of "\n'
            '                      f"{transformers.__version__} do not. Emit it again with the installed transformers.")')


def _config(s: Subject) -> str:
    return (f"class {s.config}({type(s.model.config).__name__}):\n"
            '    """As the original; num_hidden_layers and lists by layer count visits."""\n\n'
            f'    model_type = "{s.model_type}"')


def _library(s: Subject) -> list[str]:
    """The parts that are used, in the order of their files."""
    if not s.used:
        return []
    known = {n: x for home in (parts, visits) for n, x in vars(home).items() if getattr(x, "__module__", None) == home.__name__}
    todo = list(s.used)
    while todo:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(known[todo.pop()])))):
            if isinstance(node, ast.Name) and node.id not in s.used and node.id in known:
                s.used.add(node.id)
                todo.append(node.id)
    return [inspect.getsource(x).rstrip() for n, x in known.items() if n in s.used]


def _sorted(imports: list[str]) -> list[str]:
    """Imports in order: the standard library, torch, then transformers."""
    def rank(line: str) -> tuple[int, bool, str]:
        home = line.split()[1].split(".")[0]
        return {"torch": 1, "transformers": 2}.get(home, 0), line.startswith("from"), line

    return sorted(dict.fromkeys(imports), key=rank)
