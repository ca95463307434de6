"""Downloads data from Kaggle, by the HTTP interface behind its own client.

That client can be pointed at fixed addresses only, so no test could run it; it looks for a token and may ask
Kaggle about it while it is imported, and it brings some 30 packages.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import requests
from requests.auth import AuthBase, HTTPBasicAuth

from pneumo_experiments.errors import UserError, reason_of
from pneumo_experiments.files import SUFFIX, file_name
from pneumo_experiments.progress_bar import ProgressBar

KAGGLE = "https://www.kaggle.com"  # KAGGLE_API_ENDPOINT names another server
ADDRESSES = {"datasets": "datasets/download", "competitions": "competitions/data/download-all"}
REFUSALS = {
    401: f"Kaggle does not accept the token (401); create a new one at {KAGGLE}/settings",
    403: f"Kaggle refuses it (403); open {KAGGLE}/{{source}} in a browser, with the account of the token,"
    " accept the rules, and run the command again",
    404: "Kaggle has nothing of that name, or does not show it to you (404); name another source",
}
TIMEOUT_SECONDS, CHUNK_BYTES = 60, 2**20


class _Token(AuthBase):
    """Kaggle's new kind of token; the old kind is a name and a key."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        r.headers["Authorization"] = f"Bearer {self._token}"
        return r


def read_token() -> AuthBase:
    """What identifies the user, from where Kaggle's client takes it; UserError if there is none."""
    values = {name: os.environ.get(f"KAGGLE_{name}", "").strip() for name in ("API_TOKEN", "USERNAME", "KEY")}
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path("~/.kaggle").expanduser())
    file = folder / "kaggle.json"
    try:
        if values["API_TOKEN"]:
            return _Token(values["API_TOKEN"])
        if not (values["USERNAME"] and values["KEY"]):
            if (folder / "access_token").is_file():
                return _Token((folder / "access_token").read_text(encoding="utf-8").strip())
            content = json.loads(file.read_bytes())
            values |= {"USERNAME": content["username"], "KEY": content["key"]}
        return HTTPBasicAuth(values["USERNAME"].encode(), values["KEY"].encode())
    except FileNotFoundError:
        raise UserError(
            f"no token for Kaggle; create one at {KAGGLE}/settings, and save it as {file}, or set"
            " KAGGLE_USERNAME and KAGGLE_KEY"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: the token cannot be read ({reason_of(error)})") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # without its text, which may be the token
        raise UserError(f"{file}: damaged; create a new token at {KAGGLE}/settings") from None


def download(source: str, folder: Path, token: AuthBase) -> Path:
    """The archive of a source, such as ``datasets/OWNER/NAME``, in the folder; at once if it is there.

    It goes on where an earlier process stopped, if the file on the server is still the same. Raises UserError
    if Kaggle refuses it or the connection breaks, OSError if it cannot be written.
    """
    name = file_name(source)
    if found := [*folder.glob(f"{name}.*.zip")]:
        return found[0]
    try:
        with _ask(source, token) as answer:
            size, tag = int(answer.headers.get("Content-Length", 0)), answer.headers.get("ETag", "")
            version = hashlib.sha256(f"{size} {tag}".encode()).hexdigest()[:16]
            part = folder / f"{name}.{version}{SUFFIX}"
            done = part.stat().st_size if tag and part.exists() else 0
            if not 0 < done <= size:
                _save(answer, source, part, 0)
        if 0 < done < size:
            with _ask(source, token, {"Range": f"bytes={done}-", "If-Range": tag}) as answer:
                goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
                _save(answer, source, part, done if goes_on else 0)
        if size and part.stat().st_size != size:
            raise requests.ConnectionError
    except requests.RequestException as error:  # its text may hold an address that gives access to the file
        raise UserError(
            f"source={source}: the connection to Kaggle failed ({type(error).__name__}); check the network,"
            " and run the command again: it goes on from there"
        ) from None
    return part.replace(part.with_suffix(".zip"))


def _ask(source: str, token: AuthBase, headers: dict[str, str] | None = None) -> requests.Response:
    """Kaggle's answer, whose content is still to be read."""
    kind, _, name = source.partition("/")
    server = os.environ.get("KAGGLE_API_ENDPOINT") or KAGGLE
    answer = requests.get(
        f"{server}/api/v1/{ADDRESSES[kind]}/{name}",
        auth=token,  # requests keeps it from the other server that stores the file
        headers={"Accept-Encoding": "identity"} | (headers or {}),
        stream=True,
        timeout=TIMEOUT_SECONDS,
    )
    if answer.status_code not in (200, 206):
        answer.close()
        busy = f"Kaggle answers with {answer.status_code}; run the command again later"
        raise UserError(f"source={source}: {REFUSALS.get(answer.status_code, busy).format(source=source)}")
    return answer


def _save(answer: requests.Response, source: str, path: Path, done: int) -> None:
    """Writes the answer behind the first ``done`` bytes of the file."""
    left = int(answer.headers.get("Content-Length", 0))
    total, before = (done + left) // CHUNK_BYTES, done // CHUNK_BYTES
    with (
        path.open("r+b" if done else "wb") as file,
        ProgressBar(source, total, " MiB", finished=before, is_kept=True) as bar,
    ):
        file.seek(done)
        for chunk in answer.iter_content(CHUNK_BYTES):
            file.write(chunk)
            bar.update()
