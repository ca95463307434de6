"""The command line: one click command per entry point, its options read off the settings."""

from __future__ import annotations

import errno
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
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import (
    CONFIG,
    DEMO,
    ENTRY_POINTS,
    NONE,
    Leaf,
    Main,
    Settings,
    absolute,
    as_text,
    from_flat,
    leaves,
    limits,
    parse,
    read_config,
)
from pneumo_experiments.terminal import make_streams_unfailing

# Of the system: no room, no permission, a disk that cannot be written, a name that is too long.
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE, errno.EIO),
}
FULL_BYTES = 2**20


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


class SettingType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """What a setting accepts."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        kinds = {bool: "boolean", str: "text", int: "whole number", float: "number"}
        options = get_args(leaf.type) or (leaf.type,)
        self.name = "path" if Path in options else " or ".join(kinds.get(each, NONE) for each in options)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        is_choice = get_origin(self.leaf.type) is Literal
        return f"[{'|'.join(get_args(self.leaf.type))}]" if is_choice else None

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse(self.leaf, value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _option_of(leaf: Leaf) -> click.Option:
    text = f"{leaf.arg.help}  [default: {as_text(leaf.default)}]"
    text += "" if leaf.arg.max is None else f"  [{limits(leaf.arg)}]"
    return click.Option([f"--{leaf.name}"], type=SettingType(leaf), help=text)


def _command_of(name: str) -> click.Command:
    kind: type[Any] = ENTRY_POINTS[name]

    @click.pass_context
    def call(ctx: click.Context, **_: Any) -> None:
        settings = resolve(ctx, kind)
        stage = import_module(f"pneumo_experiments.stages.{name}")  # heavy libraries load only now
        run: Callable[[Any], object] = getattr(stage, name)
        run(settings)

    command = EntryPoint(
        name,
        params=[_option_of(leaf) for leaf in (CONFIG, *leaves(kind))],
        callback=call,
        help=kind.__doc__,
        short_help=(kind.__doc__ or "").split("\n")[0],
    )
    command.headings = {leaf.name: leaf.heading for leaf in leaves(kind) if leaf.heading}
    return command


def resolve(ctx: click.Context, kind: type[Settings]) -> Settings:
    """The settings of a command: an option beats the config file, the file beats the default.

    Their paths are absolute.
    """
    given = {n for n in ctx.params if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    path: Path | None = ctx.params["config"]
    if kind is Main and path is None and ctx.params["dicom_dir"] is None and DEMO.is_file():
        click.echo(f"main: no dicom_dir and no config: synthetic radiographs, with {DEMO}")
        path = DEMO
    if path and not path.exists() and (own := DEMO.parents[1] / path).is_file():
        path = own  # the project has it, and `mlflow run` was called elsewhere
        click.echo(f"{ctx.info_name}: config: {path}")
    values = read_config(path, kind) if path else {}
    defaults = {leaf.name: leaf.default for leaf in leaves(kind) if leaf.arg.declared}
    for name in given - {"config"}:
        # `mlflow run` passes the defaults in MLproject like explicit choices: the config file beats these.
        is_passed_default = "MLFLOW_RUN_ID" in os.environ and name in defaults
        if not (name in values and is_passed_default and ctx.params[name] == defaults[name]):
            values[name] = ctx.params[name]
    return from_flat(
        kind, {leaf.name: absolute(leaf, values.get(leaf.name, leaf.default)) for leaf in leaves(kind)}
    )


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
@click.option("--mlflow_pid", hidden=True)
@click.version_option(package_name=None, version=__version__)
def cli(mlflow_pid: str | None) -> None:
    """Relative paths are those of the folder where `mlflow run` was called.

    MLflow starts this process in the project's folder, a temporary one for a project from git, and says
    nowhere what its own was. MLproject passes ``mlflow_pid``: the working directory of that process tells.
    """
    if mlflow_pid is None:
        return
    import psutil

    try:
        os.chdir(psutil.Process(int(mlflow_pid)).cwd())
        os.environ["PYTHONSAFEPATH"] = "1"  # our own processes import nothing from there
    except (OSError, ValueError, psutil.Error) as error:
        click.echo(f"relative paths are of {Path.cwd()}: no working directory of `mlflow run` ({error})")


for _name in ENTRY_POINTS:
    cli.add_command(_command_of(_name))


@cli.command(short_help="Write MLproject from the settings.")
@click.argument("path", type=click.Path(path_type=Path), default="MLproject")
@click.option("--image", help="container image in which `mlflow run` starts the commands")
def mlproject(path: Path, image: str | None) -> None:
    """Write MLproject from the settings."""
    from pneumo_experiments.mlproject import mlproject_text

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(mlproject_text(image), encoding="utf-8")


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
    text = hide_passwords(" ".join(message.split()))  # any setting may have been given an address
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {text}", err=True)


def _one_line(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx else "python -m pneumo_experiments"
    message = error.format_message()
    if isinstance(error, click.BadParameter) and error.param is not None:
        short = re.sub(r"\S{60,}", lambda match: match[0][:50] + "…", error.message)  # what a line can hold
        message = f"{error.param.name}: {short}"
    message = message.rstrip(". ")
    return f"{message} See {path} --help" if message.endswith("?") else f"{message}; see {path} --help"
