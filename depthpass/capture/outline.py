"""Cut an exported graph into prologue, one graph per block, final norm and head, at the markers of the capture.

Only the hidden stream may flow from block to block; anything else is an error that names the value. Blocks whose
graphs are equal share one template.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import sympy
import torch
from torch import fx
from torch.export.graph_signature import InputKind

from depthpass.capture import calls
from depthpass.capture.legality import check_token_local
from depthpass.capture.model import Block, Capture, Part, Site, Template
from depthpass.capture.traced import Traced
from depthpass.errors import UnsupportedModelError

_OPS = torch.ops.depthpass
_ATTEND, _MASK, _EXPERTS = _OPS.attend.default, _OPS.mask.default, _OPS.experts.default
_ENTER, _LEAVE, _FINAL = _OPS.enter.default, _OPS.leave.default, _OPS.final.default
_ARANGES = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}


def outline(traced: Traced) -> Capture:
    """Outline a traced model.

    Raises:
        UnsupportedModelError: naming the block and the value or op that stands in the way.
    """
    return _Outliner(traced).run()


def _expr(value: object) -> sympy.Expr | None:
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sympy.Integer(value) if isinstance(value, int) and not isinstance(value, bool) else None


class _Outliner:
    """Working state of one outlining; lives for one call of :func:`outline`."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.layers, self.count = traced.layers, traced.count
        self.graph, self.kinds = traced.module.graph, traced.kinds
        self.region: dict[fx.Node, tuple[str, int]] = {}
        if traced.written:
            raise UnsupportedModelError(
                f"the forward pass writes buffers ({', '.join(traced.written)}); state must be an argument and a result."
            )

    def run(self) -> Capture:
        enters = {n.args[1]: n for n in self.graph.nodes if n.target is _ENTER}
        leaves = {n.args[1]: n for n in self.graph.nodes if n.target is _LEAVE}
        finals = [n for n in self.graph.nodes if n.target is _FINAL]
        if sorted(enters) != list(range(self.count)) or len(finals) != 1:
            raise UnsupportedModelError(
                f"expected every block of {self.layers} to run exactly once and one base model output; "
                f"blocks that ran: {sorted(enters)}, base model outputs: {len(finals)}."
            )
        hidden = enters[0].meta["val"]
        if hidden.dim() != 3:
            raise UnsupportedModelError(f"expected a hidden stream [batch, tokens, width], got {tuple(hidden.shape)}.")
        self.batch, self.tokens = _expr(hidden.shape[0]), _expr(hidden.shape[1])
        self._assign(finals[0])
        self._hoist_shared()
        for i in range(1, self.count):
            if enters[i].args[0] is not leaves[i - 1]:
                raise UnsupportedModelError(
                    f"between block {i - 1} and block {i} the model computes {enters[i].args[0].name!r}; only the hidden "
                    "stream may flow from block to block."
                )
        self.side_nodes: list[fx.Node] = []
        blocks, shared = [], {}
        for i in range(self.count):
            earlier = self.traced.repeats.get(i)
            blocks.append(self._block(i, enters[i], leaves[i], shared) if earlier is None else replace(blocks[earlier]))
        norm = self._part("norm", leaves[self.count - 1], [finals[0].args[0]])
        output = next(n for n in self.graph.nodes if n.op == "output")
        head = self._part("head", finals[0], list(output.args[0]), local=False)
        prologue = self._part(
            "prologue", None, [enters[0].args[0], *self.side_nodes], local=not self.traced.whole_rows
        )
        axes = tuple(self._token_axis(n) for n in self.side_nodes)
        return Capture(
            prologue, axes, tuple(blocks), norm, head, self.layers, hidden.shape[2], self.traced.out_spec
        )

    # Regions -------------------------------------------------------------------------------------------------

    def _stack_block(self, node: fx.Node) -> int | None:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            rest = path[len(self.layers) + 1 :] if path.startswith(self.layers + ".") else ""
            if rest.split(".")[0].isdigit():
                return int(rest.split(".")[0])
        return None

    def _assign(self, final: fx.Node) -> None:
        """Give every node a region; nodes of a block that do not depend on its hidden stream are *free* to move."""
        self.free: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.region[node] = ("input", -1)
                continue
            inputs = [self.region[a] for a in node.all_input_nodes if a not in self.free]
            inside = {i for kind, i in inputs if kind == "block"}
            after = {i for kind, i in inputs if kind == "after"}
            if node.target is _ENTER:
                self.region[node] = ("block", node.args[1])
            elif node.target is _LEAVE:
                self.region[node] = ("after", node.args[1])
            elif node is final or any(kind == "head" for kind, _ in inputs):
                self.region[node] = ("head", -1)
                self._no_block_values(node)
            elif inside:
                if len(inside) > 1 or after:
                    self._no_block_values(node, block=max(inside | after))
                self.region[node] = ("block", inside.pop())
            elif after:
                self.region[node] = ("after", max(after))
            elif node.op == "output":
                self.region[node] = ("head", -1)
            elif (i := self._stack_block(node)) is not None and not self._is_size(node):
                self.region[node] = ("block", i)
                self.free.add(node)
            else:
                self.region[node] = ("prologue", -1)
            if node.op == "output":
                self._no_block_values(node)

    def _hoist_shared(self) -> None:
        """Move side computations to where they are used: shared ones to the prologue, the head's own to the head."""
        last = ("after", self.count - 1)
        for node in reversed(self.graph.nodes):
            users = {self.region[u] for u in node.users if "assert" not in str(u.target)}
            own = users.pop() if len(users) == 1 else None
            if self.region[node][0] == "prologue" and own in (("head", -1), last) and not self._is_size(node):
                self.region[node] = own
            elif node in self.free and (users or own != self.region[node]):
                self.region[node] = ("prologue", -1)

    def _no_block_values(self, node: fx.Node, block: int | None = None) -> None:
        for a in node.all_input_nodes:
            if a not in self.free and self.region[a][0] == "block" and self.region[a][1] != block:
                where = "the output" if block is None else f"block {block}"
                raise UnsupportedModelError(
                    f"block {self.region[a][1]}: value {a.name!r} flows into {where}; only the hidden stream may leave "
                    "a block (router logits, attention weights or all hidden states were asked for?)."
                )

    def _is_size(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), torch.SymInt | int)

    def _token_axis(self, node: fx.Node) -> int | None:
        shape = node.meta["val"].shape
        axes = [d for d, s in enumerate(shape) if (e := _expr(s)) is not None and self.tokens in e.free_symbols]
        if not axes:
            return None
        if len(axes) > 1 or _expr(shape[axes[0]]) != self.tokens:
            raise UnsupportedModelError(
                f"side input {node.name!r} of shape {tuple(shape)} is not a per-token table (dense masks and biases "
                "over pairs of tokens are not supported)."
            )
        return axes[0]

    # Subgraphs -----------------------------------------------------------------------------------------------

    def _nodes(self, region: tuple[str, int], roots: list[fx.Node]) -> list[fx.Node]:
        """Nodes of a region (and sizes) that the roots need, in graph order."""
        need, stack = set(), [r for r in roots if isinstance(r, fx.Node)]
        while stack:
            n = stack.pop()
            if n in need or self.region[n] != region:
                continue
            need.add(n)
            stack += n.all_input_nodes
        return [n for n in self.graph.nodes if n in need]

    def _block(self, i: int, enter: fx.Node, leave: fx.Node, shared: dict) -> Block:
        prefix = f"{self.layers}.{i}."
        b = _Builder(self, f"block {i}")
        env, visit, hidden = b.env, b.visit, b.placeholder("hidden")
        env[enter] = hidden
        b.sizes_from(hidden)
        nodes = [n for n in self._nodes(("block", i), [leave.args[0]]) if n is not enter]
        check_token_local(nodes, self.batch, self.tokens, f"block {i}")
        sides, params, constants, sites = [], [], {}, []
        external = [a for n in nodes for a in n.all_input_nodes if a not in env and self.region[a] != ("block", i)]
        external += [a for a in (leave.args[0],) if self.region[a] != ("block", i)]
        for a in dict.fromkeys(external):
            if self._is_size(a) or a.target is _MASK or a.op == "get_attr":
                continue
            if a.op == "placeholder" and self.kinds[a.name][0] != InputKind.USER_INPUT:
                continue
            if self.region[a][0] not in ("prologue", "input"):
                raise UnsupportedModelError(
                    f"block {i} reads {a.name!r} of {' '.join(map(str, self.region[a]))}; only the hidden stream may "
                    "flow from block to block."
                )
            sides.append(a)
            env[a] = b.placeholder(f"side{len(sides) - 1}")
        for a in dict.fromkeys(external):
            if a.op == "placeholder" and a not in env:
                kind, target = self.kinds[a.name]
                name = target.removeprefix(prefix) if target.startswith(prefix) else "/" + target
                if kind == InputKind.CONSTANT_TENSOR:
                    name = f"constant{len(constants)}"
                    constants[name] = self.traced.constants[target]
                params.append(name)
                env[a] = b.placeholder("p_" + name.replace(".", "_").replace("/", "root_"))
        self._inline_sizes(external, b)
        for n in nodes:
            if n.target is _ATTEND:
                sites.append(self._site(n, i))
                q, k, v, _, sinks = (env.get(x) if isinstance(x, fx.Node) else x for x in n.args[:5])
                args = (visit, len(sites) - 1, q, k, v, sinks) if sinks is not None else (visit, len(sites) - 1, q, k, v)
                env[n] = b.call(calls.attend, args, {}, n)
            else:
                b.copy(n)
        gm = b.finish(env[leave.args[0]])
        index = tuple(self._side(s) for s in sides)
        metas = tuple((str(a.meta["val"].dtype), tuple(a.meta["val"].shape)) for a in dict.fromkeys(external)
                      if a.op == "placeholder" and isinstance(a.meta.get("val"), torch.Tensor)
                      and self.kinds[a.name][0] != InputKind.USER_INPUT)
        # get_attr submodules are told apart by name, so blocks that use them never share a template by accident.
        key = (gm.code, len(sides), tuple(params), tuple(sites), metas, b.attributes())
        template = shared.setdefault(key, Template(gm, len(sides), tuple(params), tuple(sites)))
        return Block(template, index, constants)

    def _part(self, name: str, entry: fx.Node | None, roots: list, local: bool = True) -> Part:
        b = _Builder(self, name)
        env = b.env
        if name == "prologue":
            region: tuple[str, int] = ("prologue", -1)
        elif name == "norm":
            region = ("after", self.count - 1)
        else:
            region = ("head", -1)
        if entry is not None:
            env[entry] = b.placeholder("hidden")
            b.sizes_from(env[entry])
        nodes = [n for n in self._nodes(region, roots) if n is not entry]
        if local:
            check_token_local(nodes, self.batch, self.tokens, name)
        external = [a for n in nodes for a in n.all_input_nodes if a not in env and self.region[a] != region]
        external += [r for r in roots if isinstance(r, fx.Node) and r not in env and self.region[r] != region]
        extras, inputs, params, constants = [], [], [], {}
        unique = list(dict.fromkeys(external))
        for a in unique:
            if name != "prologue" and self.region[a][0] == "prologue" and not self._is_size(a):
                extras.append(self._side(a))
                env[a] = b.placeholder(f"extra{len(extras) - 1}")
        for a in unique:
            if a.op == "placeholder" and self.kinds[a.name][0] == InputKind.USER_INPUT and not self._is_size(a):
                if not isinstance(a.meta.get("val"), torch.Tensor):
                    continue
                inputs.append(a.name)
                env[a] = b.placeholder("in_" + a.name)
        for a in unique:
            if a.op == "placeholder" and a not in env and self.kinds[a.name][0] != InputKind.USER_INPUT:
                kind, target = self.kinds[a.name]
                if kind == InputKind.CONSTANT_TENSOR:
                    target = f"constant{len(constants)}"
                    constants[target] = self.traced.constants[self.kinds[a.name][1]]
                params.append(target)
                env[a] = b.placeholder("p_" + target.replace(".", "_"))
        self._inline_sizes(unique, b)
        for n in nodes:
            b.copy(n, columns=local)
        result = tuple(env[r] if isinstance(r, fx.Node) else r for r in roots)
        gm = b.finish(result if name != "norm" else result[0])
        return Part(gm, tuple(inputs), tuple(params), tuple(extras), constants)

    def _side(self, node: fx.Node) -> int:
        if node not in self.side_nodes:
            self.side_nodes.append(node)
        return self.side_nodes.index(node)

    def _inline_sizes(self, external: list[fx.Node], b: _Builder) -> None:
        for a in dict.fromkeys(external):
            if self._is_size(a) and a not in b.env and b.hidden is not None:
                b.env[a] = b.size(_expr(a.meta["val"]), a)

    def _site(self, node: fx.Node, i: int) -> Site:
        q, k, v, mask, sinks, scale, softcap, dropout = node.args
        if mask.target is not _MASK:
            raise UnsupportedModelError(
                f"block {i}: the attention mask passes through {mask.name!r} ({mask.target}); masks that a layer edits "
                "are not supported."
            )
        path = [p for p, _ in (node.meta.get("nn_module_stack") or {}).values()][-1]
        qs, ks, vs = (x.meta["val"].shape for x in (q, k, v))
        if _expr(qs[2]) != self.tokens or _expr(ks[2]) != self.tokens:
            raise UnsupportedModelError(
                f"block {i}: expected attention over the tokens of the row, got queries {tuple(qs)} and keys {tuple(ks)}."
            )
        window, chunk = mask.args[1], mask.args[2]
        return Site(
            path.removeprefix(f"{self.layers}.{i}").removeprefix("."), scale, softcap or None, dropout,
            window if window > 0 else None, chunk if chunk > 0 else None, sinks is not None,
            int(qs[1]), int(ks[1]), int(ks[3]), int(vs[3]),
        )


class _Builder:
    """Builds one subgraph with its own placeholders; node names come from targets, so equal graphs print equal."""

    def __init__(self, owner: _Outliner, where: str):
        self.owner, self.where = owner, where
        self.graph = fx.Graph()
        self.env: dict[fx.Node, object] = {}
        self.visit = self.placeholder("visit")
        self.hidden: fx.Node | None = None
        self._sizes: dict[sympy.Expr, object] = {}
        self._last_placeholder: fx.Node = self.visit

    def placeholder(self, name: str) -> fx.Node:
        if not self.graph.nodes or not hasattr(self, "_last_placeholder"):
            return self.graph.placeholder(name)
        # Sizes may already have been computed: placeholders still come first.
        with self.graph.inserting_after(self._last_placeholder):
            self._last_placeholder = self.graph.placeholder(name)
        return self._last_placeholder

    def sizes_from(self, hidden: fx.Node) -> None:
        self.hidden = hidden

    def size(self, expr: sympy.Expr, node: fx.Node) -> object:
        """Recompute a symbolic size from the hidden stream's own shape, so that any chunk can be run."""
        if expr in self._sizes:
            return self._sizes[expr]
        if expr.is_Integer:
            return int(expr)
        if expr == self.owner.batch or expr == self.owner.tokens:
            dim = 0 if expr == self.owner.batch else 1
            made = self.graph.call_function(torch.ops.aten.sym_size.int, (self.hidden, dim))
        elif expr.is_Mul or expr.is_Add:
            made, fn = None, operator.mul if expr.is_Mul else operator.add
            for term in expr.args:
                value = self.size(term, node)
                made = value if made is None else self.graph.call_function(fn, (made, value))
        else:
            raise UnsupportedModelError(f"{self.where}: size {node.name!r} = {expr} is not understood.")
        self._sizes[expr] = made
        return made

    def call(self, fn, args, kwargs, like: fx.Node) -> fx.Node:
        node = self.graph.call_function(fn, args, kwargs)
        node.meta = dict(like.meta)
        return node

    def copy(self, n: fx.Node, columns: bool = True) -> None:
        """Copy a node; drop checks, replace expert layers and token indices by calls on the visit."""
        env = self.env
        if n.target is torch.ops.aten._assert_tensor_metadata.default or n.target is _MASK:
            return
        if n.op == "call_function" and str(n.target).startswith(("aten._assert", "<built-in function _assert")):
            return
        val = n.meta.get("val")
        if isinstance(val, torch.SymInt) and self.hidden is not None:
            env[n] = self.size(_expr(val), n)
            return
        if n.target is _EXPERTS:
            path = [p for p, _ in (n.meta.get("nn_module_stack") or {}).values()][-1]
            path = path.split(".", self.owner.layers.count(".") + 2)[-1]
            args = fx.node.map_arg(n.args, lambda a: env[a])
            env[n] = self.call(calls.submodule, (self.visit, path, *args), {}, n)
            return
        if columns and n.target in _ARANGES and _expr(val.shape[0]) == self.owner.tokens:
            env[n] = self._columns(n)
            return
        if n.op == "get_attr":
            env[n] = self.graph.get_attr(n.target)
            env[n].meta = dict(n.meta)
            return

        def get(a: fx.Node):
            if a not in env and a.op == "get_attr":
                env[a] = self.graph.get_attr(a.target)
                env[a].meta = dict(a.meta)
            return env[a]

        node = self.graph.create_node(n.op, n.target, fx.node.map_arg(n.args, get), fx.node.map_arg(n.kwargs, get))
        node.meta = dict(n.meta)
        env[n] = node

    def _columns(self, n: fx.Node) -> fx.Node:
        args = list(n.args)
        start = args[0] if n.target is not torch.ops.aten.arange.default else 0
        step = args[2] if len(args) > 2 else 1
        if start != 0 or step != 1:
            raise UnsupportedModelError(f"{self.where}: token indices {n.name!r} start at {start} with step {step}.")
        device = n.meta["val"].device
        made = self.call(calls.columns, (self.visit, device), {}, n)
        if (dtype := n.meta["val"].dtype) != torch.int64:
            made = self.call(torch.ops.aten.to.dtype, (made, dtype), {}, n)
        return made

    def attributes(self) -> tuple[str, ...]:
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "get_attr")

    def finish(self, result) -> fx.GraphModule:
        for source, node in self.env.items():
            if isinstance(node, fx.Node) and node.op == "placeholder":
                node.meta.setdefault("val", source.meta.get("val"))
        self.graph.output(result)
        self.graph.eliminate_dead_code()
        gm = fx.GraphModule(self.owner.traced.module, self.graph)
        gm.graph.lint()
        return gm
