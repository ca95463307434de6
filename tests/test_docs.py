"""README and docs say what is so: links lead somewhere, commands and settings exist, blocks can be read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from mlflow.projects._project_spec import load_project

from pneumo_experiments import __version__
from pneumo_experiments.mlproject import mlproject_text
from pneumo_experiments.search.space import search_space
from pneumo_experiments.settings import CONFIG, ENTRY_POINTS, Recipe, StudySettings, leaves, parse

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS]
SETTINGS = {
    name: {leaf.name: leaf for leaf in (CONFIG, *leaves(kind))} for name, kind in ENTRY_POINTS.items()
}
EVERY = {name: leaf for settings in SETTINGS.values() for name, leaf in settings.items()}
# Of every command, and commands that are no entry points.
FLAGS = {"dry_run", "print_config", "quiet", "help"}
OTHERS = {"ui", "completion", "mlproject", "NAME"}
# `name=value` in a sentence that is no setting: a tag, a line of a table, an argument of MONAI.
NO_SETTINGS = {"project", "sep", "ignore_empty"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[str]:
    for indent, text in re.findall(
        rf"^( *)```{language}\n(.*?)^ *```$", text_of(page), re.MULTILINE | re.DOTALL
    ):
        yield re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    without_blocks = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks)]


def commands(page: Path) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Each command of this program in blocks and sentences: the line, its entry point, its settings."""
    lines = [line for text in blocks(page, "(?:sh|ini)") for line in text.replace("\\\n", " ").splitlines()]
    start = r"(?:^|&& |srun |bin/|experiments +)pneumo |-m pneumo_experiments |(?=mlflow run )"
    for line in [*lines, *inline_code(page)]:
        if not (match := re.search(start, line)):
            continue
        words = shlex.split(line[match.end() :], comments=True)
        if words[0] == "mlflow":
            name = words[words.index("-e") + 1] if "-e" in words else "main"
            given = [word.partition("=")[::2] for flag, word in pairwise(words) if flag == "-P"]
        else:
            name = words[0]
            given = [(word[2:], value) for word, value in pairwise([*words, ""]) if word.startswith("--")]
        yield line, name, [(setting.replace("-", "_"), value) for setting, value in given]


def anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_a_page() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_entry_points_and_their_settings(page: Path) -> None:
    for line, name, given in commands(page):
        if name in OTHERS or name.startswith("-"):
            continue
        assert name in SETTINGS, line
        for setting, value in given:
            if setting in FLAGS:
                continue
            assert setting in SETTINGS[name], f"{line}: {setting}"
            if not re.search(r"…|[A-Z]{4}", value):  # what the reader fills in
                parse(SETTINGS[name][setting], value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_sentences_exist(page: Path) -> None:
    for code in inline_code(page):
        if match := re.fullmatch(r"([a-z]\w*)=(\S+)", code):
            name, value = match.groups()
            if name in NO_SETTINGS:
                continue
            assert name in EVERY, f"{page.name}: {code}"
            if not re.search(r"…|[A-Z]", value):
                parse(EVERY[name], value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_yaml_and_json_can_be_read(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")
    for text in blocks(page, "json"):
        json.loads(text)
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)
    for text in blocks(page, "sh"):
        for config in re.findall(r"<<'YAML'\n(.*?)^YAML$", text, re.MULTILINE | re.DOTALL):
            for name, value in yaml.safe_load(config).items():
                parse(EVERY[name], str(value))


def test_the_example_of_a_search_space_is_one(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs/search.md", "yaml")
    (tmp_path / "space.yaml").write_text(text, encoding="utf-8")
    searched = yaml.safe_load(text)
    settings = StudySettings(space=tmp_path / "space.yaml", searched=",".join(searched))
    assert search_space(settings, Recipe()).keys() == searched.keys()


def test_figures_in_the_readme_are_those_of_a_benchmark() -> None:
    text = re.sub(r"mlflow==\S+|License \S+|Python \S+|Licence.*|1e-4", "", text_of(ROOT / "README.md"))
    figures = set(re.findall(r"\d+\.\d+", text))
    printed = set(re.findall(r"\d+\.\d+", text_of(ROOT / "docs/benchmarks.md")))
    assert figures - printed <= {"3.1", "3.5", "4.0"}  # minutes and GB, there in seconds and hundredths


class Outside(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        addresses = [value or "" for name, value in attrs if name in {"src", "href"} and tag != "a"]
        self.found += [address for address in addresses if re.match(r"(https?:)?//", address)]


def test_the_site_is_built_strictly_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {page.stem for page in DOCS} <= {page.stem for page in tmp_path.glob("*.html")}
    reader = Outside()
    for page in tmp_path.glob("*.html"):
        reader.feed(page.read_text(encoding="utf-8"))
    assert reader.found == []
    styles = "".join(style.read_text(encoding="utf-8") for style in tmp_path.rglob("*.css"))
    assert not re.search(r"url\(\W?(https?:)?//|@import", styles)


def test_the_image_gets_only_what_the_dockerfile_copies() -> None:
    lines = text_of(ROOT / "Dockerfile").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    ignored = text_of(ROOT / ".dockerignore").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and all((ROOT / name).exists() for name in copied)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["pneumo"]


def test_mlproject_of_an_image_starts_the_same_commands_in_it(tmp_path: Path) -> None:
    (tmp_path / "MLproject").write_text(mlproject_text("registry.example/pneumo:1"), encoding="utf-8")
    inside, here = load_project(str(tmp_path)), load_project(str(ROOT))
    assert inside.docker_env == {"image": "registry.example/pneumo:1"}
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", inside.name)  # Kubernetes names the job after it
    for name in ENTRY_POINTS:
        command = inside.get_entry_point(name).command
        assert command == here.get_entry_point(name).command.replace(" --mlflow_pid $PPID", "")
        assert inside.get_entry_point(name).parameters.keys() == here.get_entry_point(name).parameters.keys()


def test_the_citation_names_the_version_and_the_licence() -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])


def test_issue_forms_ask_for_no_patient_data() -> None:
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(text_of(path))
        boxes = [field for field in form["body"] if field["type"] == "checkboxes"]
        assert form["name"] and form["description"]
        assert all(option["required"] for box in boxes for option in box["attributes"]["options"])
        assert "No patient data" in form["body"][0]["attributes"]["value"]
