"""A folder of files that is replaced whole or not at all: by a save that fails, and by one that is killed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from depthpass.errors import InputError

WEIGHTS = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")
_STAGE = re.compile(r"\.saving-([0-9a-f]+)-(\d+)-\w+")
_PLAN = "plan.json"

_running: set[str] = set()
"""Stages of this process that are being written."""


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to write a checkpoint to, whose files replace those of ``directory`` if nothing fails.

    Weight files of an earlier save that the new one does not overwrite are removed: a stale ``model.safetensors``
    would be loaded in place of new shards. Old files are kept aside until the last new one is in place, and go back where
    anything fails. ``config.json`` leaves first and comes last, so that what a killed save leaves is no checkpoint at all;
    :func:`recover` brings the old one back.

    Raises:
        InputError: ``directory`` is a file.
    """
    target = Path(directory)
    if target.is_file():
        raise InputError(f"save_directory: expected a folder, got the file {str(directory)!r}.")
    new_folders = _missing(target)
    stage: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        recover(target)
        # Inside the target: surely the same file system, so that every file moves in one step.
        stage = Path(tempfile.mkdtemp(prefix=f".saving-{_host()}-{os.getpid()}-", dir=target))
        _running.add(str(stage))
        new = stage / "new"
        new.mkdir()
        yield new
        _swap(stage, target)
    except BaseException:
        if stage is not None and _planless(stage):  # with a plan it still holds old files
            _insist(lambda: _remove(stage))
        for folder in new_folders:
            _insist(lambda folder=folder: folder.rmdir() if folder.is_dir() and not any(folder.iterdir()) else None)
        raise
    finally:
        _running.discard(str(stage))
    # The new files are in place: what is left of the old ones is no reason to fail.
    assert stage is not None
    _insist(functools.partial(_remove, stage))


def recover(target: Path) -> bool:
    """Undo what a killed save has begun in a folder, and remove what it has left.

    Returns:
        whether files were brought back.

    Raises:
        OSError: the folder cannot be written.
    """
    undone = False
    for stage in interrupted(target):
        plan = stage / _PLAN
        if _there(plan):
            undone = True
            _undo(stage, target, **json.loads(plan.read_text()))
        _remove(stage)
    return undone


def interrupted(target: Path) -> list[Path]:
    """Stages of saves into a folder that have been killed; not those that are still being written, here or elsewhere."""
    if not target.is_dir():
        return []
    stages = []
    for name in sorted(os.listdir(target)):
        stage, match = target / name, _STAGE.fullmatch(name)
        if match and stage.is_dir() and not (_alive(int(match[2]), str(stage)) if match[1] == _host() else _fresh(stage)):
            stages.append(stage)
    return stages


def _fresh(stage: Path) -> bool:
    """Whether another machine may still be writing: something has changed within the hour."""
    return time.time() - max(f.stat().st_mtime for f in (stage, *stage.rglob("*"))) < 3600


def _alive(process: int, stage: str) -> bool:
    if process == os.getpid():
        return stage in _running
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _swap(stage: Path, target: Path) -> None:
    """Put the new files in place of the old ones; undone where anything fails."""
    new, old = stage / "new", stage / "old"
    names = _files(new)
    leaving = [n for n in names if _there(target / n)]
    if any(WEIGHTS.fullmatch(n) for n in names):
        leaving += [n for n in os.listdir(target) if WEIGHTS.fullmatch(n) and n not in names]
    names.sort(key=_last)
    leaving.sort(key=_last, reverse=True)
    inner = {str(f) for n in names for f in Path(n).parents if str(f) != "." and not _there(target / f)}
    plan = {"names": names, "leaving": leaving, "folders": sorted(inner, reverse=True)}
    draft = stage / (_PLAN + ".draft")
    draft.write_text(json.dumps(plan))
    os.replace(draft, stage / _PLAN)
    try:
        for name in leaving:
            _move(target / name, old / name)
        for name in names:
            _move(new / name, target / name)
        os.unlink(stage / _PLAN)  # from here on it is done
    except BaseException:
        _insist(lambda: _undo(stage, target, **plan))
        raise


def _last(name: str) -> tuple[int, str]:
    """Weights before what names them, and the config last of all."""
    return (2 if name == "config.json" else 1 if name.endswith(".json") else 0, name)


def _undo(stage: Path, target: Path, names: list[str], leaving: list[str], folders: list[str]) -> None:
    """Bring old files back and take new ones away; may be begun again wherever it stopped."""
    new, old = stage / "new", stage / "old"
    for name in sorted(set(names) - set(leaving), key=_last, reverse=True):
        if not _there(new / name) and _there(target / name):
            os.unlink(target / name)
    for name in sorted(leaving, key=_last):
        if _there(old / name):
            _move(old / name, target / name)
    for name in folders:
        if _there(target / name):
            os.rmdir(target / name)
    if _there(stage / _PLAN):
        os.unlink(stage / _PLAN)


def _move(source: Path, goal: Path) -> None:
    if not _there(goal.parent):
        os.makedirs(goal.parent, exist_ok=True)
    os.replace(source, goal)


def _there(path: Path) -> bool:
    """Whether something is there; pathlib takes every error for a no."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _files(folder: Path, inside: str = "") -> list[str]:
    """Files of a folder and its folders, relative to it; pathlib leaves out what it cannot list."""
    names = []
    with os.scandir(folder / inside) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = os.path.join(inside, entry.name)
            names += _files(folder, name) if entry.is_dir(follow_symlinks=False) else [name]
    return names


def _remove(folder: Path) -> None:
    if _there(folder):
        shutil.rmtree(folder)


def _insist(action: Callable[[], None], times: int = 3) -> None:
    """Clean up, also where one attempt fails; what cannot be cleaned up does not hide why it had to be."""
    for _ in range(times):
        try:
            return action()
        except OSError:
            continue
    return None


def _planless(stage: Path) -> bool:
    answers: list[bool] = []
    _insist(lambda: answers.append(not _there(stage / _PLAN)))
    return answers == [True]


def _missing(target: Path) -> list[Path]:
    """Folders that saving makes, the innermost first."""
    return [folder for folder in (target, *target.parents) if not _there(folder)]
