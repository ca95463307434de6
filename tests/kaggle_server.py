"""Stands for Kaggle on this machine: its interface, and beside it the server that stores the files.

The interface wants a token and sends whoever has one on to the other server, by an address that is secret.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, KEY, BEARER = "somebody", "0f1e2d3c4b5a", "KGAT_aabbccdd"
SECRET = "signature-5a5a5a"
TOKENS = {f"Basic {base64.b64encode(f'{USER}:{KEY}'.encode()).decode()}", f"Bearer {BEARER}"}


@dataclass
class Kaggle:
    """What it holds and does, which tests change, and what it was asked for."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # by source
    refusals: dict[str, int] = field(default_factory=dict)  # status by source
    tag: str = '"1"'
    breaks_after: int | None = None  # bytes of each answer, after which the connection breaks
    stalls_after: int | None = None  # bytes of each answer, after which nothing more comes
    stalled: threading.Event = field(default_factory=threading.Event)
    downloads: list[tuple[str, str]] = field(default_factory=list)  # source, range
    leaked: list[str] = field(default_factory=list)  # tokens that the server of the files was given


@contextmanager
def kaggle_server() -> Iterator[Kaggle]:
    kaggle, ended = Kaggle(), threading.Event()

    class Interface(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = re.fullmatch(
                r"/api/v1/(datasets|competitions)/(?:data/)?download(?:-all)?/(.+)", self.path
            )
            assert found, self.path
            source = "/".join(found.groups())
            status = kaggle.refusals.get(source, 302 if source in kaggle.files else 404)
            status = status if self.headers["Authorization"] in TOKENS else 401
            self.send_response(status)
            if status == 302:
                # Another name of this machine is another host, which must not get the token.
                port = storage.server_address[1]
                self.send_header("Location", f"http://localhost:{port}/{source}?{SECRET}")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Storage(Interface):
        def do_GET(self) -> None:
            source = self.path.removesuffix(f"?{SECRET}").strip("/")
            content, asked = kaggle.files[source], self.headers["Range"] or ""
            kaggle.downloads.append((source, asked))
            kaggle.leaked += [self.headers["Authorization"]] if self.headers["Authorization"] else []
            start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
            if self.headers["If-Range"] != kaggle.tag:
                start = 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", kaggle.tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            until = kaggle.breaks_after or kaggle.stalls_after
            try:
                self.wfile.write(content[start:][:until])
                if kaggle.stalls_after:
                    self.wfile.flush()
                    kaggle.stalled.set()
                    ended.wait()
            except ConnectionError:  # the client wanted no more of it
                pass
            self.close_connection = True

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Interface) as interface,
        ThreadingHTTPServer(("127.0.0.1", 0), Storage) as storage,
    ):
        kaggle.address = f"http://127.0.0.1:{interface.server_address[1]}"
        for server in (interface, storage):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield kaggle
        ended.set()
        for server in (interface, storage):
            server.shutdown()
