"""The emitted decoder class: one layer per visit, and the program's statements in its forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from depthpass.emit.branches import beside, halved_forward, modulated_forward
from depthpass.emit.statements import Body, body_of, new_modules
from depthpass.emit.stock import Forward, attention_forward, forward_of, handing_on, hands_on, source_of
from depthpass.emit.subject import AGAIN, HALVED, OPEN, PREFIX, Subject, indented
from depthpass.emit.templates import CHUNKS, CUT
from depthpass.errors import UnsupportedModelError
from depthpass.ir.program import Op

_RANKS = {nn.Linear: "LowRankLinear", Conv1D: "LowRankConv1D"}


def decoder_class(s: Subject) -> str:
    """The decoder's class, behind the classes of attention and layers that it names.

    Raises:
        UnsupportedModelError: the stock code cannot be cut open for what the program needs.
    """
    module = s.modules[0]
    forward = None if s.stack is not None else forward_of(type(module), s.layers)
    lines = [f"class {s.name(module)}({type(module).__name__}):", f'    """{type(module).__name__} with one layer per visit."""',
             "", f"    config_class = {s.config}"]
    classes: list[str] = []
    if forward is not None:
        s.cache = forward.cache
        apart = any(o["part"] != "whole" for o in s.program.visits)
        parallel = apart and beside(s.block(s.blocks[0]), s.attention()[0])
        s.body = body_of(s.program, forward.norm, forward.cache, parallel)
        s.used |= s.body.parts
        lines += s.flags()
        if s.body.attends:
            classes.append(_attention(s))
        if (s.body.modulated or s.body.attends or s.body.halved) and not forward.hands_on:
            raise UnsupportedModelError(f"emit: expected a {type(module).__name__} that hands **kwargs to its blocks, in which "
                                        "timesteps, scales, parts and what a visit reads come, got one that does not.")
        classes += _layers(s)
    again = _again(s)
    lines += _init(s, again)
    classes += [f"class {AGAIN}{name}(Again, {name}):\n    \"\"\"{name} of a later visit.\"\"\"" for name in again]
    if forward is not None:
        lines += _forward(s, forward)
    return "\n\n\n".join([*classes, "\n".join(lines)])


def _attention(s: Subject) -> str:
    _, cls = s.attention()
    return (f"class {PREFIX}{cls.__name__}({cls.__name__}):\n"
            f'    """{cls.__name__} of a visit whose keys others read, or that reads another\'s."""\n\n'
            + "\n".join(indented(attention_forward(cls), 4)))


def _layer_class(s: Subject, place: int) -> str:
    """Name of the class of a visit's layer, where stock code does not do."""
    cls, body = type(s.block(s.blocks[place])), s.body
    if body is None or place not in (*body.modulated, *body.attends, *body.halved):
        return ""
    if place in body.halved:
        return HALVED + cls.__name__
    if place in body.modulated:
        return PREFIX + cls.__name__
    return "" if hands_on(cls, s.attention()[0]) else OPEN + cls.__name__


def _layers(s: Subject) -> list[str]:
    """A class for every class of blocks with modulated or halved visits, or that keeps from its attention what a visit reads."""
    named: dict[str, dict[int, nn.Module]] = {}
    for place, index in enumerate(s.blocks):
        if name := _layer_class(s, place):
            named.setdefault(name, {})[index] = s.block(index)
    return [_layer(s, name, list(blocks.values())) for name, blocks in named.items()]


def _layer(s: Subject, name: str, blocks: list[nn.Module]) -> str:
    cls, attention = type(blocks[0]), s.attention()[0]
    if name.startswith(HALVED):
        text, what = halved_forward(blocks, attention), "whose attention and network a visit may run apart"
    elif name.startswith(PREFIX):
        text, what = modulated_forward(blocks, attention), "whose two branches a visit scales: what they read, and what they add"
    else:
        text, what = source_of(cls.forward)[0], "whose attention is told what a visit reads"
    if not hands_on(cls, attention):
        text = handing_on(cls, attention, text)
    return f"class {name}({cls.__name__}):\n    \"\"\"{cls.__name__} {what}.\"\"\"\n\n" + "\n".join(indented(text, 4))


def _again(s: Subject) -> list[str]:
    """Names of the classes of modules in which later visits of a block differ from the first."""
    if not s.repeats:
        return []
    attends = s.body.attends if s.body is not None else ()
    attention = s.attention()[0] if attends else None
    classes: dict[str, None] = {}
    for place, index in enumerate(s.blocks):
        if s.blocks.index(index) == place:
            continue
        updated = {n for p, i in enumerate(s.blocks) if i == index for n in _updated(s, s.program.visits[p])}
        for path, module in s.block(index).named_modules():
            below = path + "." if path else ""
            if any(hasattr(m, "layer_idx") for m in module.modules()) or any(u.startswith(below) for u in updated):
                changed = PREFIX + type(module).__name__ if place in attends and path == attention else ""
                classes[(changed if path else _layer_class(s, place)) or type(module).__name__] = None
    return list(classes)


def _updated(s: Subject, o: Op) -> list[str]:
    """Paths of the linear maps of a visit's block that have updates of its own."""
    if not o["lora"]:
        return []
    names = [n for n, _ in s.new.get_submodule(o["lora"]).named_parameters()]
    return [n.removesuffix(".a") for n in names if n.endswith(".a")]


def _init(s: Subject, again: list[str]) -> list[str]:
    program, body = s.program, s.body
    modules = new_modules(program, {n: p.shape for n, p in s.new.named_parameters()})
    ranks = {p: o for p, o in enumerate(program.visits) if o["lora"]}
    shared = body.attends if body is not None else ()
    layers = [_layer_class(s, p) for p in range(len(s.blocks))]
    if not (modules or ranks or shared or any(layers) or again):
        return []
    lines = ["", "    def __init__(self, config):", "        super().__init__(config)"]
    if shared:
        path, cls = s.attention()
        lines += [f"        for place in {list(shared)}:",
                  f"            self.{s.layers}[place].{path}.__class__ = {PREFIX}{cls.__name__}"]
    for kind in dict.fromkeys(filter(None, layers)):
        places = [p for p, name in enumerate(layers) if name == kind]
        lines += [f"        for place in {places}:", f"            self.{s.layers}[place].__class__ = {kind}"]
    for name, (expression, used) in modules.items():
        s.used |= {"attach", *used}
        lines.append(f'        attach(self, "depth.{name}", {expression})')
    for p, o in ranks.items():
        lines += _ranks(s, p, o)
    if again:
        s.used.add("share")
        kinds = [f"{name}: {AGAIN}{name}" for name in again]
        lines += [f"        share(self.{s.layers}, BLOCKS, {{", *(f"            {kind}," for kind in kinds), "        })"]
    return [*lines, "        self.post_init()"]


def _ranks(s: Subject, place: int, o: Op) -> list[str]:
    """Lines that give a visit's linear maps their updates."""
    block, lines = s.block(o["index"]), []
    for path in _updated(s, o):
        kind = type(block.get_submodule(path))
        if kind not in _RANKS:
            raise UnsupportedModelError(f"emit: expected per-visit LoRA on linear maps, got {path} of block {o['index']}, a "
                                        f"{kind.__name__}. Leave lora_rank out.")
        s.used.add(_RANKS[kind])
        at = f"self.{s.layers}[{place}].{path}"
        lines.append(f"        {at} = {_RANKS[kind]}({at}, {o['lora_rank']})")
    return lines


def _forward(s: Subject, f: Forward) -> list[str]:
    body = s.body
    assert body is not None
    code = [*_before(s, body, f), "", *_visit(body, f), "", *body.lines, "", *f.after]
    head = list(f.head)
    if body.chunk is None:
        return ["", *indented("\n".join(head), 4), *indented("\n".join(code), 8)]
    at = next(i for i, line in enumerate(head) if line.lstrip().startswith("def forward("))
    inner = [*head[:at], head[at].replace("def forward(", "def chunk("), *head[at + 1 :]]
    # Decorators read the config and record outputs: once, around each chunk.
    outer = [line for line in head[:at] if "deprecate_kwarg" in line] + head[at:]
    return ["", *indented("\n".join(outer), 4), *_chunks(f, body.chunk), "",
            *indented("\n".join(inner), 4), *indented("\n".join(code), 8)]


def _before(s: Subject, body: Body, f: Forward) -> list[str]:
    """Statements before the visits: what they need to know of this call, and the stock code's own."""
    code: list[str] = []
    if s.stateful:
        s.used.add("check_backend")
        code.append("check_backend(self.config, kwargs)")
    if body.chunk is not None:
        s.used.add("check_recomputed")
        code.append(f"check_recomputed(self.{s.layers})")
    if any(o["memory"] for o in s.program.visits):
        s.used.add("check_units")
        code.append(f"check_units(self.{s.layers})")
    if body.taps:
        code.append('taps = kwargs.pop("taps", None)')
    if body.predicts:
        s.used.add("check_head")
        code.append('predict = check_head(kwargs.pop("predict", None))')
    if body.past:
        s.used.add("seen_before")
        code.append(f"past = seen_before({f.cache})")
    if body.routed or any(o["gate"] for o in s.program.visits):
        s.used.add("check_rooms")
        code.append(f"check_rooms({f.cache})")
    if body.ages:
        code.append("tokens = input_ids if input_ids is not None else inputs_embeds")
        code.append("age = ages(attention_mask, past, tokens.shape[1], tokens.device)")
    if s.program.reads_positions and not s.has_table and "position_ids" in f.arguments:
        # Stock code numbers columns; what reads absolute positions counts a row's real tokens.
        code += ["if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:",
                 "    tokens = input_ids if input_ids is not None else inputs_embeds",
                 "    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]"]
    return code + f.before


def _visit(body: Body, f: Forward) -> list[str]:
    """The stock loop's body as a function of its own."""
    first, *visit = f.visit
    place = first.removeprefix("place=")
    if not (body.attends or body.modulated or body.halved):
        return [f"def visit({place}, hidden_states):", *("    " + line for line in visit)]
    cache = f", {f.cache}={f.cache}" if body.attends else ""
    return ["given = kwargs", "", f"def visit({place}, hidden_states{cache}, **reading):", "    kwargs = {**given, **reading}",
            *("    " + line for line in visit)]


def _chunks(f: Forward, chunk: int) -> list[str]:
    names = [n for n in f.arguments if n not in ("self", "use_cache", f.cache)]
    given = [CUT[n] for n in names if n in CUT]
    lines = []
    if others := [n for n in names if n not in CUT]:
        lines = [f"        if any(x is not None for x in ({', '.join(others)},)):",
                 f"            raise ValueError(\"this model runs chunks of tokens and takes no {' or '.join(others)}.\")"]
    arguments: Any = ("\n" + " " * 16).join([*given, f"{f.cache}={f.cache}, use_cache=True, **kwargs,"])
    text = CHUNKS.replace("ARGUMENTS", arguments).replace("CHUNK", str(chunk)).replace("CACHE", f.cache)
    return lines + text.strip("\n").splitlines()
