"""Specs: passes in Python, dicts, YAML and JSON, one versioned schema.

The full form is ``{"depthpass": 1, "passes": [{"pass": "turboconn", "group": 4}, ...]}``. A single mapping with a
``pass`` and a bare list of such mappings are read as well. Options that have their default value are left out when
a spec is written, so defaults are part of the schema version and do not change within one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from depthpass.annotations import describe
from depthpass.errors import SpecError, did_you_mean
from depthpass.limits import TEXT, shown
from depthpass.passes.base import Pass, default_of, options
from depthpass.passes.pipeline import as_passes
from depthpass.passes.registry import ALIASES, pass_class, pass_names

VERSION = 1
SUFFIXES = (".yaml", ".yml", ".json")

SpecLike = Pass | Sequence[Any] | Mapping[str, Any] | str | Path


def load_spec(source: SpecLike) -> tuple[Pass, ...]:
    """Read a spec from any of its forms.

    Args:
        source: a pass, a list of passes, a dict, a list of dicts (passes and dicts may be mixed), the path of a
            ``.yaml``, ``.yml`` or ``.json`` file, YAML or JSON text, or the name of a pass. A mergekit ``passthrough``
            config stands for its layer program.

    Returns:
        At least one pass, in order of application.

    Raises:
        SpecError: naming the field, what was expected, what was given and what to do.

    Example:
        >>> load_spec("{pass: turboconn, group: 8, preset: llama-1b}")[0].group
        8
    """
    if isinstance(source, Path):
        return load_spec(_read(source))
    if isinstance(source, str):
        return load_spec(_read(Path(source)) if _is_path(source) else _parse(source, "spec text"))
    if isinstance(source, Pass):
        return (source,)
    if isinstance(source, Mapping):
        entries = _entries(source)
    elif isinstance(source, list | tuple):
        entries = source
    else:
        raise SpecError(
            f"spec: expected a pass, a list of passes, a mapping, a path or YAML text, got {shown(source)} "
            f"({type(source).__name__}). Write for example TurboConn(group=4) or 'pass: turboconn'."
        )
    if not entries:
        raise SpecError("spec: expected at least one pass, got an empty spec. The pass 'identity' changes nothing.")
    return tuple(e if isinstance(e, Pass) else _build(e, i) for i, e in enumerate(entries))


def dump_spec(spec: SpecLike) -> dict[str, Any]:
    """The full form of a spec as plain data: what JSON and YAML can hold.

    Raises:
        SpecError: a pass is not in the registry, so nobody could load it again.
    """
    return {"depthpass": VERSION, "passes": [_dump_pass(p) for p in as_passes(load_spec(spec))]}


def spec_to_yaml(spec: SpecLike) -> str:
    """The full form as YAML text; ``load_spec`` reads it back to equal passes."""
    return yaml.dump(dump_spec(spec), Dumper=_Dumper, sort_keys=False, width=120)


def spec_to_json(spec: SpecLike) -> str:
    """The full form as JSON text; ``load_spec`` reads it back to equal passes."""
    return json.dumps(dump_spec(spec), indent=2) + "\n"


def spec_hash(spec: SpecLike) -> str:
    """16 hex digits that agree exactly when two specs are equal, whatever form they were written in."""
    canonical = json.dumps(dump_spec(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _entries(source: Mapping[str, Any]) -> Sequence[Any]:
    """The list of passes in a mapping: one pass, the full form, or a mergekit config."""
    if "slices" in source and "pass" not in source and "passes" not in source:
        from depthpass.passes.layer_program import LayerProgram

        return [LayerProgram.from_mergekit(source)]
    if "pass" in source:
        if "passes" in source or "depthpass" in source:
            raise SpecError("spec: expected either one mapping with 'pass' or the full form with 'passes', got both.")
        return [source]
    for key in source:
        if key not in ("depthpass", "passes"):
            near = did_you_mean(shown(key), ("depthpass", "passes", "pass"))
            if key in (*pass_names(), *ALIASES):
                near = f" Write 'pass: {key}' and its fields beside it."
            raise SpecError(f"spec: unknown field {shown(key)}.{near} Expected 'depthpass' (the version) "
                            "and 'passes', or one mapping with 'pass'.")
    version = source.get("depthpass", VERSION)
    if type(version) is not int or version < 1:
        raise SpecError(f"spec.depthpass: expected the schema version, at most {VERSION}, got {shown(version)}.")
    if version > VERSION:
        raise SpecError(f"spec.depthpass: this depthpass reads schema versions up to {VERSION}, got {version}. "
                        "Update depthpass.")
    passes = source.get("passes")
    if not isinstance(passes, list | tuple):
        raise SpecError(f"spec.passes: expected a list of passes, got {shown(passes)} ({type(passes).__name__}).")
    return passes


def _build(entry: Any, at: int) -> Pass:
    if not isinstance(entry, Mapping):
        raise SpecError(f"spec.passes[{at}]: expected a pass or a mapping with 'pass', got {shown(entry)} "
                        f"({type(entry).__name__}). Write for example {{'pass': 'turboconn', 'group': 4}}.")
    if "pass" not in entry:
        near = next((f" Did you mean 'pass' instead of {k!r}?" for k in entry if did_you_mean(str(k), ("pass",))), "")
        raise SpecError(f"spec.passes[{at}]: the field 'pass' with the name of the pass is missing; "
                        f"got {', '.join(map(repr, entry)) or 'an empty mapping'}.{near}")
    name = entry["pass"]
    if not isinstance(name, str):
        raise SpecError(f"spec.passes[{at}].pass: expected the name of a pass, got {shown(name)} ({type(name).__name__}).")
    cls = pass_class(name)
    known = {f.name: f for f in fields(cls)}
    given = {k: v for k, v in entry.items() if k != "pass"}
    for key in given:
        if key not in known:
            raise SpecError(f"{name}: unknown field {shown(key)}.{did_you_mean(shown(key), known)} "
                            f"Fields: {', '.join(known) or 'none'}.")
    for key, f in known.items():
        if key not in given and default_of(f) is MISSING:
            annotation = cls.field_types()[key]
            raise SpecError(f"{name}.{key}: expected {describe(annotation)}, got nothing. The field has no default.")
    return cls(**given)


def _dump_pass(p: Pass) -> dict[str, Any]:
    if pass_class(p.name) is not type(p):
        raise SpecError(f"pass {p.name!r}: expected the class that is registered under this name, got {type(p)!r}.")
    return {"pass": p.name, **{k: _plain(v) for k, v in options(p).items()}}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _is_path(text: str) -> bool:
    return "\n" not in text and text.lower().endswith(SUFFIXES)


def _read(path: Path) -> Any:
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(f"spec file {str(path)!r}: expected a name ending in {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        near = did_you_mean(path.name, _neighbours(path))
        raise SpecError(f"spec file {str(path)!r} cannot be read: {reason}.{near}") from None
    return _parse(text, f"spec file {str(path)!r}")


def _neighbours(path: Path) -> list[str]:
    folder = path.parent
    return [p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES] if folder.is_dir() else []


def _parse(text: str, where: str) -> Any:
    """Plain data from YAML or JSON text."""
    if len(text) > TEXT:
        raise SpecError(f"{where}: expected at most {TEXT} characters, got {len(text)}.")
    try:
        # JSON is YAML, except that YAML forbids tabs for indentation; spaces mean the same in JSON outside of
        # strings, and a raw tab inside a JSON string is not valid JSON.
        data = yaml.load(text.replace("\t", "  ") if text.lstrip()[:1] in ("{", "[") else text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: not valid YAML or JSON: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise SpecError(f"{where}: expected a list of passes, got mappings or lists hundreds of levels deep.") from None
    except ValueError as error:  # an integer of thousands of digits, a date that is none
        raise SpecError(f"{where}: a value cannot be read: {error}.") from None
    if data is None:
        raise SpecError(f"{where}: expected at least one pass, got an empty spec.")
    if isinstance(data, str) and (data in ALIASES or data in pass_names()):
        return {"pass": data}
    if not isinstance(data, dict | list):
        raise SpecError(
            f"{where}: expected a mapping with 'pass' or 'passes', or a list of passes, got {shown(data)}."
            f"{did_you_mean(data, (*pass_names(), *ALIASES)) if isinstance(data, str) else ''} "
            f"Write 'pass: turboconn' for a pass, or a path ending in {', '.join(SUFFIXES)} for a file."
        )
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-5 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by the parent with its own message
            if key.value in seen:
                problem = f"the field {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a signed exponent in a float; everybody else, JSON included, does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Block style for the spec, one line for lists of numbers."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        flat = all(not isinstance(v, dict) for v in sequence)
        return super().represent_sequence(tag, sequence, flow_style=flat)

    def ignore_aliases(self, data: Any) -> bool:
        return True
