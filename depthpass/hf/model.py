"""The transformed model: the stock class with a mixin whose forward runs the program."""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from depthpass.capture import Capture, capture
from depthpass.capture.quiet import quiet
from depthpass.errors import InputError, UnsupportedModelError
from depthpass.hf.caches.cache import STOCK_NAME, DepthCache, take_cache
from depthpass.hf.calls import ahead
from depthpass.hf.calls.doors import DECODER, DepthDecoder, Frame, bind, call_names, inside, mixed, rebuilt, replaced
from depthpass.hf.calls.head_input import bare
from depthpass.hf.calls.host import compiled_stock
from depthpass.hf.calls.inputs import Call
from depthpass.hf.calls.outer import check_outer, without_crossing
from depthpass.hf.calls.outputs import finish
from depthpass.hf.calls.running import run_program
from depthpass.hf.captured import remember
from depthpass.hf.checkpoints.adapters import new_state
from depthpass.hf.checkpoints.files import replacing
from depthpass.hf.checkpoints.loading import check_safetensors, class_to_load, load, settings_of
from depthpass.hf.checkpoints.marks import mark, marked_class, unmark
from depthpass.hf.checkpoints.save import configured, spec_of, with_notice
from depthpass.hf.decoding.generation import PROMPT, check_decoding, check_generation
from depthpass.hf.modules.checkpointing import not_reentrant
from depthpass.hf.modules.placement import full_state, gathered_state, home
from depthpass.hf.modules.watch import Watch, watch
from depthpass.hf.prepare import install, prepare
from depthpass.hf.runtime import Runtime
from depthpass.hf.shown import Shown, model_card
from depthpass.hf.stock import stock_decoder
from depthpass.ir.program import Program
from depthpass.log import working
from depthpass.lowered.record import LoweredCall
from depthpass.schedule.regions import Schedule

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from depthpass.hf.modules.parameters import DepthParameters

    class _Stock(PreTrainedModel):
        """What a mixin of a stock class may call; ``GenerationMixin`` types its ``self`` as no model is."""

        depth: DepthParameters

        def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
            """As the stock model's, with a DepthCache."""

        def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...

        def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Stock = object

# torch.export is not safe to run in two threads at once, whatever the models.
_CAPTURING = threading.Lock()


class DepthModel(Shown, _Stock):
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
    _stock_class: ClassVar[Any]

    def __init__(self, config, *args, **kwargs):
        """Build the model from its config, as ``from_pretrained`` does; :func:`depthpass.transform` does not come here.

        Raises:
            SpecError: the config has no spec.
        """
        spec, chunk, made_for, policy = spec_of(config, type(self).__name__)
        if config.architectures:
            config.architectures = [type(self).__name__]
        # Heads make their base model from the config, through an Auto class: that is stock.
        unmark(config)
        super().__init__(config, *args, **kwargs)
        mark(self.config, depth_class)
        install(self, prepare(self, spec if made_for is None else made_for, chunk))
        if made_for is not None:
            self._depth.plans.default = self._depth.plans.of(self, spec, chunk)
        self._depth.fixed_point = policy

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As :func:`depthpass.from_pretrained`, for this class; what the Auto classes call.

        A model of somebody's own class is loaded as that class, not as the class of transformers that it extends.
        """
        check_safetensors(kwargs)
        settings = settings_of(pretrained_model_name_or_path, kwargs)
        chosen = depth_class(class_to_load(cls._stock_class, settings, str(pretrained_model_name_or_path)))
        return chosen._load(pretrained_model_name_or_path, args, kwargs, settings)

    @classmethod
    def _load(cls, path: str | os.PathLike | None, args: tuple, kwargs: dict[str, Any], settings: dict[str, Any]) -> Any:
        return load(super().from_pretrained, cls._stock_class, path, args, kwargs, settings)

    @classmethod
    def _from_config(cls, config, **kwargs):
        chosen = depth_class(class_to_load(cls._stock_class, config.to_dict(), cls.__name__))
        build: Any = super(DepthModel, chosen)
        return build._from_config(config, **kwargs)

    def card(self) -> str:
        """What it is, in a few lines."""
        return model_card(self, type(self).__name__)

    def depth_cache(self) -> DepthCache:
        """An empty cache for this model."""
        return DepthCache(self)

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

        A :class:`~depthpass.hf.decoding.draft_report.DraftReport`.
        """
        return self._depth.drafted

    @property
    def depth_spec(self) -> dict:
        return self._depth.plan.spec

    def _decoder(self) -> Any:
        """The module in which the program runs; the model itself where it has no head."""
        return self.get_submodule(self._depth.decoder)

    def _call_stock(self, args: tuple, kwargs: dict[str, object], prompt_length):
        """A call of the outer class: stock code around its decoder, where the program runs."""
        if DECODER in kwargs:
            return self._run_program(self._decoder(), cast("dict[str, Any]", kwargs[DECODER]), None)
        stock = type(self)._stock_class
        arguments, given = bind(stock, self, args, kwargs)
        if prompt_length is not None:
            arguments["prompt_length"] = prompt_length
        if self._depth.decoder == "":
            return self._run_program(self, arguments, None)
        check_outer(self, call_names(stock), arguments)
        name, _ = take_cache(dict(arguments))
        decoder = self._decoder()
        # On the compiled levels the loss is worth compiling, too: it is several passes over the vocabulary.
        compiled = self._depth.lowering in ("inductor", "cudagraph") and arguments.get("labels") is not None
        forward = compiled_stock(stock, self.device.type) if compiled else stock.forward
        if (labels := without_crossing(self, call_names(stock), arguments)) is not None:
            args, given = replaced(stock, args, given, "labels", labels)
        frame = Frame(decoder, self, arguments, name)
        with inside(frame):
            output = forward(self, *args, **given)
        if labels is not None:
            frame.arguments = {**arguments, "labels": labels}
        if frame.left is None:
            raise UnsupportedModelError(
                f"the forward of {type(self).__name__} does not call {self._depth.decoder} ({type(decoder).__name__}), which "
                "runs the program, so what it returns is not the transformed model's. Call the decoder in it."
            )
        return finish(self, bare(output), frame, frame.left)

    def _run_program(self, decoder: DepthModel | DepthDecoder, arguments: dict[str, Any], frame: Frame | None) -> Any:
        return run_program(self, decoder, arguments, frame)

    def _captured(self, call: Call, names: tuple[str, ...]) -> Capture:
        """The capture for this call signature, made on first use."""
        key = (
            tuple((n, t.dtype, t.dim(), t.device) for n, t in sorted(call.tensors.items())),
            "use_cache" in names, self._watched().key,
        )
        runtime = self._depth
        captured = runtime.captures.get(key)
        if captured is None:
            with _CAPTURING:
                captured = runtime.captures.get(key)
                if captured is None:
                    captured = self._capture(call.tensors, names)
                    remember(runtime, key, captured)
        return captured

    def _watched(self) -> Watch:
        return watch(self._depth.watches, self, self._depth.decoder, self._depth.layers)

    def _capture(self, tensors: dict[str, Tensor], names: tuple[str, ...]) -> Capture:
        moved = home(self) if self._depth.watches[-1].dispatched else None
        with quiet(moved or self.device):
            stock: Any = stock_decoder(self, moved)
            static = {"use_cache": False} if "use_cache" in names else {}
            # Heads without the argument ask the config. The copy's config is its own.
            for config in (stock.config, stock.config.get_text_config(decoder=True)):
                config.use_cache = config.output_hidden_states = False
            with working(f"capturing {type(self).__name__}"):
                captured = capture(stock, tensors, static)
            self._depth.watches[-1].settle(captured.asked)
        if len(captured.blocks) != self._depth.program.blocks:
            raise UnsupportedModelError(
                f"the program is for {self._depth.program.blocks} blocks, the model now has {len(captured.blocks)}."
            )
        return captured

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
        check_decoding(self, generation_config, model_kwargs, generation_mode)
        if given is None and generation_config.use_cache is not False:
            generation_config.cache_implementation = None  # of the checkpoint: those of the call are refused before
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

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, *args, **kwargs):
        if enable:
            gradient_checkpointing_func = not_reentrant(gradient_checkpointing_func)
        return super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args: Any, stock: bool = False, **kwargs: Any):
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

    def get_adapter_state_dict(self, adapter_name=None, state_dict=None):
        """Of adapters that transformers has put on; with the new parameters where they train beside them."""
        trained = new_state(self, state_dict) if any(p.requires_grad for p in self.depth.parameters()) else {}
        return super().get_adapter_state_dict(adapter_name, state_dict) | trained

    def _whole_state(self, is_main_process: bool) -> tuple[Mapping[str, Tensor] | None, bool]:
        """The weights to save where the model does not have them all at hand, and whether this process writes them."""
        state = gathered_state(self)
        if state is not None:
            return state, is_main_process and torch.distributed.get_rank() == 0
        return (full_state(self) if any(p.is_meta for p in self.parameters()) else None), is_main_process

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        return (rebuilt, (depth_class, type(self)._stock_class), *reduced[2:])


@functools.cache
def depth_class(stock: Any) -> Any:
    """The class of transformed models of a stock class; it keeps the stock class's name."""

    @functools.wraps(stock.forward)
    def forward(self, *args, prompt_length=None, **kwargs):
        return self._call_stock(args, kwargs, prompt_length)

    body: dict[str, Any] = {"config_class": None if stock.config_class is None else marked_class(stock.config_class)}
    if hasattr(stock, "generate"):

        @functools.wraps(stock.generate)
        def generate(self, *args, draft=None, draft_tokens="auto", loops=None, **kwargs):
            if self.depth_program.denoise is not None:
                return ahead.generate(self, args, {**kwargs, "draft": draft, "loops": loops})
            ahead.refuse_generation(self.depth_program)
            _, cache = take_cache(kwargs)
            check_generation(self, args, kwargs)
            if loops is not None:
                from depthpass.hf.decoding.row_depth import rows_generate

                if draft is not None:
                    raise InputError("loops: expected no draft beside it, got one. Leave one of them out.")
                return rows_generate(self, stock.generate, args, kwargs, cache, loops)
            if draft is not None:
                from depthpass.hf.decoding.speculation import draft_generate

                return draft_generate(self, stock.generate, args, kwargs, cache, draft, draft_tokens)
            if draft_tokens != "auto":
                raise InputError(f"draft_tokens: expected draft beside it, got {draft_tokens!r} alone.")
            return stock.generate(self, *args, **kwargs, **({} if cache is None else {STOCK_NAME: cache}))

        body["generate"] = generate
    # Dynamo must not trace into captures and caches: a user's torch.compile runs the program as it is.
    return mixed(DepthModel, stock, forward, **body)
