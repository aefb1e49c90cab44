"""``emit``: write an emitted model as a folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import keyword
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto

from depthpass.annotations import checked
from depthpass.emit.module import Module, module_of
from depthpass.emit.statements import check_expressible
from depthpass.errors import InputError, SpecError, UnsupportedModelError
from depthpass.hf.calls.host import depth_module
from depthpass.hf.checkpoints.files import replacing
from depthpass.hf.checkpoints.materialize import rewrite_lists, same_kinds, stack_of
from depthpass.hf.switching.switch import transformed
from depthpass.hf.transform import restore
from depthpass.ir.program import Op, Program

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".py", ".index.json", ".lock")
_OURS = ("config.json", "README.md")


@checked("emit")
def emit(
    model: nn.Module, directory: str | os.PathLike[str], *, name: str | None = None, copies: bool = False,
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a transformed model as plain transformers code, config and safetensors; returns the folder.

    ``modeling_<name>.py`` subclasses the stock classes: one layer per visit, each with its own ``layer_idx`` and cache layer,
    ``num_hidden_layers`` = visits, weights of repeated blocks shared and stored once. It loads without depthpass, with
    transformers' own caches, ``generate`` and ``torch.compile``::

        dp.emit(dp.transform(model, dp.Loop(start=1, end=3, times=4)), path)
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

    Args:
        model: a transformed model, with the program to write in force; merge PEFT adapters first.
        directory: a folder that does not exist or is empty.
        name: of the module and the model type; None = ``depth_`` and the stock model type.
        copies: store the weights of every visit by themselves, for visits in processes of their own (pipeline parallelism). The
            file is larger, a warning says by how much, and copies that are trained on train apart.
        source: a folder whose tokenizer and other small files are copied.

    Raises:
        InputError: the folder is not empty, or the name is no Python name; nothing is written.
        SpecError: the model is not transformed, or its program has something that no plain forward can express (top-k
            routing, pads, latents, ...): the message names the pass.
        UnsupportedModelError: the architecture's code cannot be cut open for this program.
    """
    inner = transformed(model, "emit")
    target, name = Path(directory), _module_name(inner, name)
    _check_empty(target)
    if source is not None and not Path(source).is_dir():
        raise InputError(f"emit.source: expected a folder, got {str(source)!r}.")
    stock, config, written = written_of(inner, name, copies)
    program = inner.depth_program
    if copies:
        _warn_size(program, stock, inner._depth.layers)
    if written.lost:
        warnings.warn(f"emit: the losses that train routers ({', '.join(written.lost)}) are not written; the emitted model has "
                      "its stock loss alone. Train with depthpass, or add them yourself.", UserWarning, stacklevel=3)
    with replacing(target) as folder:
        file = folder / f"modeling_{name}.py"
        file.write_text(written.text)
        loaded = load_module(file, f"depthpass_emitted_{name}")
        try:
            made_config = config_of(loaded, written, config, stock, name)
            weights = weights_of(stock, inner, program, copies)
            _check(loaded, written, made_config, weights)
        finally:
            del sys.modules[loaded.__name__]
        made_config.save_pretrained(folder)
        save_torch_state_dict(weights, folder, metadata={"format": "pt"})
        if getattr(stock, "generation_config", None) is not None and hasattr(stock, "generate"):
            stock.generation_config.save_pretrained(folder)
        (folder / "README.md").write_text(_card(inner, written, program))
        if source is not None:
            _copy_files(Path(source), folder)
    return target


def _module_name(inner: Any, name: str | None) -> str:
    """The name of the module to write, checked."""
    name = name or f"depth_{inner.config.model_type.replace('-', '_').replace('.', '_')}"
    if not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(f"emit.name: expected a Python name such as 'depth_llama', got {name!r}.")
    if name in vars(configuration_auto)["CONFIG_MAPPING_NAMES"]:  # a loader without remote code would build that
        raise InputError(f"emit.name: expected a name that is no model type of transformers, got {name!r}; take 'depth_{name}'.")
    return name


def _check_empty(target: Path) -> None:
    """Refuse a folder that has something in it: nothing of it may be lost."""
    above = next((p for p in target.parents if os.path.lexists(p)), target)
    reasons = {"not empty": target.is_dir() and any(target.iterdir()), "a file": target.exists() and not target.is_dir(),
               "a link to nothing": target.is_symlink() and not target.exists(),
               f"below {above}, no folder": not os.path.lexists(target) and not above.is_dir()}
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        raise InputError(f"emit: expected a folder that does not exist or is empty, got {str(target)!r}, which is {why}. Nothing "
                         "was written; choose another one.")


def written_of(inner: Any, name: str, copies: bool) -> tuple[Any, Any, Module]:
    """The stock model of a transformed one, its config with visits counted, and the module of the program in force.

    Raises:
        SpecError, UnsupportedModelError: as :func:`emit`.
    """
    if any(hasattr(m, "merged_adapters") for m in inner.modules()):
        raise UnsupportedModelError("emit: expected a model without PEFT layers, got adapters. Call merge_and_unload() first.")
    if inner._depth.plan.varies:
        raise SpecError("emit: expected fixed loop counts, got some that vary. Call dp.set_loops(model, T) first.")
    if inner._depth.ratios:
        raise SpecError(f"emit: expected routes that take what the program says, got shares of this run's own "
                        f"({dict(inner._depth.ratios)}). Call dp.set_ratios(model, None) first.")
    program, layers, decoder = inner.depth_program, inner._depth.layers, inner._depth.decoder
    check_expressible(program)
    stock = restore(inner)
    config = _config(stock, program, layers)
    return stock, config, module_of(stock, program, layers, decoder, _stack(program), depth_module(inner), name, copies)


def _stack(program: Program) -> tuple[int, ...] | None:
    """Blocks of the visits where stock code can run the program as it is."""
    try:
        return stack_of(program, "emit")
    except SpecError:
        return None


def _config(stock: Any, program: Program, layers: str) -> Any:
    """The stock config, with numbers and lists that count visits.

    Raises:
        UnsupportedModelError: stock code would build another kind of block somewhere.
    """
    config = copy.deepcopy(stock.config)
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(f"emit: expected a text model, got a {type(stock).__name__} of several parts. Emit its text "
                                    "model.")
    blocks = stock.get_submodule(layers)
    visits = [o["index"] for o in program.visits]
    rewrite_lists(config, visits, len(blocks))
    same_kinds(type(stock), config, layers, [blocks[i] for i in visits], visits, "emit")
    return config


def load_module(file: Path, name: str) -> Any:
    """The written module under a name; it stays where inspect, dataclasses and transformers look a class's module up."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        sys.dont_write_bytecode = bytecode
    return module


def config_of(loaded: Any, written: Module, config: Any, stock: Any, name: str) -> Any:
    own = ("model_type", "depthpass", "auto_map", "transformers_version")
    fields = {k: v for k, v in config.to_dict().items() if k not in own}
    emitted = getattr(loaded, written.config)(**fields)
    emitted.architectures = [written.outer]
    file = f"modeling_{name}"
    emitted.auto_map = {"AutoConfig": f"{file}.{written.config}", "AutoModel": f"{file}.{written.base}"}
    if (kind := _auto_class(type(stock))) is not None and kind != "AutoModel":
        emitted.auto_map[kind] = f"{file}.{written.outer}"
    return emitted


def _auto_class(stock: type) -> str | None:
    """Name of the Auto class that makes a stock class."""
    # A class may stand in several tables, among them that of pretraining.
    for name, auto in sorted(vars(modeling_auto).items(), key=lambda item: item[0] != "AutoModelForCausalLM"):
        table = auto._model_mapping if isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass) else None
        if table is not None and stock.__name__ in table._model_mapping.values():
            return name
    return None


def weights_of(stock: Any, inner: Any, program: Program, copies: bool) -> dict[str, torch.Tensor]:
    """Every tensor by its name in the emitted model: once, or with ``copies`` for every visit."""
    layers, decoder = inner._depth.layers, inner._depth.decoder
    places: dict[int, list[int]] = {}
    for place, visit in enumerate(program.visits):
        places.setdefault(visit["index"], []).append(place)
    tensors: dict[str, torch.Tensor] = {}
    kept = {id(t): n for n, t in stock.state_dict(keep_vars=True).items()}
    for key, tensor in (*stock.named_parameters(), *stock.named_buffers()):
        if id(tensor) not in kept:  # rotary tables and other buffers that are made again
            continue
        if key.startswith(layers + "."):
            number, _, rest = key[len(layers) + 1 :].partition(".")
            visits = places.get(int(number), [])
            for place in visits if copies else visits[:1]:
                tensors[f"{layers}.{place}.{_held(inner, program.visits[place], rest)}"] = tensor.detach()
        else:
            tensors[key] = tensor.detach()
    head = decoder + "." if decoder else ""
    owners = {o["lora"]: p for p, o in enumerate(program.visits) if o["lora"]}
    for key, tensor in depth_module(inner).state_dict().items():
        owner = next((s for s in owners if key.startswith(s + ".")), None)
        if owner is None:
            tensors[f"{head}depth.{key}"] = tensor.detach()
        else:
            tensors[f"{layers}.{owners[owner]}.{key[len(owner) + 1 :]}"] = tensor.detach()
    # Tensors that share memory would be stored once, under one of their names.
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensors[key] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return tensors


def _held(inner: Any, visit: Op, name: str) -> str:
    """Name of a block's weight in a visit: one with an update of its own holds the map that it updates."""
    path, _, leaf = name.rpartition(".")
    updated = visit["lora"] and f"{visit['lora']}.{path}.a" in dict(depth_module(inner).named_parameters())
    return f"{path}.base.{leaf}" if updated else name


def _warn_size(program: Program, stock: Any, layers: str) -> None:
    """Say how much larger a file with copies is."""
    sizes = [sum(p.numel() * p.element_size() for p in b.parameters()) for b in stock.get_submodule(layers)]
    visits = [o["index"] for o in program.visits]
    more, once = sum(sizes[i] for i in visits), sum(sizes[i] for i in set(visits))
    if more > once:
        warnings.warn(f"emit(copies=True): the blocks take {more / 2**20:.1f} MiB instead of {once / 2**20:.1f} MiB, because "
                      f"{len(visits)} visits of {len(set(visits))} blocks have weights of their own.", UserWarning, stacklevel=4)


def _check(loaded: Any, written: Module, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """Build what was written without memory and compare its weights with those to be saved.

    Raises:
        UnsupportedModelError: they differ, so the folder would not load.
    """
    with torch.device("meta"):
        emitted = getattr(loaded, written.outer)(config)
    tied = emitted.get_expanded_tied_weights_keys(all_submodels=True)
    wanted = {k: tuple(t.shape) for k, t in emitted.state_dict().items() if k not in tied}
    got = {k: tuple(t.shape) for k, t in weights.items() if k in wanted or k not in tied}
    if wanted != got:
        key = next(iter(sorted(set(wanted.items()) ^ set(got.items()))))[0]
        raise UnsupportedModelError(f"emit: expected the written {written.outer} to have this model's weights, got another "
                                    f"{key}: {wanted.get(key)} instead of {got.get(key)}. Its config does not build this model.")


def _card(inner: Any, written: Module, program: Program) -> str:
    spec = json.dumps(inner.depth_spec, indent=1)
    return (f"# {written.outer}\n\n`{type(inner).__name__}` rewired by depthpass: {len(program.visits)} visits of "
            f"{len({o['index'] for o in program.visits})} blocks. Load it with\n`from_pretrained(path, trust_remote_code=True)`; "
            "depthpass is not needed.\n\n"
            f"```\n{program}\n```\n\n```json\n{spec}\n```\n")


def _copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, licence: whatever is no weights, code or config."""
    for file in sorted(source.iterdir()):
        copied = file.is_file() and not file.name.endswith(_NOT_COPIED) and file.name not in _OURS
        if copied and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
