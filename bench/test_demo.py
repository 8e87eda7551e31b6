"""The page with sliders: from a slider's move to its picture, through the server, as a visitor's browser sees it.

Each round moves a slider of the bundled avatars somewhere else. "preview" is what is shown while it moves, "refined"
what follows when it rests, both from the x_T that was inferred before; "first picture" is the preview of an image that
nobody chose before, its inference included. Drawing in the browser is not in it.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bench.tables import RUN
from bench.timing import Alternation, clock, pedantic

ROUNDS = 30
BOUND = 0.4  # seconds, median, on two cores
VISITOR = "0123456789abcdef"


@pytest.fixture
def server(device):
    pytest.importorskip("uvicorn", reason="needs pip install 'pdae_fast[demo]'")
    command = [sys.executable, "-m", "pdae_fast.demo", "--port", "0", "--device", str(device)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}) as process:
        try:
            port = int(re.search(r":(\d+) in a browser", process.stdout.readline())[1])
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                yield connection
        finally:
            process.terminate()


def test_slider_to_picture(benchmark, server):
    scale, image = itertools.count(), itertools.count(11)

    def edit(key: str, preview: bool) -> dict:
        scales = {"sunglasses": (next(scale) % 50 - 25) / 100 + 0.005, "beard": 0.1}
        body = json.dumps({"image": key, "scales": scales, "preview": preview})
        server.request("POST", "/api/edit", body, {"X-Visitor": VISITOR})
        answer = server.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content)

    functions = {
        "preview": lambda: edit("data-10", True),
        "refined": lambda: edit("data-10", False),
        "first picture": lambda: edit(f"data-{next(image)}", True),
    }
    alternation = Alternation(functions, torch.device("cpu"), clock)
    found, _ = alternation.first()
    assert found["preview"]["steps"] < found["refined"]["steps"] == 10
    if not pedantic(benchmark, alternation, ROUNDS):
        return
    for name in functions:
        times = alternation.spread(name)
        cost = found[name]["evaluations"]
        RUN.add(
            "demo",
            picture=name,
            evaluations=cost,
            median_s=times.median,
            spread_s=[times.low, times.high],
            rounds=times.count,
            threads=torch.get_num_threads(),
        )
    for name in ("preview", "refined"):
        assert alternation.spread(name).median <= BOUND, name
