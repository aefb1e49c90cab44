"""The transformed model: the stock class with a mixin whose forward runs the program."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from depthpass.analysis.routing import reads_future
from depthpass.capture import Capture, capture
from depthpass.capture.quiet import quiet, without_autocast
from depthpass.errors import InputError, UnsupportedModelError
from depthpass.hf.auto import mark, marked_class, unmark
from depthpass.hf.cache import NAMES, STOCK_NAME, DepthCache, take_cache
from depthpass.hf.captured import remember
from depthpass.hf.doors import DECODER, Frame, Left, bind, call_names, inside, replaced, untraced
from depthpass.hf.generation import check_generation, check_implementation
from depthpass.hf.growth import check_growth, without_cache
from depthpass.hf.hidden_states import EMBEDDED, take_states, with_states
from depthpass.hf.host import StockHost, compiled_stock, depth_module, logits_of
from depthpass.hf.inputs import (
    Call,
    as_index,
    check_outer,
    check_rows,
    normalise,
    shapes_only,
    warn_frozen,
    without_crossing,
)
from depthpass.hf.latents import advance, as_embeddings, feeds
from depthpass.hf.live import Live, warn_parts
from depthpass.hf.pads import insert, pad_op
from depthpass.hf.placement import (
    check_devices,
    full_state,
    gather_new,
    gathered_state,
    home,
)
from depthpass.hf.runtime import Runtime
from depthpass.hf.stock import stock_decoder
from depthpass.hf.watch import Watch, watch
from depthpass.ir.program import Program
from depthpass.lowered.record import LoweredCall, Recorder
from depthpass.schedule.regions import Schedule

PROMPT = "_depth_prompt"
"""Rows and columns of the prompt, and how many of them count as ids, on the config of one call of ``generate``."""

_NOT_FOR_HEADS = ("labels", "use_cache", "return_dict", "prompt_length", "num_items_in_batch")
"""Arguments of a call that say nothing to its head, or ask it for more than logits."""

# torch.export is not safe to run in two threads at once, whatever the models.
_CAPTURING = threading.Lock()

class _Prologue:
    """Answers the prologue's and the norm's questions about columns."""

    def __init__(self, start: int, count: int):
        self.start, self.count = start, count

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.start, self.start + self.count, device=device)


class DepthModel:
    """Mixin of every transformed model. The class in front of it stays: ``isinstance(model, LlamaForCausalLM)`` holds.

    Attributes:
        depth: module with the new parameters.
        depth_program: the :class:`~depthpass.ir.program.Program` that runs.
        depth_schedule: how it is scheduled.
        depth_spec: the passes, as a plain mapping.

    The outputs of a program with taps have one more attribute, ``outputs.taps``: the streams ``[batch, tokens, width]``
    (or logits) by name. With the fixed-point schedule they have ``outputs.sweeps``: how each serial region was run. The
    output class stays the stock one, and ``return_dict=False`` leaves both out.
    """

    _depth: Runtime

    def __init__(self, config, *args, **kwargs):
        """Build the model from its config, as ``from_pretrained`` does; :func:`depthpass.transform` does not come here.

        Raises:
            SpecError: the config has no spec.
        """
        from depthpass.hf.save import spec_of
        from depthpass.hf.transform import install, prepare

        spec, chunk, home, policy = spec_of(config, type(self).__name__)
        if config.architectures:
            config.architectures = [type(self).__name__]
        # Heads make their base model from the config, through an Auto class: that is stock.
        unmark(config)
        super().__init__(config, *args, **kwargs)
        mark(self.config)
        install(self, prepare(self, spec if home is None else home, chunk))
        if home is not None:
            self._depth.plans.default = self._depth.plans.of(self, spec, chunk)
        self._depth.fixed_point = policy

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As :func:`depthpass.from_pretrained`, for this class; what the Auto classes call."""
        from depthpass.hf.save import load_as

        return load_as(cls, pretrained_model_name_or_path, args, kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        from depthpass.hf.save import own_depth_class

        return super(DepthModel, own_depth_class(cls, config.to_dict(), cls.__name__))._from_config(config, **kwargs)

    @property
    def depth_program(self) -> Program:
        return self._depth.program

    @property
    def depth_schedule(self) -> Schedule:
        return self._depth.plan.schedule

    @property
    def depth_ran(self) -> tuple[tuple[Program, int], ...]:
        """The programs that the last call ran, with their numbers of rows: counts that are drawn or follow n show here.

        Each sequence of packed rows counts as a row.
        """
        rows: Counter[int] = Counter()
        programs = {id(p): p for p, _, _ in self._depth.ran}
        for program, count, _ in self._depth.ran:
            rows[id(program)] += count
        return tuple((programs[key], count) for key, count in rows.items())

    @property
    def depth_lowered(self) -> LoweredCall:
        """What the last call ran: prints as the lowered program, with the level of each region and why it was no higher one.

        Its entries are the serial regions that ran in a token loop; a decoded token that ran as one compiled graph, and regions
        that were swept, leave none.
        """
        return self._depth.lowered

    @property
    def depth_drafted(self):
        """What the last ``generate(..., draft=...)`` did: acceptance, visits per token, time ratio; None before the first.

        A :class:`~depthpass.hf.speculation.DraftReport`.
        """
        return self._depth.drafted

    @property
    def depth_spec(self) -> dict:
        return self._depth.plan.spec

    def _call_stock(self, args: tuple, kwargs: dict[str, object], prompt_length):
        """A call of the outer class: stock code around its decoder, where the program runs."""
        if DECODER in kwargs:
            return self._run_program(self.get_submodule(self._depth.decoder), kwargs[DECODER], None)
        stock = type(self)._stock_class
        arguments, given = bind(stock, self, args, kwargs)
        if prompt_length is not None:
            arguments["prompt_length"] = prompt_length
        if self._depth.decoder == "":
            return self._run_program(self, arguments, None)
        check_outer(self, call_names(stock), arguments)
        name, _ = take_cache(dict(arguments))
        decoder = self.get_submodule(self._depth.decoder)
        # On the compiled rungs the loss is worth compiling, too: it is several passes over the vocabulary.
        compiled = self._depth.lowering in ("inductor", "cudagraph") and arguments.get("labels") is not None
        forward = compiled_stock(stock) if compiled else stock.forward
        if (labels := without_crossing(self, call_names(stock), arguments)) is not None:
            args, given = replaced(stock, args, given, "labels", labels)
        with inside(Frame(decoder, self, arguments, name)) as frame:
            output = forward(self, *args, **given)
        if labels is not None:
            frame.arguments = {**arguments, "labels": labels}
        if frame.left is None:
            raise UnsupportedModelError(
                f"the forward of {type(self).__name__} does not call {self._depth.decoder} ({type(decoder).__name__}), which "
                "runs the program, so what it returns is not the transformed model's. Call the decoder in it."
            )
        return self._finish(output, frame)

    def _finish(self, output, frame: Frame):
        """Add what the stock code does not know to its outputs: training losses, taps and sweeps."""
        left, loss = frame.left, 0.0
        if left.losses is not None and self.training and frame.arguments.get("labels") is not None:
            loss = _share(frame.arguments) * left.losses[1]
        if isinstance(output, tuple):
            return (output[0] + loss, *output[1:]) if isinstance(loss, Tensor) else output
        if isinstance(loss, Tensor) and getattr(output, "loss", None) is not None:
            output["loss"] = output.loss + loss.to(output.loss)
        keep = frame.arguments.get("logits_to_keep")
        return self._decorate(output, left, as_index(keep), frame.arguments)

    def _decorate(self, output, left: Left, keep: slice | Tensor | None = None, arguments: Mapping[str, object] | None = None):
        """Hand out what a run left as plain attributes: not entries, so tuples and gathers of outputs stay as they are.

        Args:
            keep: the tokens whose streams are handed out; None = all.
            arguments: of the outer call; heads of taps get them, too.
        """
        if left.losses is not None:
            output.losses, output.losses_total = left.losses
        if left.heads:
            output.taps = {
                n: logits_of(self._head(left.captured, x, arguments), f"tap {n!r}", "head=False") if left.heads[n] else
                x if keep is None else x[:, keep]
                for n, x in left.streams.items() if n in left.heads
            }
        if left.sweeps is not None:
            output.sweeps = left.sweeps
        return output

    def _head(self, captured: Capture, normed: Tensor, arguments: Mapping[str, object] | None = None):
        """What the stock code makes of a stream that the final norm has passed, as if the decoder had returned it.

        Args:
            normed: ``[batch, k, width]``.
            arguments: of the call that it is a part of; None = of any tokens.
        """
        leaves = range(captured.out_spec.num_leaves)
        place = pytree.tree_unflatten(list(leaves), captured.out_spec)["last_hidden_state"]
        output = pytree.tree_unflatten([normed if i == place else None for i in leaves], captured.out_spec)
        decoder = self.get_submodule(self._depth.decoder)
        if decoder is self:
            return output
        stock = type(self)._stock_class
        if arguments is None:
            given: dict[str, object] = {"input_ids": torch.zeros(normed.shape[:2], dtype=torch.long, device=normed.device)}
        else:
            given = {n: x for n, x in arguments.items() if n not in (*_NOT_FOR_HEADS, *NAMES)}
        with inside(Frame(decoder, self, answer=output)):
            return stock.forward(self, **given)

    def _run_program(self, decoder: nn.Module, arguments: dict[str, object], frame: Frame | None):
        """Run the program up to the final norm.

        Args:
            decoder: the module that is called; the model itself where it has no head.
            arguments: by the names of the decoder's stock forward.
            frame: of the outer call that it is a part of; None = the decoder was called by itself.
        """
        from depthpass_lowering.state import State

        from depthpass.hf.step import advance_token

        runtime = self._depth
        names = call_names(type(decoder)._stock_class)
        call = normalise(self, decoder, names, arguments, frame)
        if feeds(runtime.program):
            call = as_embeddings(self, call)
        warn_frozen(self)
        groups = runtime.plans.running(self, call)
        plan = groups[0][0]
        if call.cache is not None:
            call.cache.check_program(plan.meaning, call.cache_name)
        if len(groups) > 1:
            call = without_cache(call, arguments, [p.program for p, _ in groups])
        if call.hidden_states:
            groups = [(with_states(self, groups), None)]
        captured = self._captured(call, names)
        state = call.cache.opened(plan.meaning) if call.cache is not None else State()
        sweeping = None if runtime.fixed_point is None else runtime.fixed_point.start()
        gathered: list = []
        lowered = Recorder()
        if call.packing is not None:
            parts, streams, runs = self._advance_packed(groups, captured, call, sweeping, gathered, lowered)
        else:
            with shapes_only(call.tensors["attention_mask"]):
                parts, streams, state = (
                    (None if call.hidden_states else advance_token(self, plan, captured, call, state, lowered))
                    or self._advance(groups, captured, call, state, sweeping, gathered, lowered)
                )
            rows, columns = call.tensors["attention_mask"].shape
            runs = [(p.program, rows if some is None else len(some), columns) for p, some in groups]
        runtime.lowered, runtime.ran = lowered.done(), tuple(runs)
        output = pytree.tree_unflatten(parts, captured.out_spec)
        if call.hidden_states:
            output["hidden_states"] = take_states(streams, output.last_hidden_state)
        if call.use_cache:
            cache = call.cache if call.cache is not None else DepthCache(self)
            cache.keep(plan.meaning, state)
            for name in NAMES:
                if name in getattr(output, "__dataclass_fields__", {}):
                    output[name] = cache
        left = Left(captured, streams, plan.heads, gathered[0] if gathered else None, sweeping and tuple(sweeping.solves))
        if frame is not None:
            frame.left = left
        else:
            self._decorate(output, left)
            if decoder is not self:
                _warn_losses(self, left)
        return output if call.return_dict else output.to_tuple()

    def _advance(self, groups, captured: Capture, call: Call, state, sweeping, gathered: list, lowered: Recorder):
        """Advance a state by the tokens of a call.

        Args:
            groups: plans with the rows that run them; one plan for all rows, or no cache.
            sweeping: the fixed-point schedule of this call, or None.
            gathered: gets the training losses by name, and their sum with coefficients.
            lowered: gets how each serial region is run.

        Returns:
            the decoder's flat outputs; all streams by name; the new state.
        """
        plan = groups[0][0]
        host = StockHost(self, captured, ())
        gather_new(depth_module(self))
        if host.dispatched:
            check_devices(host.layers, plan.program)
        # What runs has the program's pads in it; the caller sees what it gave.
        inner, layout = insert(self, plan.program, call)
        host.losses = {} if plan.program.losses and (self.training or call.labels is not None) else None
        if len(groups) > 1:
            hidden, sides = self._embedded(host, inner)
            streams = self._by_rows(groups, host, hidden, sides, inner.valid, sweeping, lowered)
        else:
            hidden, streams, state = self._run(plan, host, inner, layout, state, call.use_cache, sweeping, lowered)
        if call.hidden_states:
            streams[EMBEDDED] = hidden
        warn_parts(self, host.counts)
        if layout is not None:
            streams, state.pads = {name: layout.trim(x) for name, x in streams.items()}, layout.pads
        elif state.pads is not None:
            state.pads = nn.functional.pad(state.pads, (0, hidden.shape[1]))
        if host.losses is not None:
            gathered.append((host.losses, host.extra_loss))
        return list(host.part(captured.head, call.tensors, streams["output"])), streams, state

    def _run(self, plan, host: StockHost, call: Call, layout, state, keep: bool, sweeping, lowered: Recorder):
        """Advance a state by a call with its pads in place; returns the embedded tokens, all streams, the new state."""
        from depthpass_lowering.executors.eager import run
        from depthpass_lowering.executors.losses import Pool

        captured, runtime = host.captured, self._depth

        def piece(part: Call, state, keep: bool):
            hidden, sides = self._embedded(host, part)
            ran = run(
                plan.schedule, host, hidden, sides, captured.side_axes, state, part.valid, keep, plan.types, runtime.lowering,
                sweeping, lowered,
            )
            if ran.losses is not None:
                host.losses, host.extra_loss = dict(ran.losses.by_name), ran.losses.total
            return hidden, ran.streams, ran.state

        if layout is None or not feeds(plan.program):
            return piece(call, state, keep)
        pool, host.pool = host.pool, Pool() if host.pool is None else host.pool
        found = advance(call, layout, state, keep, piece)
        if pool is None:
            host.pool.move()
            if host.pool.sums:
                host.losses, host.extra_loss = host.pool.values()
        if captured.head.extras:
            self._embedded(host, call)
        return found

    def _embedded(self, host: StockHost, call: Call) -> tuple[Tensor, list[Tensor]]:
        """The embedded tokens of a call and the tables beside them; the host gets what it needs to run blocks."""
        runtime, captured = self._depth, host.captured
        tokens = call.tensors["input_ids" if "input_ids" in call.tensors else "inputs_embeds"]
        # Stock rotary embeddings switch autocast off. A capture is made without autocast and cannot tell.
        with without_autocast(tokens.device):
            visit = _Prologue(call.past, tokens.shape[1])
            if host.hooked.live:
                layers = runtime.layers[len(runtime.decoder) + 1 if runtime.decoder else 0 :]
                host.live = Live(host.decoder, layers, captured, host.hooked, call.tensors, call.past, call.cache)
                # The embedding has run as a module; its weights may be nowhere now.
                hidden, sides = host.live.hidden, host.part(captured.tables, call.tensors, visit=visit)
            else:
                hidden, *sides = host.part(captured.prologue, call.tensors, visit=visit)
        host.extras = sides
        return hidden, sides

    def _advance_packed(self, groups, captured: Capture, call: Call, sweeping, gathered: list, lowered: Recorder):
        """The outputs of packed rows: every sequence in them is run as a row.

        Args:
            groups: plans with the sequences that run them, by number.

        Returns:
            the decoder's flat outputs; all streams by name; the programs that ran with their rows and columns.
        """
        from depthpass_lowering.executors.losses import Pool
        from depthpass_lowering.state import State

        whole, packing, pool = StockHost(self, captured, ()), call.packing, Pool()
        gather_new(depth_module(self))
        if whole.dispatched:
            for plan, _ in groups:
                check_devices(whole.layers, plan.program)
        asked = any(plan.program.losses for plan, _ in groups) and (self.training or call.labels is not None)
        whole.losses = {} if asked else None
        # Modules with hooks (FSDP's among them) are called as often for packed rows as for others.
        together = bool(whole.hooked.live) or any(
            whole.refuses_schedule(i) is not None for i in {o["index"] for plan, _ in groups for o in plan.program.visits}
        )
        parts, runs = [], []
        for plan, segments in groups:
            # Chunks of token loops are compiled once per number of rows.
            compiled = self._depth.lowering in ("inductor", "cudagraph") and bool(plan.schedule.serial_regions)
            for rows in packing.rows(segments, together, powers=compiled):
                host = StockHost(self, captured, ())
                host.counts, host.losses, host.pool = whole.counts, whole.losses, pool
                inner, layout = insert(self, plan.program, call.of(rows))
                hidden, streams, _ = self._run(plan, host, inner, layout, State(), False, sweeping, lowered)
                if call.hidden_states:
                    streams[EMBEDDED] = hidden
                if layout is not None:
                    streams = {name: layout.trim(x) for name, x in streams.items()}
                parts.append((rows, streams))
                runs.append((plan.program, *rows.source.shape))
        pool.move()
        if pool.sums:
            whole.losses, whole.extra_loss = pool.values()
        warn_parts(self, whole.counts)
        if whole.losses is not None:
            gathered.append((whole.losses, whole.extra_loss))
        streams = {name: packing.join([(rows, found[name]) for rows, found in parts]) for name in parts[0][1]}
        if captured.head.extras:
            self._embedded(whole, call)
        return list(whole.part(captured.head, call.tensors, streams["output"])), streams, runs

    def _by_rows(
        self, groups, whole: StockHost, hidden: Tensor, sides: list[Tensor], valid: Tensor | None, sweeping, lowered
    ):
        """The streams of rows with different loop counts: every group of rows runs its own program, then all are joined."""
        from depthpass_lowering.executors.eager import run
        from depthpass_lowering.executors.losses import Pool
        from depthpass_lowering.state import State

        parts, pool, captured = [], Pool(), whole.captured
        for plan, rows in groups:
            group = StockHost(self, captured, ())
            group.live, group.counts = whole.live and whole.live.of_rows(rows), whole.counts
            mine = [
                s.index_select(0, rows) if axis and s.shape[0] == len(hidden) else s
                for s, axis in zip(sides, captured.side_axes)
            ]
            group.extras, group.losses, group.pool = mine, whole.losses, pool
            streams = run(
                plan.schedule, group, hidden.index_select(0, rows), mine, captured.side_axes,
                State(), None if valid is None else valid.index_select(0, rows), False, plan.types, self._depth.lowering,
                sweeping, lowered,
            ).streams
            parts.append(streams)
        pool.move()
        if pool.sums:
            whole.losses, whole.extra_loss = pool.values()
        back = torch.argsort(torch.cat([rows for _, rows in groups]))
        return {name: torch.cat([p[name] for p in parts]).index_select(0, back) for name in parts[0]}

    def _captured(self, call: Call, names: tuple[str, ...]) -> Capture:
        """The capture for this call signature, made on first use."""
        key = (
            tuple((n, t.dtype, t.dim(), t.device) for n, t in sorted(call.tensors.items())),
            "use_cache" in names, self._watched().key,
        )
        runtime = self._depth
        found = runtime.captures.get(key)
        if found is None:
            with _CAPTURING:
                found = runtime.captures.get(key)
                if found is None:
                    found = self._capture(call.tensors, names)
                    remember(runtime, key, found)
        return found

    def _watched(self) -> Watch:
        return watch(self._depth.watches, self, self._depth.decoder, self._depth.layers)

    def _capture(self, tensors: dict[str, Tensor], names: tuple[str, ...]) -> Capture:
        moved = home(self) if self._depth.watches[-1].dispatched else None
        with quiet(moved or self.device):
            stock = stock_decoder(self, moved)
            static = {"use_cache": False} if "use_cache" in names else {}
            # Heads without the argument ask the config. The copy's config is its own.
            for config in (stock.config, stock.config.get_text_config(decoder=True)):
                config.use_cache = config.output_hidden_states = False
            found = capture(stock, tensors, static)
        if len(found.blocks) != self._depth.program.blocks:
            raise UnsupportedModelError(
                f"the program is for {self._depth.program.blocks} blocks, the model now has {len(found.blocks)}."
            )
        return found

    # What transformers calls.

    def init_continuous_batching(self, *args, **kwargs):
        """As the stock method, for programs whose layers need their own keys of earlier tokens alone.

        It runs the program as stock layers on the same weights (:func:`depthpass.emit.twin.twin`).

        Raises:
            InputError: the program has delays or shared keys, or cannot be written as stock layers.
        """
        return self._paged("init_continuous_batching")(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """As the stock method; see :meth:`init_continuous_batching`."""
        return self._paged("generate_batch")(*args, **kwargs)

    def continuous_batching_context_manager(self, *args, **kwargs):
        """As the stock method; see :meth:`init_continuous_batching`."""
        return self._paged("continuous_batching_context_manager")(*args, **kwargs)

    def _paged(self, method: str):
        from depthpass.emit.twin import twin

        who = "continuous batching (generate_batch, cache_implementation='paged', transformers serve)"
        return getattr(twin(self, who), method)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode=None, *args, **kwargs):
        given = model_kwargs.get(STOCK_NAME)
        if isinstance(mask := model_kwargs.get("attention_mask"), Tensor) and mask.dim() == 2:
            check_rows(mask)
        if generation_config.use_cache is not False and (future := reads_future(self.depth_program)):
            raise InputError(
                f"generate: {future} chooses tokens with scores of later tokens, so a token's logits change when more "
                "follow and decoding is not what was trained. Use mode='threshold' for generation; with use_cache=False "
                "the rule is applied afresh to the row so far at every step."
            )
        if generation_config.use_cache is not False and "length" in self._depth.plan.varies:
            prompt, given_ids = getattr(generation_config, PROMPT, (None, None))
            known = given_ids is not None and generation_config.max_length is not None
            check_growth(self, model_kwargs.get("attention_mask"), prompt,
                         generation_config.max_length - given_ids if known else None)
        if generation_config.use_cache is not False and self.depth_program.reads_calls:
            warnings.warn(
                "generate: with kv='last' or 'mod:k' a decoded token reads other keys of earlier tokens than it does when "
                "the whole row is scored in one call, so what is generated is not what was trained, and depends on how "
                "the tokens are split into calls. kv='own' and kv='first' have one meaning.", UserWarning, stacklevel=3,
            )
        policy = self._depth.fixed_point
        if policy is not None and not policy.exact and generation_config.use_cache is not False:
            warnings.warn(f"generate with {policy}: {policy.approximate}. With use_cache=False every step scores the row so "
                          "far as training does.", UserWarning, stacklevel=3)
        if generation_config.is_assistant or "ASSISTED" in str(generation_mode).upper():
            _check_assisted(self.depth_program)
        if pad_op(self.depth_program) is not None:
            self._say_prompt(generation_config, model_kwargs)
        if given is None and generation_config.use_cache is not False:
            check_implementation(generation_config.cache_implementation)
            # An assistant's tokens are taken back when the model it drafts for disagrees.
            model_kwargs[STOCK_NAME] = DepthCache(self, record=bool(generation_config.is_assistant))
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _prepare_generated_length(self, generation_config, *args, inputs_tensor=None, input_ids_length=None, **kwargs):
        # The config is this call's own copy; what prepares the cache is told neither the prompt nor a mask of ones.
        if isinstance(inputs_tensor, Tensor):
            setattr(generation_config, PROMPT, (tuple(inputs_tensor.shape[:2]), input_ids_length))
        return super()._prepare_generated_length(
            generation_config, *args, inputs_tensor=inputs_tensor, input_ids_length=input_ids_length, **kwargs
        )

    def _say_prompt(self, generation_config, model_kwargs) -> None:
        """Where the pads go: after the prompt, which is the first call of a cache, and must be said without one."""
        if generation_config.prefill_chunk_size is not None:
            raise InputError("prefill_chunk_size: the workspace pads follow the prompt, which has to come in one call. Leave "
                             "it unset.")
        placed = pad_op(self.depth_program)
        if placed["at"] is not None or placed["behind"] is not None:
            return
        if generation_config.use_cache is False and "prompt_length" not in model_kwargs:
            mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
            if mask is None and positions is None:
                raise InputError("generate: expected an attention_mask or prompt_length, got neither; without a cache every "
                                 "step must be told where the prompt ends.")
            # generate drops a mask of ones.
            model_kwargs["prompt_length"] = positions.shape[-1] if mask is None else mask.sum(-1)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, *args, **kwargs):
        if enable:
            gradient_checkpointing_func = not_reentrant(gradient_checkpointing_func)
        return super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, stock: bool = False, **kwargs):
        """As the stock method: safetensors with stock keys plus those under ``depth.``, and the spec in the config.

        Weights that are spread over processes (FSDP2) are gathered, so every process has to call this; the first one writes.
        A save that fails leaves the files of an earlier one as they were. ``dp.from_pretrained`` loads the files, and so do
        the Auto classes of transformers where depthpass is imported; where it is not, they stop with an error that says so.

        Args:
            stock: let stock code load the files as well, as the *base* model without the program. It then names a weight
                that says so among those it does not use, and ``dp.from_pretrained`` loads the whole model all the same.

        Raises:
            InputError: ``safe_serialization=False`` was asked for (only safetensors are written), or
                ``save_directory`` is a file.
        """
        from depthpass.hf.files import replacing
        from depthpass.hf.save import configured, with_notice

        if kwargs.get("safe_serialization") is False:
            raise InputError("safe_serialization: expected True, got False; a transformed model is saved as safetensors "
                             "only. Leave the argument out.")
        state, args = (args[0], (None, *args[1:])) if args else (kwargs.pop("state_dict", None), args)
        if state is None and not kwargs.get("distributed_checkpoint"):
            state, is_main_process = self._whole_state(is_main_process)
        if stock:
            state = with_notice(self.state_dict() if state is None else state)
        if state is not None:
            args, kwargs = ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "state_dict": state})
        with configured(self, stock):
            if not is_main_process or kwargs.get("distributed_checkpoint"):
                return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            with replacing(save_directory) as folder:
                if args[1] if len(args) > 1 else kwargs.get("push_to_hub"):
                    kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
                super().save_pretrained(folder, is_main_process, *args, **kwargs)

    def _whole_state(self, is_main_process: bool) -> tuple[Mapping[str, Tensor] | None, bool]:
        """The weights to save where the model does not have them all at hand, and whether this process writes them."""
        state = gathered_state(self)
        if state is not None:
            return state, is_main_process and torch.distributed.get_rank() == 0
        return (full_state(self) if any(p.is_meta for p in self.parameters()) else None), is_main_process

    def __reduce_ex__(self, protocol):
        made = super().__reduce_ex__(protocol)
        return (_rebuild, (type(self)._stock_class,), *made[2:])


def _share(arguments: Mapping[str, Any]) -> Tensor | float:
    """Factor of a loss that is a mean over this call, beside a loss that is summed over ``num_items_in_batch`` labels.

    Trainer splits a batch into several calls and divides each one's summed loss by the labels of all of them.
    """
    if arguments.get("num_items_in_batch") is None:
        return 1.0
    return (arguments["labels"][:, 1:] != -100).sum() / arguments["num_items_in_batch"]


def _warn_losses(model: nn.Module, left: Left) -> None:
    """Losses of routers and exits are added to the loss of the outer class: a decoder has none to add them to."""
    if left.losses is not None and left.losses[0] and model.training and torch.is_grad_enabled():
        warnings.warn(
            f"the decoder of a transformed {type(model).__name__} was called by itself, so its losses "
            f"({', '.join(left.losses[0])}) are in no loss. Add outputs.losses_total to yours: their sum with coefficients.",
            UserWarning, stacklevel=3,
        )


def _check_assisted(program: Program) -> None:
    """Assisted decoding scores several tokens in a call and takes the rejected ones back."""
    reasons = {
        "its routed visits keep some tokens only, so tokens cannot be taken back": any(o.kind == "route" for o in program),
        "its KV policy makes a token's logits depend on how tokens are split into calls": program.reads_calls,
        "its workspace pads follow the prompt, which assisted decoding sends together with the first draft":
            pad_op(program) is not None,
    }
    if reason := next((r for r, found in reasons.items() if found), None):
        raise InputError(f"generate: assisted decoding is not possible with this program: {reason}. Leave the assistant (or "
                         "prompt_lookup_num_tokens) out.")


def not_reentrant(function):
    """A checkpoint function that keeps the gradients of the recurrence.

    Raises:
        InputError: ``use_reentrant=True`` was asked for.
    """
    chosen = getattr(function, "keywords", {}).get("use_reentrant")
    if chosen:
        raise InputError(
            "gradient_checkpointing_kwargs: use_reentrant=True would lose the gradient through keys, values and delays, "
            "which leave a block besides its output. Use {'use_reentrant': False}."
        )
    return functools.partial(function, use_reentrant=False) if chosen is None else function


def _rebuild(stock_class: type) -> nn.Module:
    cls = depth_class(stock_class)
    return cls.__new__(cls)


@functools.cache
def depth_class(stock: type) -> type:
    """The class of transformed models of a stock class; it keeps the stock class's name."""

    @functools.wraps(stock.forward)
    def forward(self, *args, prompt_length=None, **kwargs):
        return self._call_stock(args, kwargs, prompt_length)

    # Dynamo must not trace into captures and caches: a user's torch.compile runs the program as it is.
    body = {
        "config_class": None if stock.config_class is None else marked_class(stock.config_class),
        "forward": untraced(forward), "_stock_forward": stock.forward, "_stock_class": stock,
        "__doc__": stock.__doc__, "__module__": stock.__module__, "__qualname__": stock.__qualname__,
    }
    body["forward"].__signature__ = inspect.signature(stock.forward)
    if hasattr(stock, "generate"):

        @functools.wraps(stock.generate)
        def generate(self, *args, draft=None, draft_tokens="auto", loops=None, **kwargs):
            _, cache = take_cache(kwargs)
            check_generation(self, args, kwargs)
            if loops is not None:
                from depthpass.hf.row_depth import rows_generate

                if draft is not None:
                    raise InputError("loops: expected no draft beside it, got one. Leave one of them out.")
                return rows_generate(self, stock.generate, args, kwargs, cache, loops)
            if draft is not None:
                from depthpass.hf.speculation import draft_generate

                return draft_generate(self, stock.generate, args, kwargs, cache, draft, draft_tokens)
            if draft_tokens != "auto":
                raise InputError(f"draft_tokens: expected draft beside it, got {draft_tokens!r} alone.")
            return stock.generate(self, *args, **kwargs, **({} if cache is None else {STOCK_NAME: cache}))

        body["generate"] = generate
    return type(stock.__name__, (DepthModel, stock), body)
