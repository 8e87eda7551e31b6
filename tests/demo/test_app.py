"""The web application on a real server: what it answers, refuses and gives away."""

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

import pdae_fast
from helpers import image_folder
from pdae_fast import cli
from pdae_fast.data import open_dataset
from pdae_fast.demo import command
from pdae_fast.demo.workbench import PREVIEW, Workbench

PAGE = Path(pdae_fast.__file__).parent / "demo" / "page"
FILES = {"/": "index.html", **{f"/{name}": name for name in ("page.css", "page.js", "server.js", "icon.svg")}}


def picture(uri):
    head, data = uri.split(",")
    return Image.open(io.BytesIO(base64.b64decode(data))), head


def pixels(image):
    """[C, H, W] in [-1, 1] as the 8-bit values of a PNG."""
    return ((image + 1) * 127.5).clamp(0, 255).round().byte().numpy()


def test_the_page_and_its_files(served):
    assert {path.name for path in PAGE.iterdir()} == set(FILES.values())
    for path, name in FILES.items():
        answer = served.ask("GET", path, visitor=None)
        assert answer.status == 200 and answer.content == (PAGE / name).read_bytes()
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and not re.search(r"https?:|\*|unsafe", policy)


def test_nothing_on_the_page_comes_from_elsewhere():
    for path in PAGE.iterdir():
        text = path.read_text()
        addresses = set(re.findall(r"(?:https?:)?//[a-z0-9][\w.-]*\.[a-z]{2,}[^\s\"')]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path
        assert "@import" not in text and "url(" not in text


def test_every_id_that_the_script_uses_is_on_the_page():
    page, script = ((PAGE / name).read_text() for name in ("index.html", "page.js"))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(ids)
    used = re.findall(r'(?:for|aria-controls|aria-labelledby|aria-describedby)="([^"]+)"', page)
    assert set(used) <= set(ids)
    assert all(" alt=" in tag for tag in re.findall(r"<img[^>]*>", page))


def test_requests_answer_what_the_workbench_computes(served, bench):
    found = served.ask("GET", "/api/model", visitor=None).value
    assert found == json.loads(json.dumps(bench.describe())) and found["opening"] == ["data-0", "data-1"]
    answer = served.ask("GET", "/api/image/data-2.png", visitor=None)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), pixels(bench.dataset[2].image)[0])
    edit = served.post("edit", image="data-2", scales={"dark": 0.2}, preview=True)
    expected = bench.edit("data-2", {"dark": 0.2}, PREVIEW)
    for name in ("original", "reconstruction", "edit"):
        shown, head = picture(edit.value[name])
        assert head == "data:image/png;base64" and np.array_equal(np.asarray(shown), pixels(expected[name])[0])
    assert edit.value["attributes"]["dark"]["arrived"] == pytest.approx(expected["attributes"]["dark"]["arrived"])
    path = served.post("interpolate", a="data-0", b="data-1", kind="trajectory", frames=3, recipe="fast", steps=2)
    assert len(path.value["frames"]) == 3 and picture(path.value["gif"])[0].n_frames > 3
    sample = served.post("sample", count=2, seed=1, steps=2).value["images"]
    assert len({one["key"] for one in sample}) == 2
    assert served.post("edit", image=sample[0]["key"], preview=True).status == 200
    assert len(served.post("inside", image="data-0", times=3).value["rows"]) == 3
    assert served.post("reconstruct", image="data-0", recipe="published", solver="belm", steps=3).value["ssim"] <= 1
    file = served.post("latents", image="data-0", scales={"dark": 0.1}, steps=2)
    assert set(safetensors.torch.load(file.content)) == {"z", "z_edited", "x_T"}


def test_an_upload_can_be_edited(served, folder):
    content = (folder / "03.png").read_bytes()
    found = served.ask("POST", "/api/upload?name=me.png", content).value
    assert found["name"] == "me.png"
    assert np.array_equal(np.asarray(picture(found["image"])[0]), np.asarray(Image.open(folder / "03.png")))
    edit = served.post("edit", image=found["key"], scales={"dark": 0.1}, preview=True)
    assert edit.status == 200 and edit.value["original"] == found["image"]


REFUSED = [
    ("/api/upload?name=a.png", b"nothing", "a.png: not an image"),
    ("/api/upload", b"x" * (2**24 + 1), "too large; at most 16 MiB"),
    ("/api/edit", b"{", "not JSON"),
    ("/api/edit", b"[1]", "not JSON"),
    ("/api/edit", b"[" * 60000, "not JSON"),
    ("/api/edit", b" " * 70000, "too large"),
    ("/api/edit", b"{}", "no image"),
    ("/api/edit", b'{"image": "data-0", "recipe": "best"}', "recipe 'best' is not known"),
    ("/api/edit", b'{"image": "data-0", "scales": {"bright": 1}}', "attribute 'bright'"),
    ("/api/edit", b'{"image": "../../etc/passwd"}', "no image"),
    ("/api/sample", b'{"count": 1e9}', "images must be"),
    ("/api/nothing", b"{}", "no such request"),
]


@pytest.mark.parametrize(("path", "body", "words"), REFUSED, ids=[f"{k}" for k in range(len(REFUSED))])
def test_bad_requests_get_one_line(served, path, body, words, folder):
    answer = served.ask("POST", path, body)
    assert answer.status == 400 and words in answer.value["error"] and "\n" not in answer.value["error"]
    assert str(folder.parent) not in answer.value["error"]


def test_other_pages_cannot_make_a_browser_ask(served):
    assert served.post("edit", visitor=None, image="data-0").status == 400
    assert served.post("edit", visitor="<script>", image="data-0").status == 400
    assert served.ask("GET", "/", headers={"Host": "evil.example"}).status == 400
    assert served.ask("GET", "/", headers={"Host": f"localhost:{served.port}"}).status == 200
    assert served.ask("OPTIONS", "/api/edit", headers={"Origin": "http://evil.example"}).status == 405


def test_a_defect_says_nothing_about_the_machine(serve, bench, monkeypatch):
    def fail(*arguments):
        raise FileNotFoundError("/home/me/secret-place")

    monkeypatch.setattr(bench, "edit", fail)
    served = serve(bench)
    answer = served.post("edit", image="data-0")
    assert answer.status == 500 and b"secret" not in answer.content and "log" in answer.value["error"]
    assert "content-security-policy" in answer.headers
    assert served.post("inside", image="data-0", times=2).status == 200


def test_what_does_not_arrive_is_not_waited_for(served, monkeypatch):
    from pdae_fast.demo import app

    monkeypatch.setattr(app, "MOST_SECONDS", 0.1)
    with contextlib.closing(served.connect()) as connection:
        connection.putrequest("POST", "/api/upload")
        connection.putheader("X-Visitor", "0123456789abcdef")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"some")
        answer = connection.getresponse()
        assert answer.status == 400 and b"did not arrive" in answer.read()


class Slow:
    """An edit that goes on until it is stopped."""

    def __init__(self):
        self.started, self.stopped = threading.Event(), threading.Event()

    def __call__(self, key, scales, recipe, stop):
        if scales.get("quick"):
            return {"answer": key}
        self.started.set()
        try:
            while True:
                stop(1)
                time.sleep(0.002)
        finally:
            self.stopped.set()


@pytest.fixture
def slow(bench, monkeypatch):
    monkeypatch.setattr(bench, "edit", Slow())
    return bench.edit


def test_closing_the_page_stops_its_work(serve, bench, slow):
    served = serve(bench)
    connection = served.connect()
    connection.request("POST", "/api/edit", "{}", {"X-Visitor": "0123456789abcdef"})
    assert slow.started.wait(10) and not slow.stopped.is_set()
    connection.close()
    assert slow.stopped.wait(10)
    assert served.post("edit", image="x", scales={"quick": 1}).value == {"answer": "x"}


def test_a_newer_request_overtakes_and_others_are_served(serve, bench, slow):
    served, older = serve(bench), []
    thread = threading.Thread(target=lambda: older.append(served.post("edit", visitor="a" * 16)))
    thread.start()
    assert slow.started.wait(10)
    assert served.ask("GET", "/").status == 200  # the loop is free
    assert served.ask("GET", "/api/image/data-1.png").status == 200
    assert served.post("edit", visitor="a" * 16, image="x", scales={"quick": 1}).value == {"answer": "x"}
    thread.join(10)
    assert older[0].status == 409 and older[0].value == {"stopped": True}


@pytest.mark.parametrize("visitor", ["a" * 16, "b" * 16], ids=["own", "another"])
def test_a_slider_is_followed_while_a_long_request_runs(serve, bench, monkeypatch, visitor):
    long, answers = Slow(), []
    monkeypatch.setattr(bench, "interpolate", lambda *arguments: long("", {}, None, arguments[-1]))
    served = serve(bench)
    connection = served.connect()
    connection.request("POST", "/api/interpolate", "{}", {"X-Visitor": "a" * 16})
    assert long.started.wait(10)
    for preview in (True, False):
        answers.append(served.post("edit", visitor=visitor, image="data-0", scales={"dark": 0.2}, preview=preview))
    assert [answer.status for answer in answers] == [200, 200] and not long.stopped.is_set()
    connection.close()
    assert long.stopped.wait(10)


def test_visitors_at_once_get_their_own(served):
    found = {}

    def visit(k):
        found[k] = served.post("edit", visitor=f"{k:016x}", image=f"data-{k}", preview=True)

    threads = [threading.Thread(target=visit, args=(k,)) for k in range(6)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    for k, answer in found.items():
        own = served.ask("GET", f"/api/image/data-{k}.png").content
        assert answer.status == 200 and base64.b64decode(answer.value["original"].split(",")[1]) == own


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_serves_the_bundled_avatars():
    pytest.importorskip("uvicorn", reason="needs pip install 'pdae_fast[demo]'")
    process = subprocess.Popen(
        [sys.executable, "-m", "pdae_fast.demo", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert url, (line, process.stderr.read() if process.poll() is not None else "")
        with urllib.request.urlopen(f"{url[0]}/api/model", timeout=20) as answer:
            model = json.load(answer)
        assert model["name"] == "avatars64" and model["total"] == 400 and not model["missing"]
        assert model["opening"] == ["data-10", "data-15"] and model["attributes"][0] == "sunglasses"
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("model", "image", "attribute", "reach"),
    [("avatars64", "data-10", "sunglasses", 0.4), ("fashion32", "data-13", "Trouser", 0.8)],
)
def test_bundled_models_open_with_an_edit_that_arrives(model, image, attribute, reach):
    bench = command.workbench(command.parser().parse_args(["--model", model, "--device", "cpu"]))
    found = bench.describe()
    assert (found["opening"][0], found["attributes"][0], found["reach"]) == (image, attribute, reach)
    said = bench.edit(image, {attribute: 0.75 * reach}, PREVIEW)["attributes"][attribute]
    assert said["before"] < 0.1 and said["after"] > 0.9


def test_a_saved_directory_shows_its_name_alone(tmp_path, pipe, folder):
    pipe.model.save_pretrained(tmp_path / "mine")
    args = command.parser().parse_args(["--model", str(tmp_path / "mine"), "--input", str(folder)])
    bench = command.workbench(args)
    assert bench.name == "mine" and str(tmp_path) not in json.dumps(bench.describe())


def test_it_starts_warm_and_with_a_broken_image_too(pipe, bench, tmp_path):
    from pdae_fast.demo.app import warm_up

    warm_up(bench)
    before = pipe.evaluations["trunk"]
    bench.edit("data-0", {}, PREVIEW), bench.edit("data-0", {}, pipe.recipe)
    assert pipe.evaluations["trunk"] == before
    image_folder(tmp_path, 2)
    (tmp_path / "00.png").write_bytes(b"nothing")
    broken = Workbench(pipe, open_dataset([tmp_path], 32, 1))
    warm_up(broken)
    assert broken.describe()["opening"] == ["data-0", "data-1"]


def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch):
    def refused(*arguments):
        assert cli.run(command.main, list(arguments)) == 2
        printed = capsys.readouterr()
        assert not printed.out and printed.err.count("\n") == 1
        return printed.err

    pytest.importorskip("uvicorn", reason="needs pip install 'pdae_fast[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "is in use; choose another with --port" in refused("--port", str(other.getsockname()[1]))
    assert "--port must be between" in refused("--port", "70000")
    assert "cannot listen on" in refused("--host", "no.such.host.invalid", "--port", "0")
    assert "no such input" in refused("--port", "0", "--input", str(tmp_path / "nowhere"))
    image_folder(tmp_path / "in", 1)
    assert "no_model" in refused("--port", "0", "--model", "no_model", "--input", str(tmp_path / "in"))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'pdae_fast[demo]'" in refused("--port", "0")


def test_one_thread_computes_from_the_start(bench, monkeypatch):
    """Loading and the opening picture too: teams of OpenMP for two threads slow each other down."""
    uvicorn, threads = pytest.importorskip("uvicorn", reason="needs pip install 'pdae_fast[demo]'"), []

    def recorded(*values):
        threads.append(threading.current_thread().name)
        return bench

    monkeypatch.setattr(command, "workbench", recorded)
    monkeypatch.setattr("pdae_fast.demo.app.warm_up", recorded)

    def serve(server, sockets):
        asyncio.run(server.config.app.state.turns.run("v", "edit", recorded))

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    command.main(["--port", "0"])
    assert len(threads) == 3 and set(threads) == {threads[0]} and threads[0].startswith("demo")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.9", "example.org"])
def test_which_hosts_only_this_machine_reaches(host):
    assert command.is_loopback(host) is (host in ("127.0.0.1", "::1", "localhost"))
