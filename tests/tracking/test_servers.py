"""Addresses of stores: passwords that must not be seen, folders whose names must be quoted."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from urllib.parse import quote_plus

import pytest
from command_server import CommandServer
from database_server import DatabaseServer
from helpers import environment, soak, working_in
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from pneumo_experiments import tracking
from pneumo_experiments.errors import UserError
from pneumo_experiments.passwords import hide_passwords
from pneumo_experiments.search.storage import open_storage
from pneumo_experiments.tracking.servers import check_address, with_driver

UNKNOWN = "postgresql://***"  # where the login cannot be told from a query
passwords = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.from_regex(
    r"[a-z/@:?#&=%; ]*(pass|pwd)?=?[@/]?[a-z]+", fullmatch=True
)


@given(passwords)
def test_no_piece_of_a_password_in_the_login_is_shown(password: str) -> None:
    hidden = hide_passwords(f"postgresql://me:{password}@host:5432/study?sslmode=require")
    assert hidden in ("postgresql://me:***@host:5432/study?sslmode=require", UNKNOWN)


@given(passwords, st.sampled_from(["password", "sslpassword", "PWD", "pass%77ord", "token", "secret"]))
def test_no_secret_of_a_query_is_shown(password: str, name: str) -> None:
    hidden = hide_passwords(f"postgresql://host/study?user=me&{name}={quote_plus(password)}&x=1")
    assert hidden == f"postgresql://host/study?user=me&{name}=***&x=1"


@given(st.text(st.characters(codec="ascii", exclude_characters=" &;\t\r\n\v\f\x1c\x1d\x1e\x1f")))
def test_an_unquoted_secret_of_a_query_is_not_shown_either(password: str) -> None:
    secret = f"Se{password}cr3t"
    assert "cr3t" not in hide_passwords(f"postgresql://host/study?user=me&password={secret}")
    assert "cr3t" not in hide_passwords(f"postgresql://me:{secret}@host/study?a=b")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        *(
            (same, same)
            for same in (
                "models:/pneumothorax@champion",
                "http://127.0.0.1:5000",
                "sqlite:///my%20project/mlflow.db",
                "postgresql://me@host/study?options=a@b",
                "C:/radiographs: no such folder; write to me@hospital.org",
            )
        ),
        (
            "Request to http://me:se/cr3t@host:1/api failed, postgresql://u:Se@cr3t@h/db?password=x (twice)",
            "Request to http://me:***@host:1/api failed, postgresql://u:***@h/db?password=*** (twice)",
        ),
        (f"{Path('postgresql://u:Secret@h/db')}: no such file", "postgresql:/u:***@h/db: no such file"),
    ],
)
def test_a_text_loses_the_passwords_of_its_addresses_and_nothing_else(text: str, hidden: str) -> None:
    assert hide_passwords(text) == hidden


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [
        ("postgresql://u:Se@cr3t@h/db", True),
        ("http://u:Se/cr3t@h:5000", True),
        ("http://u:12/cr3t@h:5000", True),
        ("https://u:Se?cr3t@h", True),
        ("http://u:Se[cr3t@h", True),
        ("postgresql://u@h:port/db", True),
        ("postgresql://u:Se/cr3t@h/db", False),
        ("http://u:Se@cr3t@h", False),
        *((other, False) for other in ("sqlite:///a@b", "./mlruns", "banana")),
    ],
)
def test_an_address_with_an_unquoted_password_is_refused(address: str, is_refused: bool) -> None:
    with pytest.raises(UserError, match=r"storage=.*%40") if is_refused else nullcontext() as error:
        check_address("storage", address)
    assert "cr3t" not in str(error and error.value)


@pytest.mark.parametrize(
    ("address", "opened"),
    [
        ("postgresql://u:x%40@h/db?a=b", "postgresql+psycopg://u:x%40@h/db?a=b"),
        ("postgres://h/db", "postgresql+psycopg://h/db"),
        *((each, each) for each in ("postgresql+psycopg2://h/db", "mysql://h/db", "sqlite:///x", "none")),
    ],
)
def test_an_address_of_postgresql_is_opened_with_psycopg_unless_it_names_a_driver(
    address: str, opened: str
) -> None:
    assert with_driver(address) == opened


@soak  # the stores and studies of other tests have such addresses
def test_a_store_and_a_study_open_at_an_address_without_driver(
    database: DatabaseServer, tmp_path: Path
) -> None:
    store, study = (database.create(name).replace("postgresql", "postgres", 1) for name in ("runs", "study"))
    assert open_storage(study).get_all_studies() == []
    with working_in(tmp_path, store):
        assert tracking.open_store() == "0"
    with working_in(tmp_path, study), pytest.raises(UserError, match="another program, or another version"):
        tracking.open_store()


@pytest.mark.parametrize("password", ["Se/cr3t", "Se@cr3t"])
@pytest.mark.parametrize("scheme", ["postgresql", "http"])
def test_a_store_that_does_not_open_is_named_without_its_password(
    scheme: str, password: str, tmp_path: Path
) -> None:
    address = f"{scheme}://u:{password}@127.0.0.1:9/db?user=u&password=cr3t"
    with (
        working_in(tmp_path, address),
        pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=.*\*\*\*") as error,
    ):
        tracking.open_store()
    assert "cr3t" not in str(error.value)
    assert "Se" not in str(error.value)


# Folders

# Logs one thing of each kind; prints where its artifacts lie, and what the model's address leads to.
LOGGING = """
from pathlib import Path
import mlflow
import numpy as np
from pneumo_experiments import tracking
from pneumo_experiments.settings import Sample
with tracking.run("sample", Sample()):
    tracking.log_json({"a": 1}, "sheets/a.json")
    tracking.log_image(np.zeros((4, 5, 3), np.uint8), "b.png")
    print(tracking.artifacts_of_active_run())
    made = Path("made")
    made.mkdir(exist_ok=True)
    (made / "model.json").write_text('{"here": 1}')
    address = tracking.log_model(made)
    print((tracking.model_data(address) / "model.json").read_text())
"""


def test_runs_artifacts_and_models_lie_in_a_folder_of_any_name(
    tmp_path: Path, commands: CommandServer
) -> None:
    name = "100% my lungé+#?{}%20"
    folder = tmp_path / name / "work"
    folder.mkdir(parents=True)
    command = commands.start("log", folder=folder, environment=environment(), code=LOGGING)
    code, said = command.communicate()
    assert code == 0, said
    artifacts, model = said.splitlines()[-2:]
    assert model == '{"here": 1}'
    assert artifacts.startswith(f"{folder}/mlruns/0/")
    assert (folder / artifacts / "sheets" / "a.json").is_file()
    assert (folder / artifacts / "b.png").is_file()
    assert (folder / "mlflow.db").is_file()
    # MLflow itself leaves an empty folder of the quoted name.
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} == {name}


def test_a_folder_whose_runs_would_lie_in_another_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "my%20project"
    folder.mkdir()
    with working_in(folder, "sqlite:///mlflow.db"):
        MlflowClient().search_experiments()  # as `mlflow run` creates the store before this program starts
        with pytest.raises(UserError, match=r"my%20project/mlruns/0: .* rename the folder"):
            tracking.open_store()
