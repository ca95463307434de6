"""What waits for the store: a file with a call per line, and copies of the files that the calls name.

Such a file may come from anywhere. Only what a run kept is read or removed, whatever the lines say.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

FILE = "calls.jsonl"
OURS = b'{"call": '  # how each line starts

Call = dict[str, Any]


def read(folder: Path, names: Container[str]) -> tuple[list[Call], list[bytes], bool]:
    """The calls of these names in the folder's file, the lines that are none, and whether the last is torn.

    The process that wrote a torn line was killed meanwhile; it is left out.
    """
    path = folder / FILE
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    torn = last.startswith(OURS)
    if last and not torn:
        lines.append(last)
    calls, foreign = list[Call](), list[bytes]()
    for line in lines:
        if (call := _call_in(line, names)) is not None:
            calls.append(call)
        else:
            foreign.append(line)
    return calls, foreign, torn


def _call_in(line: bytes, names: Container[str]) -> Call | None:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    call = cast("Call", found)
    return call if isinstance(call.get("call"), str) and call["call"] in names else None


def append(folder: Path, call: Call) -> None:
    """Adds a line to the folder's file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def write(folder: Path, calls: Iterable[Call], foreign: Iterable[bytes]) -> None:
    """Replaces the folder's file; with nothing to keep it goes, and so does the folder when it is empty."""
    lines = [*foreign, *(json.dumps(call).encode() for call in calls)]
    path = folder / FILE
    if not lines:
        path.unlink(missing_ok=True)
        _remove_if_empty(folder)
        return
    part = path.with_suffix(".part")
    part.write_bytes(b"".join(line + b"\n" for line in lines))
    part.replace(path)


def copy(folder: Path, path: Path) -> str:
    """A lasting copy of a file, as a path relative to the folder above, which may be moved."""
    place = folder / "files" / str(time.time_ns()) / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)
    return str(place.relative_to(folder.parent))


def model_folder(folder: Path, run_id: str) -> Path:
    """Where a model of the run waits, beside the folder."""
    return folder.with_name(f"model-{run_id}")


def arguments_of(folder: Path, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments; raises ValueError where it names a file that no run kept."""
    arguments = {name: value for name, value in call.items() if name != "call"}
    if "path" not in arguments:
        return arguments
    above, path = folder.parent, folder.parent / str(arguments["path"])
    places = folder / "files", model_folder(folder, str(arguments.get("run_id"))) / "data"
    # A link or .. on the way would lead elsewhere.
    inside = any(path.is_relative_to(place) and path != place for place in places)
    if not inside or path.resolve() != above.resolve() / path.relative_to(above):
        raise ValueError(f"{path} is not a file that the run kept")
    if any(each.is_symlink() for each in path.rglob("*")):
        raise ValueError(f"{path} holds a link, which no run made")
    return arguments | {"path": str(path)}


def remove_copy(folder: Path, call: Mapping[str, Any]) -> None:
    """Removes the copy that a call named, and the folders that this leaves empty."""
    if call["call"] == "artifact":
        path = Path(arguments_of(folder, call)["path"])
        path.unlink(missing_ok=True)
        for each in (path.parent, folder / "files", folder):
            _remove_if_empty(each)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # something else lies in it
        folder.rmdir()
