"""Config files: settings by their flat names, in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.settings.entry_points import ENTRY_POINTS
from pneumo_experiments.settings.fields import (
    Arg,
    Leaf,
    as_config,
    as_text,
    as_texts,
    leaves,
    no_setting,
    parse,
    renamed,
)

CONFIG_HELP = (
    "YAML file of settings by name, or one that ships with the package: {}; of several with commas"
    " between, a later one beats an earlier one; an option beats the file, the file beats the default"
)
CONFIGS = Path(__file__).parents[1] / "configs"  # files that ship with the package
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
CONFIG_ARG = Arg(CONFIG_HELP.format(", ".join(PRESETS)), declared=True)
CONFIG = Leaf("config", Path | None, CONFIG_ARG, None)  # of every entry point
DEMO = CONFIGS / "demo.yaml"  # main uses it when neither data nor a config file are given
MAX_BYTES = 2**20


def entry_points_with(setting: str) -> list[str]:
    """The entry points that have a setting of this name."""
    return [name for name, kind in ENTRY_POINTS.items() if any(leaf.name == setting for leaf in leaves(kind))]


def split_configs(paths: Path) -> list[Path]:
    """The config files of a setting that takes several with commas between."""
    if paths.is_file():
        return [paths]
    return [Path(text.strip()).expanduser() for text in str(paths).split(",")]


def find_config(path: Path) -> Path:
    """The file; where there is none, that of the package which is called so: demo, or configs/demo.yaml."""
    if not path.name:  # a folder, such as . or /
        return path
    own = CONFIGS / path.with_suffix(".yaml").name
    is_own = not path.is_file() and str(path.parent) in (".", CONFIGS.name) and own.is_file()
    return own if is_own else path


def read_config(path: Path, kind: type) -> tuple[dict[str, Any], list[str]]:
    """The values of an entry point's settings in a file, by name; and the names of settings of others alone.

    Raises UserError for a file that cannot be read, is not a mapping of names to single values, or has a name
    that no entry point knows or a value that the setting does not accept.
    """
    own, values, others = {leaf.name: leaf for leaf in leaves(kind)}, dict[str, Any](), list[str]()
    if not path.exists() and not path.suffix:
        raise UserError(f"config={path}: no such file, and none of {', '.join(PRESETS)}")
    for name, value in read_yaml("config", path, "epochs: 12").items():
        if not entry_points_with(name):
            known = {leaf.name for each in ENTRY_POINTS.values() for leaf in leaves(each)}
            raise UserError(f"config={path}: {no_setting(name, known)}")
        if isinstance(value, dict | list | tuple | set):
            raise UserError(f"config={path}: {name}: give one value, not several")
        if name in own:
            try:
                values[name] = parse(own[name], as_text(value))
            except ValueError as error:
                raise UserError(f"config={path}: {name}: {error}") from None
        else:
            others.append(name)
    return values, others


def config_text(settings: object) -> str:
    """The settings of an entry point as a config file; one whose value holds a password is a comment."""
    values, texts = as_config(settings), as_texts(settings)
    hidden = [name for name, value in values.items() if as_text(value) != texts[name]]
    lines = [f"# {name}: {values.pop(name)}  # the password is not shown" for name in hidden]
    return "\n".join([yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), *lines, ""])


def read_yaml(setting: str, path: Path, example: str) -> dict[str, object]:
    """What a YAML file says of settings, by the names that these have now.

    ``setting`` names the file, and ``example`` is a line of such a file.
    Raises UserError for a file that cannot be read or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{setting}={path}: cannot be read ({reason_of(error)}); name a YAML file of settings"
        ) from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{setting}={path}: more than {MAX_BYTES:,} bytes; name a YAML file of settings")
    try:
        loaded: object = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{setting}={path}: not valid YAML ({reason})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{setting}={path}: not a mapping; write lines such as `{example}`")
    return renamed({str(name): value for name, value in cast("dict[object, object]", loaded).items()})
