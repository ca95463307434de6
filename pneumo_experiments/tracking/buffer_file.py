"""The buffer on disk: ``calls.jsonl`` with one call per line, and copies of the files that the calls name.

The file may come from anywhere: only copies that a run made are read or removed, whatever its lines say.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pneumo_experiments.files import write_atomically

FILE = "calls.jsonl"
LINE_START = b'{"call": '

Call = dict[str, Any]


def read(folder: Path, names: Container[str]) -> tuple[list[Call], list[bytes], bool]:
    """The calls with these names in the folder's file, invalid lines, whether the last line is incomplete.

    An incomplete last line is left out: its process was killed while it wrote.
    """
    path = folder / FILE
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    is_incomplete = last.startswith(LINE_START)
    if last and not is_incomplete:
        lines.append(last)
    calls, invalid = list[Call](), list[bytes]()
    for line in lines:
        if (call := _call_in(line, names)) is not None:
            calls.append(call)
        else:
            invalid.append(line)
    return calls, invalid, is_incomplete


def _call_in(line: bytes, names: Container[str]) -> Call | None:
    try:
        content: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    call = cast("Call", content)
    return call if isinstance(call.get("call"), str) and call["call"] in names else None


def append(folder: Path, call: Call) -> None:
    """Adds a line to the folder's file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def write(folder: Path, calls: Iterable[Call], invalid: Iterable[bytes]) -> None:
    """Replaces the folder's file; without lines removes it, and the folder if that is then empty."""
    lines = [*invalid, *(json.dumps(call).encode() for call in calls)]
    path = folder / FILE
    if not lines:
        path.unlink(missing_ok=True)
        _remove_if_empty(folder)
        return
    with write_atomically(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))


def copy(folder: Path, path: Path) -> str:
    """Copies a file into the buffer; returns the path relative to the parent of ``folder``."""
    target = folder / "files" / str(time.time_ns()) / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
    return str(target.relative_to(folder.parent))


def model_folder(folder: Path, run_id: str) -> Path:
    """Where a model of the run is buffered, beside the folder."""
    return folder.with_name(f"model-{run_id}")


def arguments_of(folder: Path, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments; raises ValueError if it names a file that no run buffered."""
    arguments = {name: value for name, value in call.items() if name != "call"}
    if "path" not in arguments:
        return arguments
    parent, path = folder.parent, folder.parent / str(arguments["path"])
    allowed = folder / "files", model_folder(folder, str(arguments.get("run_id"))) / "data"
    is_inside = any(path.is_relative_to(root) and path != root for root in allowed)
    # A link or .. in the path would lead elsewhere.
    if not is_inside or path.resolve() != parent.resolve() / path.relative_to(parent):
        raise ValueError(f"{path} is not a buffered file")
    if any(each.is_symlink() for each in path.rglob("*")):
        raise ValueError(f"{path} contains a symbolic link")
    return arguments | {"path": str(path)}


def remove_copy(folder: Path, call: Mapping[str, Any]) -> None:
    """Removes the copy of a file that a call names, and folders that are then empty."""
    if call["call"] == "artifact":
        path = Path(arguments_of(folder, call)["path"])
        path.unlink(missing_ok=True)
        for each in (path.parent, folder / "files", folder):
            _remove_if_empty(each)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty
        folder.rmdir()
