"""``torch.compile(model, backend="depthpass", options={"spec": spec})``: run a depth program in place of the graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from depthpass.errors import InputError, LoweringError, SpecError, UnsupportedModelError, did_you_mean
from depthpass.passes.base import Pass
from depthpass.plan import Plan, compile_spec
from depthpass.spec import SpecLike, load_spec, spec_hash
from depthpass_lowering.backend.models import holds_no_model, model_of, scoring_parameters
from depthpass_lowering.backend.sizes import restart_with_symbolic_sizes

if TYPE_CHECKING:
    from depthpass.hf.calls.packing import Packing, Rows
    from depthpass_lowering.backend.graph_host import Columns, GraphHost

NAME = "depthpass"


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options={...})`` may say.

    Attributes:
        spec: what to run; may be left out when the model has a spec attached.
        inner: the compiler for the code between attention calls: the name of a ``torch.compile`` backend or a
            backend itself; ``eager`` runs it as it is.
        chunk: run serial regions in smaller chunks than the largest legal one (same numbers).
    """

    spec: SpecLike | None = None
    inner: str | Callable = "eager"
    chunk: int | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        """Check options before anything is compiled.

        Raises:
            SpecError: an unknown key, or an inner compiler that does not exist.
        """
        known = [f.name for f in fields(cls)]
        for key in given or ():
            if key not in known:
                raise SpecError(f"options: unknown key {key!r}.{did_you_mean(str(key), known)} Keys: {', '.join(known)}.")
        options = cls(**(given or {}))
        valid = {*torch._dynamo.list_backends(exclude_tags=()), "eager"} - {NAME}
        if isinstance(options.inner, str) and options.inner not in valid:
            usual = ["eager", "aot_eager", *torch._dynamo.list_backends()]
            raise SpecError(
                f"options.inner: expected the name of a torch.compile backend, got {options.inner!r}."
                f"{did_you_mean(options.inner, valid)} Backends: {', '.join(b for b in usual if b in valid)}."
            )
        if not isinstance(options.inner, str) and (not callable(options.inner) or options.inner is depthpass_backend):
            raise SpecError(f"options.inner: expected the name of a torch.compile backend or another backend, got "
                            f"{options.inner!r}.")
        return options


def depthpass_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Dynamo backend: recapture the graph of a decoder, rewrite its program by a spec, run that instead.

    Covers training and scoring of whole forward passes, with code around them (a loss). The new parameters are those
    that :func:`depthpass.attach` created on the model.

    Args:
        gm: Dynamo's graph.
        example_inputs: the arguments it is compiled for.
        options: see :class:`Options`.
        mode: refused; modes are inductor's.

    Raises:
        SpecError, PassError: the options or the spec cannot be honoured.
        UnsupportedModelError: the graph cannot be treated; says what and why. ``torch.compile`` shows these errors
            inside its ``BackendCompilerFailed``.
    """
    settings = Options.read(options)
    if mode not in (None, "default"):
        raise SpecError(f"mode: expected none, got {mode!r}; modes are inductor's. Leave it out.")
    from depthpass.capture.dynamo import capture_graph

    if holds_no_model(gm, example_inputs):
        inner: Any = torch._dynamo.lookup_backend(settings.inner) if isinstance(settings.inner, str) else settings.inner
        return inner(gm, example_inputs)
    model, owner = model_of(gm, example_inputs)
    depth, plan = planned(model, owner, settings, example_inputs)
    restart_with_symbolic_sizes(gm, example_inputs, model)
    try:
        captured = capture_graph(gm, example_inputs, model)
    except UnsupportedModelError as error:
        other = "" if "dp.transform" in str(error) else " dp.transform(model, spec) captures the module instead."
        raise UnsupportedModelError(f"{type(model).__name__}, compiled with backend 'depthpass': {error}{other}") from error
    return _Compiled(captured, plan, owner, depth, settings.inner)


class _Compiled:
    """What runs in place of the graph: same arguments, same flat results."""

    def __init__(self, captured, plan: Plan, owner: nn.Module, depth: nn.Module, inner):
        self.captured, self.plan, self.depth, self.inner = captured, plan, depth, inner
        self.owner, self.attached = weakref.ref(owner), getattr(owner, "depth", None)
        self.runners: dict[fx.GraphModule, Callable] = {}

    def __call__(self, *args):
        c = self.captured
        if getattr(self.owner(), "depth", None) is not self.attached:
            raise LoweringError(
                "the parameters attached to the model changed after it was compiled; expected model.depth to stay. Call "
                "torch.compiler.reset(), so that the next call compiles anew."
            )
        inputs = {name: args[i] for name, i in c.inputs.items()}
        parameters = {n: args[i] for n, i in c.parameters.items()}
        valid = self._validity(inputs)
        host = self._host(parameters)
        if (packing := self._packing(inputs)) is None:
            return host.part(c.capture.head, inputs, self._run(host, inputs, valid))
        parts = []
        for rows in packing.rows(None) if c.rows is None else packing.fixed_rows(c.rows):
            parts.append((rows, self._run(self._host(parameters), self._rows_of(inputs, rows, packing), rows.valid)))
        if c.capture.head.extras:
            _, *host.extras = host.part(c.capture.prologue, inputs, visit=self._columns(inputs))
        return host.part(c.capture.head, inputs, packing.join(parts))

    def _host(self, parameters: Mapping[str, Tensor]) -> GraphHost:
        from depthpass.hf.modules.context import in_force
        from depthpass_lowering.backend.graph_host import GraphHost

        # Token loops: by hand, with their chunks compiled, or op by op where another compiler runs the blocks.
        return GraphHost(
            self.captured.capture, parameters, in_force(self.depth), None if self.inner == "eager" else self._runner,
            scheduled=self.inner in ("eager", "inductor"),
        )

    def _columns(self, inputs: Mapping[str, Tensor]) -> Columns:
        from depthpass_lowering.backend.graph_host import Columns

        name, dim = self.captured.tokens
        return Columns(inputs[name].shape[dim])

    def _run(self, host: GraphHost, inputs: Mapping[str, Tensor], valid: Tensor | None) -> Tensor:
        """The program's stream of rows that are one sequence each."""
        from depthpass_lowering.executors.eager import run
        from depthpass_lowering.executors.levels import AUTO_INDUCTOR
        from depthpass_lowering.state.slots import State

        c = self.captured.capture
        hidden, *side_inputs = host.part(c.prologue, inputs, visit=self._columns(inputs))
        host.extras = side_inputs
        result = run(
            self.plan.schedule, host, hidden, side_inputs, c.side_axes, State(), valid, keep=False, types=self.plan.types,
            lowering=AUTO_INDUCTOR if self.inner == "inductor" else "auto",
        )
        return result.streams["output"]

    def _packing(self, inputs: Mapping[str, Tensor]) -> Packing | None:
        """Where sequences start inside the rows: as the graph's own masks have it."""
        c = self.captured
        if c.positions is None or not bool((inputs[c.positions].diff(dim=-1) != 1).any()):
            return None
        from depthpass.hf.calls.packing import find_packing

        positions = inputs[c.positions]
        count = positions.shape[-1]
        batch = max(t.shape[0] for t in inputs.values() if t.dim() > 1 and t.shape[1] == count)
        return find_packing({}, positions.expand(batch, -1), None, False, (batch, count), positions.device)

    def _rows_of(self, inputs: Mapping[str, Tensor], rows: Rows, packing: Packing) -> dict[str, Tensor]:
        """What the prologue reads, for some segments as rows.

        Raises:
            InputError: an input runs over the tokens in a way that cannot be cut into sequences.
        """
        c, (batch, count) = self.captured, packing.starts.shape
        cut = {}
        for name in dict.fromkeys((*c.capture.prologue.inputs, c.tokens[0])):
            x = inputs[name]
            if x.dim() > 1 and x.shape[1] == count and x.shape[0] in (1, batch):
                cut[name] = rows.take(x.expand(batch, *x.shape[1:]))
            elif count in x.shape:
                raise InputError(f"{c.labels[name]}: expected shape {(batch, count)} in a call with packed rows ("
                                 f"{c.labels[c.positions]} restarts), got {tuple(x.shape)}. Put one sequence in each row.")
            else:
                cut[name] = x
        return cut

    def _runner(self, gm: fx.GraphModule) -> Callable:
        if gm not in self.runners:
            from depthpass_lowering.products.segments import Segmented, compile_segment

            self.runners[gm] = Segmented(gm, lambda piece: compile_segment(piece, self.inner))
        return self.runners[gm]

    def _validity(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which tokens are real, ``[batch, tokens]``; None when all are."""
        c = self.captured
        if c.valid is None:
            return None
        valid = inputs[c.valid].bool()
        if bool(valid.all()):
            return None
        if empty := (~valid.any(-1)).nonzero().flatten().tolist():
            raise InputError(f"{c.labels[c.valid]}: row {empty[0]} is padding only; every row needs at least one real token.")
        return valid


def planned(model: nn.Module, owner: Any, settings: Options, arguments: Sequence[Any]) -> tuple[nn.Module, Plan]:
    """The new parameters and what is run with them."""
    from depthpass.hf.attach import attached_spec, check_attachable, check_fixed
    from depthpass.hf.calls.inputs import warn_frozen
    from depthpass.hf.modules.context import context_of
    from depthpass_lowering.supported import check_program

    attached = attached_spec(owner)
    if settings.spec is None and attached is None:
        raise SpecError(
            "options: expected a 'spec', got none. Write torch.compile(model, backend='depthpass', options={'spec': "
            "dp.TurboConn(group=4)}), or dp.attach(model, spec) first."
        )
    wanted: Any = attached if settings.spec is None else settings.spec
    passes: tuple[Pass, ...] = load_spec(wanted)
    if attached is not None and spec_hash(attached) != spec_hash(passes):
        raise SpecError(
            "options.spec: expected the spec that is attached to the model, got another one. Leave 'spec' out, or del "
            "model.depth and attach the new one."
        )
    check_fixed(passes)
    plan = compile_spec(passes, context_of(model), chunk=settings.chunk)
    program = plan.program
    check_program(program)
    if any(o.kind == "pad" for o in program):
        raise SpecError("the pass pad inserts tokens between prompt and answer, which a compiled graph of a fixed call cannot. "
                        "Use dp.transform(model, spec).")
    if program.taps:
        raise SpecError(
            f"the spec hands out {', '.join(t['name'] for t in program.taps)} besides the model's own outputs, which a "
            "compiled graph cannot return. Use dp.transform(model, spec)."
        )
    check_attachable(program)
    if attached is not None:
        warn_frozen(owner)
        return owner.depth, plan
    return scoring_parameters(model, spec_hash(passes), program, arguments), plan
