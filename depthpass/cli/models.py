"""``contraction``, ``search``, ``emit``: on saved models."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from depthpass.cli.inputs import read_text
from depthpass.cli.output import check_outputs, show, write_text
from depthpass.errors import InputError


def contraction(args: argparse.Namespace) -> int:
    import torch

    from depthpass.analysis.contraction import contraction
    from depthpass.hf.checkpoints.pretrained import from_pretrained

    rows = None if args.ids is None else _rows(args.ids)
    if not Path(args.checkpoint).is_dir():
        raise InputError(f"contraction: expected a folder that save_pretrained wrote, got {args.checkpoint!r}.")
    model: Any = from_pretrained(args.checkpoint)
    size = model.config.get_text_config(decoder=True).vocab_size
    if rows is None:
        ids = torch.randint(size, (args.batch, args.seq_len), generator=torch.Generator().manual_seed(0))
        print("note: random token ids; the rate depends on the text, give some with --ids", file=sys.stderr)
    else:
        ids = torch.tensor(rows)
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise InputError(f"--ids: expected token ids of 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}.")
    show(contraction(model, {"input_ids": ids, "labels": ids}, eps=args.eps, max_sweeps=args.max_sweeps), args.form)
    return 0


def search(args: argparse.Namespace) -> int:
    from depthpass.search.files import read_samples
    from depthpass.search.journal import Journal
    from depthpass.search.named import load_method
    from depthpass.search.run import search
    from depthpass.search.scores import load_score
    from depthpass.search.space import load_space

    check_outputs(args.plot, args.heat_map, args.resume)
    check_outputs(args.out, folders=True)
    text, space = read_text(args.samples, "samples"), load_space(_space(args.space))
    # Before a model is loaded, which may take long.
    load_method(args.method)
    load_score(args.score)
    if args.resume:
        Journal(args.resume)
    from depthpass.hf.checkpoints.folders import load_language_model, load_tokenizer

    samples = read_samples(text, args.samples, lambda: load_tokenizer(args.checkpoint))
    result = search(
        load_language_model(args.checkpoint), samples, score=args.score, space=space, method=args.method, budget=args.budget,
        seed=args.seed, per_sample=args.per_sample, held_out=args.held_out, batch=args.batch, resume=args.resume,
    )
    if args.out:
        result.save(args.out)
    if args.plot:
        write_text(args.plot, result.to_svg())
    if args.heat_map:
        write_text(args.heat_map, result.heat_map().to_svg())
    show(result, args.form)
    return 0


def _space(text: str) -> Any:
    import yaml

    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--space: expected a name or fields as YAML, got {text!r}: {error}.") from None


def _rows(path: str) -> list[list[int]]:
    """Rows of token ids from a JSON file."""
    try:
        rows = json.loads(read_text(path, "ids"))
    except json.JSONDecodeError as error:
        raise InputError(f"--ids: {path!r} is not JSON: {error}.") from None
    good = isinstance(rows, list) and rows and all(
        isinstance(r, list) and r and len(r) == len(rows[0]) and all(type(i) is int for i in r) for r in rows
    )
    if not good:
        raise InputError(f"--ids: expected {path!r} to hold a list of rows of equal length, each a list of token ids, as in "
                         "[[1, 5, 9], [1, 7, 2]].")
    return rows


def emit(args: argparse.Namespace) -> int:
    """A saved transformed model as plain transformers code."""
    out = Path(args.out)
    # Before the model is loaded.
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"--out: expected a folder that does not exist or is empty, got {args.out!r}. Nothing was written.")
    check_outputs(args.out.rstrip("/") + "/", folders=True)
    from depthpass.emit import emit
    from depthpass.hf.checkpoints.pretrained import from_pretrained

    try:
        model = from_pretrained(args.checkpoint)
    except OSError as error:
        raise InputError(f"emit: expected a folder that save_pretrained wrote, got {args.checkpoint!r}, which cannot be loaded: "
                         f"{error}") from None
    emit(model, out, name=args.name, copies=args.copies, source=args.checkpoint)
    if args.form == "json":
        print(json.dumps({"folder": args.out, "files": sorted(p.name for p in out.iterdir())}, indent=2))
    else:
        print(f"{args.out}: load it with from_pretrained({args.out!r}, trust_remote_code=True); depthpass is not needed.")
    return 0
