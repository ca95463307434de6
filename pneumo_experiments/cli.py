"""The command line: one click command per entry point, its options read off the settings."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from pneumo_experiments import __version__
from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.interrupts import Terminated, handle_signals
from pneumo_experiments.settings import ENTRY_POINTS, NONE, Main, as_text, from_names
from pneumo_experiments.terminal import make_streams_unfailing

# Of the system: no room, no permission, a disk that cannot be written, a name that is too long.
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE, errno.EIO),
}
FULL_BYTES = 2**20


LONGEST_NAME = 255  # bytes, of a file or folder: the limit of all usual file systems
LONGEST_TEXT = 1000  # characters, of an address for example


class Number(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # older clicks take none
    """A finite number from ``least`` to ``most``."""

    def __init__(self, kind: type[int] | type[float], least: float | None, most: float | None) -> None:
        self.kind, self.least, self.most = kind, least, most
        self.name = "whole number" if kind is int else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            number = self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is not a {self.name}", param, ctx)
        if isinstance(number, float) and not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        if self.least is not None and number < self.least:
            self.fail(f"{value} is less than {self.least}", param, ctx)
        if self.most is not None and number > self.most:
            self.fail(f"{value} is more than {self.most}", param, ctx)
        return number


class PathOrNone(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A path; empty or ``none`` where there is none."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | None:
        if value in ("", NONE):
            return None
        try:
            path = Path(value).expanduser()
        except RuntimeError:  # no such user
            self.fail(f"{value!r} names the home of a user whom this machine does not know", param, ctx)
        if "\0" in str(path):
            self.fail(f"{value!r} holds a character that no path can have", param, ctx)
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if longest > LONGEST_NAME:
            self.fail(f"{value!r} has a name of {longest} bytes, more than {LONGEST_NAME}", param, ctx)
        return path


class Text(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """One line of text, of a ``form`` (regular expression, words) where one is given."""

    name = "text"

    def __init__(self, form: tuple[str, str] | None) -> None:
        self.form = form

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if self.form is not None and not re.fullmatch(self.form[0], value):
            self.fail(f"{value!r} is not {self.form[1]}", param, ctx)
        if len(value) > LONGEST_TEXT:
            self.fail(f"{value!r} has {len(value)} characters, more than {LONGEST_TEXT}", param, ctx)
        if not value.isprintable():  # line breaks, control characters, bytes that are not UTF-8
            self.fail(f"{value!r} holds characters that cannot be shown", param, ctx)
        return value


class Bool(click.types.BoolParamType):
    """True or false; nothing at all is neither."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail(f"{value!r} is not a valid boolean; give true or false", param, ctx)
        return super().convert(value, param, ctx)


def _type_of(f: Field[Any]) -> Any:
    if f.metadata["choices"]:
        return click.Choice(f.metadata["choices"])
    match str(f.type):
        case "int":
            return Number(int, f.metadata["least"], f.metadata["most"])
        case "float":
            return Number(float, f.metadata["least"], f.metadata["most"])
        case "bool":
            return Bool()
        case "Path" | "Path | None":
            return PathOrNone()
        case _:
            return Text(f.metadata["form"])


def _option_of(f: Field[Any], kind: type) -> click.Option:
    default = as_text(f.default)
    if kind is Main and f.metadata["sample"] is not None:
        default += f"; on the synthetic sample: {as_text(f.metadata['sample'])}"
    return click.Option(
        [f"--{f.name}"], type=_type_of(f), help=f"{f.metadata['meaning']}  [default: {default}]"
    )


def _command_of(name: str) -> click.Command:
    kind: type[Any] = ENTRY_POINTS[name]

    def call(**given: Any) -> None:
        # Options that were not given are None, and so is a path given as "none": both mean the default,
        # because the default of every optional path is none.
        chosen = {key: value for key, value in given.items() if value is not None}
        settings: Any = from_names(kind, chosen)
        stage = import_module(f"pneumo_experiments.stages.{name}")  # heavy libraries load only now
        run: Callable[[Any], object] = getattr(stage, name)
        run(settings)

    options: list[click.Parameter] = [_option_of(f, kind) for f in fields(kind)]
    return click.Command(
        name, params=options, callback=call, help=kind.__doc__, short_help=(kind.__doc__ or "").split("\n")[0]
    )


@click.group(
    help="Find and outline pneumothorax on chest radiographs: every step tracked with MLflow.",
    epilog="The same names work as `mlflow run . -e NAME -P setting=value`; without -e it is main.",
    context_settings={"max_content_width": 110},
)
@click.version_option(package_name=None, version=__version__)
def cli() -> None: ...


for _name in ENTRY_POINTS:
    cli.add_command(_command_of(_name))


@cli.command(short_help="Write MLproject anew from the settings.")
@click.argument("path", type=PathOrNone(), default="MLproject")
def mlproject(path: Path) -> None:
    """Write MLproject anew from the settings."""
    from pneumo_experiments.mlproject import mlproject_text

    path.write_text(mlproject_text(), encoding="utf-8")


def main() -> NoReturn:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    handle_signals()
    make_streams_unfailing()
    try:
        cli.main(prog_name="python -m pneumo_experiments", standalone_mode=False)
    except click.UsageError as error:
        _complain(_one_line(error))
        sys.exit(2)
    except (UserError, click.ClickException) as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _complain(_refused(error))
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # a bug of ours: click makes an Abort of it, too
            raise stop.__cause__ from None
        terminated = isinstance(stop.__cause__, Terminated)  # click makes an Abort of every interrupt
        _complain(f"stopped{' by SIGTERM' if terminated else ''}; the same command again does the rest")
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    sys.exit(0)


def _refused(error: OSError) -> str:
    """What the system refused that no stage has put into words of its own, and where."""
    if error.filename is not None:
        return f"{error.filename}: {reason_of(error)}; make room or choose another place"
    # A file that was open already: look where there is no room.
    places = {"the working directory": Path.cwd(), "TMPDIR": Path(tempfile.gettempdir())}
    full = [f"{name} {path}" for name, path in places.items() if shutil.disk_usage(path).free < FULL_BYTES]
    where = f" (full: {' and '.join(full)})" if full else ""
    return f"{reason_of(error)}{where}; make room or choose another place"


def _complain(message: str) -> None:
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {' '.join(message.split())}", err=True)


def _one_line(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx else "python -m pneumo_experiments"
    if isinstance(error, click.BadParameter) and error.param is not None:
        message = re.sub(r"\S{60,}", lambda found: found[0][:50] + "…", error.message)  # what a line can hold
        return f"{error.param.name}: {message}; see {path} --help"
    return f"{error.format_message().rstrip('.')}; see {path} --help"
