"""The command line: one click command per entry point, its options read off the settings."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
from click.core import ParameterSource

from pneumo_experiments import __version__
from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.interrupts import Interrupted, Terminated, handle_signals
from pneumo_experiments.settings import (
    CONFIG,
    DEMO,
    ENTRY_POINTS,
    NONE,
    Leaf,
    Main,
    Settings,
    as_text,
    from_flat,
    leaves,
    read_config,
)
from pneumo_experiments.terminal import make_streams_unfailing

# Of the system: no room, no permission, a disk that cannot be written, a name that is too long.
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE, errno.EIO),
}
FULL_BYTES = 2**20


LONGEST_NAME = 255  # bytes, of a file or folder: the limit of all usual file systems
LONGEST_TEXT = 1000  # characters, of an address for example


class WholeNumber(click.IntRange):
    """A whole number within limits."""

    name = "whole number"


class Number(click.FloatRange):
    """A number within limits; click's own range lets nan pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class PathType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A path; where it is optional, empty or ``none`` is None."""

    name = "path"

    def __init__(self, optional: bool) -> None:
        self.optional = optional

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | None:
        if value in ("", NONE):
            if self.optional:
                return None
            self.fail("give a path", param, ctx)
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
    """One line of text that matches ``pattern`` (regular expression, its meaning) where one is given."""

    name = "text"

    def __init__(self, pattern: tuple[str, str] | None) -> None:
        self.pattern = pattern

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if self.pattern is not None and not re.fullmatch(self.pattern[0], value):
            self.fail(f"{value!r} is not {self.pattern[1]}", param, ctx)
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


class EntryPoint(click.Command):
    """An entry point; its help shows the options by group."""

    headings: Mapping[str, str] = MappingProxyType({})  # by option name

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                sections.setdefault(self.headings.get(param.name or "", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _type_of(leaf: Leaf) -> Any:
    if get_origin(leaf.type) is Literal:
        return click.Choice(get_args(leaf.type))
    if leaf.type is bool:
        return Bool()
    if leaf.type is int:
        return WholeNumber(_whole(leaf.arg.min), _whole(leaf.arg.max))
    if leaf.type is float:
        return Number(leaf.arg.min, leaf.arg.max)
    if leaf.type is str:
        return Text(leaf.arg.pattern)
    return PathType(optional=leaf.type is not Path)


def _option_of(leaf: Leaf) -> click.Option:
    return click.Option(
        [f"--{leaf.name}"],
        type=_type_of(leaf),
        help=f"{leaf.arg.help}  [default: {as_text(leaf.default)}]",
        show_default=False,
    )


def _command_of(name: str) -> click.Command:
    kind: type[Any] = ENTRY_POINTS[name]

    @click.pass_context
    def call(ctx: click.Context, **_: Any) -> None:
        settings = resolve(ctx, kind)
        stage = import_module(f"pneumo_experiments.stages.{name}")  # heavy libraries load only now
        run: Callable[[Any], object] = getattr(stage, name)
        run(settings)

    config = click.Option(["--config"], type=PathType(optional=True), help=CONFIG.help + "  [default: none]")
    command = EntryPoint(
        name,
        params=[config, *map(_option_of, leaves(kind))],
        callback=call,
        help=kind.__doc__,
        short_help=(kind.__doc__ or "").split("\n")[0],
    )
    command.headings = {leaf.name: leaf.heading for leaf in leaves(kind) if leaf.heading}
    return command


def resolve(ctx: click.Context, kind: type[Settings]) -> Settings:
    """The settings of a command: an option beats the config file, the file beats the default."""
    given = {n for n in ctx.params if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    path: Path | None = ctx.params["config"]
    if kind is Main and path is None and ctx.params["dicom_dir"] is None and DEMO.is_file():
        click.echo(
            f"main: no dicom_dir and no config: synthetic radiographs, with {DEMO.parent.name}/{DEMO.name}"
        )
        path = DEMO
    types = {param.name: param for param in ctx.command.params}
    values: dict[str, Any] = {}
    for name, text in (read_config(path, kind) if path else {}).items():
        try:
            values[name] = types[name].type.convert(text, types[name], ctx)
        except click.BadParameter as error:
            raise UserError(f"config={path}: {name}: {error.message.rstrip('.')}") from None
    defaults = {leaf.name: leaf.default for leaf in leaves(kind) if leaf.arg.declared}
    for name in given - {"config"}:
        # `mlflow run` passes the defaults in MLproject like explicit choices: the config file beats these.
        is_passed_default = "MLFLOW_RUN_ID" in os.environ and name in defaults
        if not (name in values and is_passed_default and ctx.params[name] == defaults[name]):
            values[name] = ctx.params[name]
    return from_flat(kind, values)


def _whole(limit: float | None) -> int | None:
    return None if limit is None else int(limit)


def _underscored(word: str) -> str:
    return word.replace("-", "_")  # --learning-rate is --learning_rate


@click.group(
    help="Find and outline pneumothorax on chest radiographs: every step tracked with MLflow.",
    epilog="The same names work as `mlflow run . -e NAME -P setting=value`; without -e it is main.",
    context_settings={
        "max_content_width": 110,
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _underscored,
    },
)
@click.version_option(package_name=None, version=__version__)
def cli() -> None: ...


for _name in ENTRY_POINTS:
    cli.add_command(_command_of(_name))


@cli.command(short_help="Write MLproject from the settings.")
@click.argument("path", type=PathType(optional=False), default="MLproject")
def mlproject(path: Path) -> None:
    """Write MLproject from the settings."""
    from pneumo_experiments.mlproject import mlproject_text

    path.write_text(mlproject_text(), encoding="utf-8")


def main() -> NoReturn:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    handle_signals()
    make_streams_unfailing()
    try:
        cli.main(prog_name="python -m pneumo_experiments", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        _complain(_one_line(error))
        sys.exit(error.exit_code)
    except (UserError, click.ClickException) as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _complain(_refused(error))
        sys.exit(UserError.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # a bug of ours: click makes an Abort of it, too
            raise stop.__cause__ from None
        cause = stop.__cause__  # click makes an Abort of every interrupt
        how = " by SIGTERM" if isinstance(cause, Terminated) else ""
        _complain(f"stopped{how}; the same command again does the rest")
        sys.exit(cause.exit_code if isinstance(cause, Terminated) else Interrupted.exit_code)
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
    message = error.format_message()
    if isinstance(error, click.BadParameter) and error.param is not None:
        short = re.sub(r"\S{60,}", lambda match: match[0][:50] + "…", error.message)  # what a line can hold
        message = f"{error.param.name}: {short}"
    message = message.rstrip(". ")
    return f"{message} See {path} --help" if message.endswith("?") else f"{message}; see {path} --help"
