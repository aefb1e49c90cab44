"""``passes``, ``presets``, ``completion``: what can be named."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from typing import Any

from depthpass.errors import InputError
from depthpass.prompt import listing


def passes(args: argparse.Namespace) -> int:
    """All passes with their options, or one of them with its documentation."""
    from depthpass.annotations import describe
    from depthpass.passes.base import Pass, default_of
    from depthpass.passes.registry import ALIASES, pass_class, pass_names

    def listed(cls: type[Pass]) -> dict[str, Any]:
        types = cls.field_types()
        options = {f.name: {"type": describe(types[f.name])} | ({} if default_of(f) is MISSING else {"default": default_of(f)})
                   for f in fields(cls)}
        short = [a for a, name in ALIASES.items() if name == cls.name]
        return {"pass": cls.name, "aliases": short, "what": (cls.__doc__ or "").strip().partition("\n")[0], "options": options}

    rows = [listed(pass_class(name)) for name in ([args.name] if args.name else pass_names())]
    if args.form == "json":
        print(json.dumps(rows, indent=2))
    elif args.name:
        print(f"{rows[0]['pass']}: {pass_class(args.name).__doc__}\nOptions")
        for name, option in rows[0]["options"].items():
            default = f", default {option['default']}" if "default" in option else ", required"
            print(f"  {name:<16} {option['type']}{default}")
    else:
        listing([(_title(p), p["what"]) for p in rows], last="\nOptions of one: depthpass passes NAME. In a spec: --spec mor, "
                "or --spec '{pass: loop, start: 1, end: 3}'.")
    return 0


def _title(listed: dict[str, Any]) -> str:
    return listed["pass"] + (f" ({', '.join(listed['aliases'])})" if listed["aliases"] else "")


def presets(args: argparse.Namespace) -> int:
    """The published layouts and search spaces that have names."""
    from depthpass.passes import turboconn_layout as layouts
    from depthpass.search import space as spaces

    layout = [{"name": name, "for": "--preset", "what": layouts.ABOUT[name], "options": options}
              for name, options in layouts.PRESETS.items()]
    space = [{"name": name, "for": "search --space", "what": spaces.ABOUT[name],
              "options": {f.name: getattr(options, f.name) for f in fields(options) if f.init}}
             for name, options in spaces.PRESETS.items()]
    if args.form == "json":
        print(json.dumps([*layout, *space], indent=2))
        return 0
    print("TurboConn layouts: report CONFIG --preset NAME")
    listing([(f"  {p['name']}", p["what"]) for p in layout])
    print("\nSearch spaces: search FOLDER --samples FILE --space NAME")
    listing([(f"  {p['name']}", p["what"]) for p in space], last="\nOptions of each: depthpass presets --json")
    return 0


def completion(args: argparse.Namespace) -> int:
    """A script for the shell: ``eval "$(depthpass completion bash)"``."""
    try:
        import shtab
    except ImportError:
        raise InputError("completion: expected shtab, which writes the script, to be installed. Run pip install "
                         "'depthpass[cli]'.") from None
    if args.shell not in shtab.SUPPORTED_SHELLS:
        raise InputError(f"completion: expected a newer shtab for {args.shell}, got one for {', '.join(shtab.SUPPORTED_SHELLS)}. "
                         "Run pip install -U 'depthpass[cli]'.")
    print(shtab.complete(args.parser(), args.shell))
    return 0
