"""A small model on a workbench, and a server of it on a free port of this machine."""

import contextlib
import http.client
import json
from types import SimpleNamespace

import pytest

from bench.page import serving
from helpers import TINY_FULL, image_folder, tiny_pdae
from pdae_fast import Pipeline
from pdae_fast.data import open_dataset
from pdae_fast.demo.workbench import Workbench


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("secret-place") / "in", 6)


@pytest.fixture(scope="session")
def pipe():
    return Pipeline(tiny_pdae(TINY_FULL), "fast", device="cpu", batch_size=4)


@pytest.fixture
def bench(pipe, folder):
    return Workbench(pipe, open_dataset([folder], 32, 1), "tiny")


class Served:
    """The address of a server, and its answers."""

    def __init__(self, port, app):
        self.port, self.app, self.url = port, app, f"http://127.0.0.1:{port}"

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method, path, body=None, headers=(), visitor="0123456789abcdef"):
        with contextlib.closing(self.connect()) as connection:
            own = {"X-Visitor": visitor} if visitor else {}
            connection.request(method, path, body, {**own, **dict(headers)})
            answer = connection.getresponse()
            content = answer.read()
        kind = answer.getheader("content-type", "")
        value = json.loads(content) if kind.startswith("application/json") else content
        return SimpleNamespace(status=answer.status, value=value, headers=answer.headers, content=content)

    def post(self, what, visitor="0123456789abcdef", **values):
        return self.ask("POST", f"/api/{what}", json.dumps(values), visitor=visitor)


@pytest.fixture
def serve():
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="needs pip install 'pdae_fast[demo]'")
    with contextlib.ExitStack() as stack:
        yield lambda bench: Served(*stack.enter_context(serving(bench)))


@pytest.fixture
def served(serve, bench):
    return serve(bench)
