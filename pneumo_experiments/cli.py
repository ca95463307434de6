"""The command line: one click command per entry point, its options read off the settings."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from itertools import chain, product
from pathlib import Path
from subprocess import DEVNULL
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem, get_completion_class

from pneumo_experiments import __version__
from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.interrupts import Interrupted, Terminated, handle_signals
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.settings import (
    CONFIG,
    DEMO,
    EARLIER_NAMES,
    ENTRY_POINTS,
    NONE,
    Leaf,
    Main,
    Settings,
    Train,
    absolute,
    as_text,
    check_inputs,
    config_text,
    entry_points_with,
    find_config,
    from_flat,
    leaves,
    limits,
    parse,
    read_config,
    split_configs,
)
from pneumo_experiments.terminal import make_streams_unfailing, silence
from pneumo_experiments.words import some_of

# Of the system: no room, no permission, a disk that cannot be written, a name that is too long.
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE, errno.EIO),
}
FULL_BYTES = 2**20
SCRIPT = "pneumo"
END_GIVEN_RUN = (
    "import sys; from pneumo_experiments.tracking.runs import end_given_run as end; end(*sys.argv[1:])"
)
CONFIGS_HELP = "train once with each of these config files, on top of config; with commas between"
MAX_NAMED = 4  # settings of others in a config file


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


class Several(tuple[Any, ...]):
    """Values of one setting, for a training each."""


class SettingType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """What a setting accepts."""

    def __init__(self, leaf: Leaf, takes_several: bool = False) -> None:
        self.leaf, self.takes_several = leaf, takes_several
        kinds = {bool: "boolean", str: "text", int: "whole number", float: "number"}
        options = get_args(leaf.type) or (leaf.type,)
        self.name = "path" if Path in options else " or ".join(kinds.get(each, NONE) for each in options)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        is_choice = get_origin(self.leaf.type) is Literal
        return f"[{'|'.join(get_args(self.leaf.type))}]" if is_choice else None

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            if self.takes_several and "," in value:
                return Several(parse(self.leaf, text.strip()) for text in value.split(","))
            return parse(self.leaf, value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if self.name == "path" or self.leaf.arg.missing:
            return [CompletionItem(incomplete, type="file")]
        is_choice = get_origin(self.leaf.type) is Literal
        offered = get_args(self.leaf.type) if is_choice else self.leaf.arg.offered
        words = ("true", "false") if self.leaf.type is bool else offered
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _option_of(leaf: Leaf, kind: type) -> click.Option:
    is_place = Path in (get_args(leaf.type) or (leaf.type,)) or leaf.arg.names_file or leaf.arg.is_database
    takes_several = kind is Train and leaf.arg.shapes_weights and not is_place
    text = f"{leaf.arg.help}  [default: {as_text(leaf.default)}]"
    text += "" if leaf.arg.max is None else f"  [{limits(leaf.arg)}]"
    earlier = [f"--{name}" for name, now in EARLIER_NAMES.items() if now == leaf.name]
    return click.Option(
        [leaf.name, f"--{leaf.name}", *earlier], type=SettingType(leaf, takes_several), help=text
    )


def _switch(name: str, text: str) -> click.Option:
    # --name alone, and --name true as `mlflow run -P name=true` passes it.
    return click.Option(
        [f"--{name}"], type=bool, is_flag=False, flag_value=True, default=False, metavar="", help=text
    )


LEVELS = click.Choice(["debug", "info", "warning", "error"])
TERMINAL_OPTIONS = (  # what every entry point has besides its settings
    _switch("dry_run", "say what would be read, done and written, and end: no run, no file"),
    _switch("print_config", "print all settings as a config file, and end"),
    _switch("quiet", "show nothing but warnings and errors"),
    click.Option(["--log_level"], type=LEVELS, help="show what libraries log, from this level on"),
)


def _command_of(name: str) -> click.Command:
    kind: type[Any] = ENTRY_POINTS[name]

    @click.pass_context
    def call(ctx: click.Context, **_: Any) -> None:
        if level := ctx.params["log_level"]:
            logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")
            os.environ["MLFLOW_LOGGING_LEVEL"] = level.upper()  # it has a handler of its own
        is_asked_for = ctx.params["print_config"] or ctx.params["dry_run"]
        with silence() if ctx.params["quiet"] and not is_asked_for else nullcontext():
            each = resolve(ctx, kind)
            if ctx.params["print_config"]:
                click.echo("---\n".join(map(config_text, each)), nl=False)
                return
            for settings in each:
                check_inputs(settings)
            if ctx.params["dry_run"]:
                from pneumo_experiments.dry_run import lines

                for line in chain.from_iterable(lines(name, settings) for settings in each):
                    click.echo(line)
                return
            if sys.stdout.isatty():
                click.echo(f"{name}: starting")  # what follows takes seconds
            stage = import_module(f"pneumo_experiments.stages.{name}")  # heavy libraries load only now
            if len(each) > 1:
                stage.train_each(each)
                return
            run: Callable[[Any], object] = getattr(stage, name)
            run(each[0])

    several = [click.Option(["--configs"], help=CONFIGS_HELP)] if kind is Train else []
    command = EntryPoint(
        name,
        params=[*(_option_of(leaf, kind) for leaf in (CONFIG, *leaves(kind))), *several, *TERMINAL_OPTIONS],
        callback=call,
        help=kind.__doc__,
        short_help=(kind.__doc__ or "").split("\n")[0],
    )
    headings = {leaf.name: leaf.heading for leaf in leaves(kind) if leaf.heading}
    command.headings = headings | {option.name or "": "Terminal" for option in TERMINAL_OPTIONS}
    return command


def resolve(ctx: click.Context, kind: type[Settings]) -> list[Settings]:
    """The settings of a command: an option beats the config file, the file beats the default.

    Several only of train, whose settings may have a list of values: one for each combination. Their paths are
    absolute.
    """
    path: Path | None = ctx.params["config"]
    if kind is Main and path is None and ctx.params["dicom_dir"] is None and DEMO.is_file():
        _say(ctx, f"main: no dicom_dir and no config: synthetic radiographs, with {DEMO}")
        path = DEMO
    values = _read_configs(ctx, kind, split_configs(path) if path else [])
    paths = split_configs(Path(ctx.params["configs"])) if ctx.params.get("configs") else []
    several, each = [_read_configs(ctx, kind, [path]) for path in paths], list[Settings]()
    for one in several or [{}]:  # each on top of config
        given = _with_options(ctx, kind, values | one)
        given = {leaf.name: absolute(leaf, given.get(leaf.name, leaf.default)) for leaf in leaves(kind)}
        lists = {name: dict.fromkeys(value) for name, value in given.items() if isinstance(value, Several)}
        combinations = product(*lists.values())
        each += [from_flat(kind, given | dict(zip(lists, these, strict=True))) for these in combinations]
    return each


def _with_options(ctx: click.Context, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of config files, and the options that beat them."""
    chosen = dict(values)
    for leaf in leaves(kind):
        name, value = leaf.name, ctx.params[leaf.name]
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        # `mlflow run` passes the defaults in MLproject like explicit choices: the config file beats these.
        is_passed_default = "MLFLOW_RUN_ID" in os.environ and leaf.arg.declared and value == leaf.default
        if not (is_passed_default and name in values):
            chosen[name] = value
    return chosen


def _read_configs(ctx: click.Context, kind: type, paths: Sequence[Path]) -> dict[str, Any]:
    """The values in config files, of which a later one beats an earlier one; says where they were found."""
    values = dict[str, Any]()
    for path in paths:
        if (found := find_config(path)) != path:
            _say(ctx, f"{ctx.info_name}: config: {found}")
        own, others = read_config(found, kind)
        values |= own
        if others:
            named = [f"{name} (of {_names_of(entry_points_with(name))})" for name in others]
            theirs = some_of(named, MAX_NAMED)
            _say(ctx, f"{ctx.info_name}: config={found}: {ctx.info_name} does not use {theirs}")
    return values


def _say(ctx: click.Context, line: str) -> None:
    click.echo(line, err=ctx.params["print_config"])  # with that, stdout is a config file


def _names_of(entry_points: Sequence[str]) -> str:
    """Names with commas, and "and" before the last."""
    return " and ".join(filter(None, [", ".join(entry_points[:-1]), entry_points[-1]]))


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


@cli.command(short_help="Show the runs in the browser: MLflow's UI for the store in use.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="of this machine; by default a free one from 5000"
)
def ui(port: int | None) -> None:
    """Show the runs in the browser: MLflow's UI for the store in use, for this machine alone.

    Ctrl-C ends it.
    """
    click.echo("ui: starting MLflow's server")
    from pneumo_experiments.ui import serve

    for line in serve(port):
        click.echo(line)


@cli.command(short_help="Print what makes a shell complete names and values.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete names and values of the command pneumo.

    \b
    bash: add eval "$(pneumo completion bash)" to ~/.bashrc
    zsh:  add eval "$(pneumo completion zsh)" to ~/.zshrc
    fish: pneumo completion fish > ~/.config/fish/completions/pneumo.fish
    """  # noqa: D301 (click's own mark)
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, SCRIPT, f"_{SCRIPT.upper()}_COMPLETE").source())


def _program() -> str:
    """How the program was called."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m pneumo_experiments"


def main() -> NoReturn:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    handle_signals()
    make_streams_unfailing()
    given = os.environ.get("MLFLOW_RUN_ID", "")
    try:
        cli.main(prog_name=_program(), standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        _fail(_one_line(error), error.exit_code)
    except (UserError, click.ClickException) as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _fail(_refused(error), UserError.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # a bug of ours: click makes an Abort of it, too
            raise stop.__cause__ from None
        cause = stop.__cause__  # click makes an Abort of every interrupt
        how = " by SIGTERM" if isinstance(cause, Terminated) else ""
        line = f"Stopped{how}; the same command again does the rest"
        click.echo(line, err=True)
        _end_given_run("KILLED", line, given, wait=True)
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


def _fail(message: str, exit_code: int) -> NoReturn:
    text = hide_passwords(" ".join(message.split()))  # any setting may have been given an address
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {text}", err=True)
    _end_given_run("FAILED", text, os.environ.get("MLFLOW_RUN_ID", ""))  # "": a run of ours has begun in it
    sys.exit(exit_code)


def _end_given_run(status: str, reason: str, run_id: str, wait: bool = False) -> None:
    """Ends the run that `mlflow run` created for this process; ``wait``: not before `mlflow run` has ended.

    In a new process: the import of MLflow in this one may have been interrupted, and cannot be repeated.
    """
    option = "--mlflow_pid"
    if not run_id or option not in sys.argv:
        return
    mlflow_pid = sys.argv[sys.argv.index(option) + 1] if wait else ""
    command = [sys.executable, "-P", "-c", END_GIVEN_RUN, run_id, status, reason, mlflow_pid]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with suppress(OSError):  # the reason stands on the terminal
        ending = subprocess.Popen(
            command, env=environment, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )
        if not wait:
            ending.wait()


def _one_line(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx else _program()
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and error.ctx:
        setting = error.option_name.lstrip("-")
        if owners := entry_points_with(setting):
            message = f"{setting} is a setting of {_names_of(owners)}, not of {error.ctx.info_name}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        text = error.message or "missing"
        short = re.sub(r"\S{60,}", lambda match: match[0][:50] + "…", text)  # what a line can hold
        message = f"{error.param.name}: {short}"
    message = message.rstrip(". ")
    return f"{message} See {path} --help" if message.endswith("?") else f"{message}; see {path} --help"
