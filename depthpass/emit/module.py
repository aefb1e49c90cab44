"""The text of an emitted ``modeling_<name>.py``."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from depthpass.emit import parts as library
from depthpass.emit.statements import Body, body_of, new_modules
from depthpass.emit.stock import (
    attention_forward,
    check_handed_on,
    forward_of,
    imports_for,
    logits_of,
    makes_by_config,
    renamed_init,
)
from depthpass.errors import UnsupportedModelError
from depthpass.ir.program import Program

PREFIX = "Depth"


@dataclass
class Module:
    """An emitted module.

    Attributes:
        text: its source.
        config, outer, base: names of its classes: of the config, of the whole model and of what AutoModel makes.
        stateful: whether layers need more of earlier tokens than each its own keys.
    """

    text: str
    config: str
    outer: str
    base: str
    stateful: bool


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
    return _Writer(model, program, layers, decoder, stack, new, model_type, copies).write()


class _Writer:
    def __init__(self, model, program, layers, decoder, stack, new, model_type, copies):
        self.copies = copies
        self.model, self.program, self.stack, self.new, self.model_type = model, program, stack, new, model_type
        self.layers = layers[len(decoder) + 1 if decoder else 0 :]
        if "." in self.layers:
            raise UnsupportedModelError(f"emit: expected the blocks right below their decoder, got {layers!r}.")
        # From the innermost module that is a transformers model to the whole one.
        steps = decoder.split(".") if decoder else []
        self.paths = [".".join(steps[:i]) for i in range(len(steps), -1, -1)]
        self.modules = [model.get_submodule(p) for p in self.paths]
        self.stock_blocks: Any = model.get_submodule(layers)
        self.blocks = [o["index"] for o in program.visits]
        self.used: set[str] = set()
        self.body: Body | None = None
        self.cache = ""

    @property
    def stateful(self) -> bool:
        """Whether layers need more of earlier tokens than each its own keys."""
        return self.body is not None and bool(self.body.attends or self.body.past)

    def name(self, module: nn.Module) -> str:
        return PREFIX + type(module).__name__

    def write(self) -> Module:
        config = type(self.model.config)
        pieces = [self._constants(), self._config(config), self._decoder()]
        pieces += [self._outer(i) for i in range(1, len(self.modules))]
        if self.cache:
            pieces.insert(1, self._guard())
        whole = self.name(self.modules[-1])
        pieces.append("# Some tools look the architecture of a config up there, `transformers serve` among them.\n"
                      f"transformers.{whole} = {whole}")
        text = "\n\n\n".join(self._library() + pieces) + "\n"
        body = text
        homes = dict.fromkeys([*(type(m).__module__ for m in self.modules), config.__module__,
                               *(c.__module__ for m in self.modules for c in type(m).__mro__ if "transformers" in c.__module__)])
        imports = ["import re", "import torch", "import transformers", "from torch import nn"]
        if self.used:
            imports += ["from typing import Any", "from torch import Tensor"]
        if {"line_layer"} & self.used:
            imports.append("from transformers.cache_utils import DynamicLayer, StaticLayer")
        if self.body is not None and self.body.chunk is not None:
            imports.append("from transformers.cache_utils import DynamicCache")
        if self.body is not None and self.body.taps:
            imports.append("from functools import wraps")
        if self.cache:
            imports.append("from inspect import signature")
        given = {a.asname or a.name for line in imports for n in ast.parse(line).body for a in n.names}  # type: ignore[attr-defined]
        more = imports_for(body, (*homes, "transformers.modeling_outputs", "transformers"), given)
        text = self._docstring() + "\n\n" + "\n".join(_sorted(imports + more, body)) + "\n\n\n" + body
        return Module(text, PREFIX + config.__name__, self.name(self.modules[-1]),
                      self.name(self.modules[min(self._base(), len(self.modules) - 1)]), self.stateful)

    def _base(self) -> int:
        """Place of the model without its head."""
        prefix = self.modules[-1].base_model_prefix
        return next((i for i, p in enumerate(self.paths) if p == prefix), 0)

    def _docstring(self) -> str:
        kind = type(self.model).__name__
        text = "\n".join("    " + line for line in str(self.program).splitlines())
        return (f'"""{kind}, rewired: {len(self.blocks)} visits of {len(set(self.blocks))} blocks.\n\n'
                f"Written by depthpass for transformers {transformers.__version__}; needs nothing of depthpass. Every visit is a "
                f"layer of its own with\nits own cache layer; visits of one block "
                f"{'have copies of' if self.copies else 'share'} its weights. The program:\n\n{text}\n\"\"\"")

    def _constants(self) -> str:
        return (f"BLOCKS = {self.blocks}\n"
                '"""Block of the original model that each visit runs."""')

    def _guard(self) -> str:
        """An error in place of silently lost keys: transformers 5.24 gave the cache another name."""
        stock = type(self.modules[0]).__name__
        written = f"this file is for transformers {transformers.__version__}, whose models call their cache {self.cache!r}"
        return (f'if "{self.cache}" not in signature({stock}.forward).parameters:\n'
                f'    raise ImportError("{written}; those of "\n'
                '                      f"{transformers.__version__} do not. Emit it again with the installed transformers.")')

    def _config(self, config: type) -> str:
        return (f"class {PREFIX}{config.__name__}({config.__name__}):\n"
                '    """As the original; num_hidden_layers and lists by layer count visits."""\n\n'
                f'    model_type = "{self.model_type}"')

    def _library(self) -> list[str]:
        """The parts that are used, in the order of their file."""
        if not self.used:
            return []
        todo = list(self.used)
        while todo:
            source = ast.parse(textwrap.dedent(inspect.getsource(getattr(library, todo.pop()))))
            for node in ast.walk(source):
                if isinstance(node, ast.Name) and node.id not in self.used and _is_part(node.id):
                    self.used.add(node.id)
                    todo.append(node.id)
        names = [n for n, x in vars(library).items() if n in self.used and _is_part(n)]
        return [inspect.getsource(getattr(library, n)).rstrip() for n in names]

    # The decoder.

    def _decoder(self) -> str:
        module = self.modules[0]
        stock, name = type(module).__name__, self.name(module)
        forward = None if self.stack is not None else forward_of(type(module), self.layers)
        lines = [f"class {name}({stock}):", f'    """{stock} with one layer per visit."""', "",
                 f"    config_class = {PREFIX}{type(self.model.config).__name__}"]
        if forward is not None:
            self.cache = forward.cache
            self.body = body_of(self.program, forward.norm, forward.cache)
            self.used |= self.body.parts
            if self.body.chunk is not None:
                lines.append("    supports_gradient_checkpointing = False")
            if self.stateful:
                lines.append("    _supports_attention_backend = False")
            if any(o["gate"] for o in self.program.visits):
                lines += ["    _supports_flash_attn = False", "    _supports_flex_attn = False"]
        # Before the decoder, which names it.
        attention = self._attention() if self.body is not None and self.body.attends else ""
        lines += self._init()
        if not self.copies:
            lines += _TIES.replace("LAYERS", self.layers).rstrip().splitlines() + self._biases()
        if forward is not None:
            lines += self._forward(forward)
        return (attention + "\n\n\n" if attention else "") + "\n".join(lines)

    def _biases(self) -> list[str]:
        turned = any(type(m).__name__ == "Conv1D" for m in self.model.modules())
        return list(_BIASES.rstrip().splitlines()) if turned and not self.copies else []

    def _attention_path(self) -> str:
        block = self.stock_blocks[0]
        found = [n for n, m in block.named_children() if "attention_interface" in _source(type(m))]
        if len(found) != 1:
            raise UnsupportedModelError(f"emit: expected one attention module in a {type(block).__name__}, got {len(found)}.")
        return found[0]

    def _attention(self) -> str:
        path = self._attention_path()
        block = self.stock_blocks[0]
        cls = type(getattr(block, path))
        check_handed_on(type(block), path)
        self.attention = (path, cls)
        text = attention_forward(cls)
        return (f"class {PREFIX}{cls.__name__}({cls.__name__}):\n"
                f'    """{cls.__name__} of a visit whose keys others read, or that reads another\'s."""\n\n{_block(text)}')

    def _init(self) -> list[str]:
        program, body = self.program, self.body
        made = new_modules(program, {n: p.shape for n, p in self.new.named_parameters()})
        ranks = {p: o for p, o in enumerate(program.visits) if o["lora"]}
        shared = body.attends if body is not None else ()
        if not (made or ranks or shared):
            return []
        lines = ["", "    def __init__(self, config):", "        super().__init__(config)"]
        if shared:
            path, cls = self.attention
            lines += [f"        for place in {list(shared)}:",
                      f"            self.{self.layers}[place].{path}.__class__ = {PREFIX}{cls.__name__}"]
        for name, (expression, used) in made.items():
            self.used |= {"attach", *used}
            lines.append(f'        attach(self, "depth.{name}", {expression})')
        for p, o in ranks.items():
            self.used |= {"LowRankLinear"}
            lines += self._ranks(p, o)
        return [*lines, "        self.post_init()"]

    def _ranks(self, place: int, o: Any) -> list[str]:
        """Lines that give a visit's linear maps their updates."""
        block, lines = self.stock_blocks[o["index"]], []
        names = [n for n, _ in self.new.get_submodule(o["lora"]).named_parameters()]
        for path in (n.removesuffix(".a") for n in names if n.endswith(".a")):
            if type(block.get_submodule(path)) is not nn.Linear:
                raise UnsupportedModelError(f"emit: expected per-visit LoRA on linear maps, got {path} of block {o['index']}, a "
                                            f"{type(block.get_submodule(path)).__name__}. Leave lora_rank out.")
            lines += [f"        self.{self.layers}[{place}].{path}.__class__ = LowRankLinear",
                      f"        self.{self.layers}[{place}].{path}.add_update({o['lora_rank']})"]
        return lines

    def _forward(self, f: Any) -> list[str]:
        body = self.body
        assert body is not None
        first, *visit = f.visit
        place = first.removeprefix("place=")
        code: list[str] = []
        if self.stateful:
            self.used.add("check_backend")
            code.append("check_backend(kwargs)")
        if body.taps:
            code.append('taps = kwargs.pop("taps", None)')
        if body.past:
            self.used.add("seen_before")
            code.append(f"past = seen_before({f.cache})")
        if any(o["gate"] for o in self.program.visits):
            self.used.add("check_rooms")
            code.append(f"check_rooms({f.cache})")
        if body.ages:
            code.append("tokens = input_ids if input_ids is not None else inputs_embeds")
            code.append("age = ages(attention_mask, past, tokens.shape[1], tokens.device)")
        code += f.before
        call = f"hidden_states, {f.cache}={f.cache}, **reading" if body.attends else "hidden_states"
        if body.attends:
            code.append("given = kwargs")
        code += ["", f"def visit({place}, {call}):"]
        if body.attends:
            code.append("    kwargs = {**given, **reading}")
        code += ["    " + line for line in visit]
        code += ["", *body.lines, "", *f.after]
        head = list(f.head)
        if body.chunk is None:
            return ["", *_indented("\n".join(head), 4), *_indented("\n".join(code), 8)]
        at = next(i for i, line in enumerate(head) if line.lstrip().startswith("def forward("))
        inner = [*head[:at], head[at].replace("def forward(", "def chunk("), *head[at + 1 :]]
        # Decorators read the config and record outputs: once, around each chunk.
        outer = [line for line in head[:at] if "deprecate_kwarg" in line] + head[at:]
        return ["", *_indented("\n".join(outer), 4), *self._chunks(f, body.chunk), "",
                *_indented("\n".join(inner), 4), *_indented("\n".join(code), 8)]

    def _chunks(self, f: Any, chunk: int) -> list[str]:
        names = [n for n in f.arguments if n not in ("self", "use_cache", f.cache)]
        given = [_CUT[n] for n in names if n in _CUT]
        lines = []
        if others := [n for n in names if n not in _CUT]:
            lines = [f"        if any(x is not None for x in ({', '.join(others)},)):",
                     f"            raise ValueError(\"this model runs chunks of tokens and takes no {' or '.join(others)}.\")"]
        arguments = ("\n" + " " * 16).join([*given, f"{f.cache}={f.cache}, use_cache=True, **kwargs,"])
        text = _CHUNKS.replace("ARGUMENTS", arguments).replace("CHUNK", str(chunk)).replace("CACHE", f.cache)
        return lines + text.strip("\n").splitlines()

    # What stands around it.

    def _outer(self, i: int) -> str:
        module, inner = self.modules[i], self.modules[i - 1]
        stock, name = type(module).__name__, self.name(module)
        path = self.paths[i - 1][len(self.paths[i]) + 1 if self.paths[i] else 0 :]
        config = f"{PREFIX}{type(self.model.config).__name__}"
        lines = [f"class {name}({stock}):", f"    config_class = {config}", *self._biases()]
        first = []
        if makes_by_config(type(module)):
            # Its decoder is whatever AutoModel makes of its config.
            first = [f"AutoModel.register({config}, {self.name(inner)}, exist_ok=True)", "", ""]
        else:
            lines += ["", *_indented(renamed_init(type(module), type(inner), self.name(inner), path), 4)]
        body = self.body
        if body is not None and i == len(self.modules) - 1:
            if self.stateful and hasattr(module, "init_continuous_batching"):
                lines += _NO_PAGES.rstrip().splitlines()
            if body.ages:
                lines += _MASKS.rstrip().splitlines()
            if body.taps:
                lines += self._taps(module, path, body)
        return "\n".join(first + lines)

    def _taps(self, module: nn.Module, path: str, body: Body) -> list[str]:
        stock, heads = type(module).__name__, sorted(n for n, head in body.taps.items() if head)
        lines = ["", f"    @wraps({stock}.forward)", "    def forward(self, *args, **kwargs):", "        taps = {}",
                 "        output = super().forward(*args, taps=taps, **kwargs)",
                 '        keep = kwargs.get("logits_to_keep", 0)',
                 "        streams = {name: torch.cat(parts, 1) for name, parts in taps.items()}"]
        if heads:
            lines += [f"        output.taps = {{name: self.logits_of(x, keep) if name in {heads} else kept_tokens(x, keep)",
                      "                       for name, x in streams.items()}"]
        else:
            lines += ["        output.taps = {name: kept_tokens(x, keep) for name, x in streams.items()}"]
        self.used.add("kept_tokens")
        lines.append("        return output")
        if heads:
            lines += ["", "    def logits_of(self, hidden_states, logits_to_keep):",
                      '        """Logits of a stream that the final norm has passed."""',
                      "        outputs = BaseModelOutputWithPast(last_hidden_state=hidden_states)",
                      *_indented("\n".join(logits_of(type(module), path)), 8), "        return logits"]
        return lines


_TIES = """
    _tied_weights_keys = {
        rf"LAYERS\\.{p}\\.": rf"LAYERS\\.{BLOCKS.index(b)}\\." for p, b in enumerate(BLOCKS) if BLOCKS.index(b) != p
    }

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        \"""Visits of one block share its weights, whatever the config says of the embeddings.\"""
        tied = {}
        for name, _ in self.named_parameters(remove_duplicate=False):
            visit = re.fullmatch(r"LAYERS\\.(\\d+)\\.(.+)", name)
            if visit and not name.endswith((".a", ".b")):
                first = BLOCKS.index(BLOCKS[int(visit[1])])
                if first != int(visit[1]):
                    tied[name] = f"LAYERS.{first}.{visit[2]}"
        return tied
"""
"""Ties of a decoder; LAYERS stands for the name of its blocks."""

_MASKS = """
    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        \"""The decoder makes its masks itself: it has to know where a row begins.\"""
        return attention_mask
"""

_BIASES = """
    def _adjust_bias(self, output_embeddings, input_embeddings):
        \"""Shared blocks stay as they are: their Conv1D has its bias along the other side.\"""
        if isinstance(output_embeddings, nn.Linear):
            super()._adjust_bias(output_embeddings, input_embeddings)
"""

_NO_PAGES = """
    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError("continuous batching keeps keys and values in pages, and nothing else of earlier tokens; this "
                                  "model reads streams or keys of other layers. Use generate.")

    continuous_batching_context_manager = init_continuous_batching
"""

_CHUNKS = """
        # A bridge reads at least CHUNK tokens earlier: so many run at once, behind the keys of those before.
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: this model runs chunks of tokens, whose weights have different shapes.")
        return_dict = kwargs.pop("return_dict", None)
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        CACHE = DynamicCache(config=self.config) if CACHE is None else CACHE
        tokens = input_ids if input_ids is not None else inputs_embeds
        count, outputs = tokens.shape[1], []
        for start in range(0, count, CHUNK):
            end = min(start + CHUNK, count)
            outputs.append(self.chunk(
                ARGUMENTS
            ))
        output = outputs[-1]
        output.last_hidden_state = torch.cat([o.last_hidden_state for o in outputs], 1)
        if output.hidden_states is not None:
            output.hidden_states = tuple(torch.cat(parts, 1) for parts in zip(*(o.hidden_states for o in outputs)))
        if not keep_cache:
            output.CACHE = None
        return output if return_dict is not False else output.to_tuple()
"""
"""Body of a forward that runs chunk by chunk."""

_CUT = {
    "input_ids": "input_ids=None if input_ids is None else input_ids[:, start:end],",
    "inputs_embeds": "inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, start:end],",
    "attention_mask": "attention_mask=None if attention_mask is None else "
                      "attention_mask[:, : attention_mask.shape[1] - count + end],",
    "position_ids": "position_ids=None if position_ids is None else position_ids[..., start:end],",
}


def _is_part(name: str) -> bool:
    found = getattr(library, name, None)
    return getattr(found, "__module__", None) == library.__name__


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""


def _indented(text: str, by: int) -> list[str]:
    return [" " * by + line if line.strip() else "" for line in text.splitlines()]


def _block(text: str) -> str:
    return "\n".join(_indented(text, 4))


def _sorted(imports: list[str], body: str) -> list[str]:
    """Imports that are used: the standard library, torch, then transformers."""
    def rank(line: str) -> tuple[int, bool, str]:
        home = line.split()[1].split(".")[0]
        return {"torch": 1, "transformers": 2}.get(home, 0), line.startswith("from"), line

    return sorted((line for line in dict.fromkeys(imports) if line != "import re" or "re." in body), key=rank)
