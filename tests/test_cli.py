"""Commands as a user runs them: what they leave behind, and what a mistake prints."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import TINY, TINY_FULL, image_folder, tiny_pdae, tiny_prior
from pdae_fast import PDAE, UserError, cli, config, encode, evaluate, info, metrics, pareto, reconstruct, sample, train
from pdae_fast.data import load_image
from pdae_fast.training.arguments import parse
from pdae_fast.training.command import build_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pdae(TINY_FULL).save_pretrained(path)
    return path


def run(main, *argv):
    return cli.run(main, [str(a) for a in argv])


def test_reconstruct_leaves_grid_images_and_metrics(tmp_path, model_dir, capsys):
    folder = image_folder(tmp_path / "in", 5)
    out = tmp_path / "out"
    assert run(reconstruct.main, "--model", model_dir, "--input", folder, "--out", out, "--steps", 4, "--batch-size", 2,
               "--encode-steps", 6, "--device", "cpu", "--modes", "inferred", "random", "prior") == 0  # fmt: skip
    report = json.loads((out / "metrics.json").read_text())
    assert report["images"] == 5 and report["steps"] == 4 and report["encode_steps"] == 6 and report["broken"] == []
    assert report["modes"]["inferred"]["network_evaluations_per_image"] == {
        "encoder": 1,
        "trunk": 10,
        "eps": 10,
        "gradient": 10,
    }
    assert report["modes"]["prior"]["network_evaluations_per_image"]["gradient"] == 0
    assert {"device", "dtype", "versions", "plan", "seed"} <= report.keys()
    for mode, values in report["modes"].items():
        assert values["seconds"] > 0 and values["images_per_second"] == pytest.approx(5 / values["seconds"])
        per_image = [entry[mode] for entry in report["per_image"]]
        for name in ("ssim", "psnr", "mse"):
            assert values["mean"][name] == pytest.approx(np.mean([v[name] for v in per_image]))
        for entry in report["per_image"]:
            with Image.open(out / "images" / mode / f"{entry['name']}.png") as picture:
                assert picture.size == (32, 32)
    # The numbers are those of the images: written ones are clamped and rounded, so they agree roughly.
    entry = report["per_image"][0]
    x0 = load_image(folder / "00.png", 32, 1)[None]
    x = load_image(out / "images" / "inferred" / f"{entry['name']}.png", 32, 1)[None]
    assert float(metrics.mse(x0, x)) == pytest.approx(entry["inferred"]["mse"], rel=0.2, abs=1e-3)
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] >= 4 * 64
    printed = capsys.readouterr().out
    assert "inferred x_T" in printed and "SSIM" in printed and "grid.png" in printed


def test_batches_do_not_change_the_report(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 5)
    reports = []
    for size in (1, 5):
        out = tmp_path / f"out{size}"
        assert run(reconstruct.main, "--model", model_dir, "--input", folder, "--out", out, "--steps", 3,
                   "--batch-size", size, "--quiet", "--device", "cpu") == 0  # fmt: skip
        reports.append(json.loads((out / "metrics.json").read_text())["per_image"])
    for a, b in zip(*reports, strict=True):
        assert a["name"] == b["name"]
        for mode in ("inferred", "random"):
            assert a[mode] == pytest.approx(b[mode], rel=1e-3)


def test_broken_images_are_skipped_counted_or_fatal(tmp_path, model_dir, capsys):
    folder = image_folder(tmp_path / "in", 3)
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:60])
    arguments = ("--model", model_dir, "--input", folder, "--steps", 2, "--device", "cpu")
    assert run(reconstruct.main, *arguments, "--out", tmp_path / "skip") == 0
    report = json.loads((tmp_path / "skip" / "metrics.json").read_text())
    assert report["images"] == 2 and [b["name"] for b in report["broken"]] == ["01"]
    assert "1 broken images skipped: 01" in capsys.readouterr().out
    assert run(reconstruct.main, *arguments, "--out", tmp_path / "fail", "--on-error", "fail") == 2
    assert "01.png" in capsys.readouterr().err
    assert not (tmp_path / "fail" / "metrics.json").exists()


def test_limit_and_quiet(tmp_path, model_dir, capsys):
    folder = image_folder(tmp_path / "in", 3)
    assert run(reconstruct.main, "--model", model_dir, "--input", folder, "--out", tmp_path / "o", "--steps", 2,
               "--limit", 2, "--quiet", "--device", "cpu") == 0  # fmt: skip
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["images"] == 2
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_how_random_x_T_is_drawn(tmp_path, model_dir):
    """The results of --noise, its place in the report, and the model's own choice without it."""
    folder, narrow = image_folder(tmp_path / "in", 3), tmp_path / "narrow"
    tiny_pdae(dataclasses.replace(TINY_FULL, noise="standardised")).save_pretrained(narrow)
    base = ("--input", folder, "--steps", 3, "--device", "cpu", "--modes", "random", "--quiet", "--out")
    mse = {}
    for name, model, options in (
        ("as published", model_dir, ()),
        ("asked", model_dir, ("--noise", "standardised")),
        ("told", narrow, ()),
        ("against", narrow, ("--noise", "normal")),
    ):
        assert run(reconstruct.main, "--model", model, *options, *base, tmp_path / name) == 0
        report = json.loads((tmp_path / name / "metrics.json").read_text())
        assert report["noise"] == ("standardised" if name in ("asked", "told") else "normal")
        mse[name] = report["modes"]["random"]["mean"]["mse"]
    assert mse["asked"] == pytest.approx(mse["told"], rel=1e-5) != pytest.approx(mse["as published"], rel=1e-3)
    assert mse["against"] == pytest.approx(mse["as published"], rel=1e-5)


MISTAKES = [
    (["--steps", "0"], "steps must be between 1 and 1000"),
    (["--noise", "pink"], "invalid choice: 'pink'"),
    (["--encode-steps", "1001"], "steps must be between 1 and 1000"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--model", "nothing-here"], "neither a bundled model"),
    (["--input", "/no/such/folder"], "no such input: /no/such/folder"),
    (["--input", "{empty}"], "no image"),
    (["--device", "cuda:7"], "cuda:7"),
    (["--dtype", "int4"], "dtype 'int4'"),
    (["--batch-size", "0"], "batch size must be at least 1"),
    (["--limit", "0"], "--limit must be at least 1"),
    (["--background", "red"], "R,G,B"),
    (["--modes", "magic"], "invalid choice: 'magic'"),
    (["--out", "{file}/sub"], "cannot create the folder"),
    (["--nonsense"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_print_one_line_and_exit_2(tmp_path, model_dir, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    arguments = [a.format(empty=tmp_path / "empty", file=tmp_path / "file") for a in arguments]
    base = [
        "--model",
        model_dir,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        "--input",
        image_folder(tmp_path / "in", 1),
    ]
    try:
        status = run(reconstruct.main, *base, *arguments)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert words in printed.err and len(printed.err.splitlines()) == 1 and printed.err.startswith("error: ")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_prior_is_named_as_such(tmp_path, capsys):
    tiny_prior().save_pretrained(tmp_path / "prior")
    assert run(reconstruct.main, "--model", tmp_path / "prior") == 2
    assert "is a prior" in capsys.readouterr().err


@pytest.mark.slow
def test_interruption_leaves_no_half_written_file(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 40)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "pdae_fast.reconstruct", "--model", str(model_dir), "--input", str(folder),
         "--out", str(out), "--steps", "20", "--batch-size", "1", "--device", "cpu", "--quiet"],
        stderr=subprocess.PIPE, text=True,
        # A shell's background job starts with SIGINT ignored, and so would this child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for _ in range(1200):
        if (out / "images" / "random").exists() and list((out / "images" / "random").glob("*.png")):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    written = [p for p in out.rglob("*") if p.is_file() and p.parent.name != "parts"]
    assert written and all(p.suffix == ".png" for p in written)  # no temporary files, no report
    assert (out / "parts" / "settings.json").exists()  # the same command continues
    for path in written:
        with Image.open(path) as picture:
            picture.load()


def test_train_both_stages_from_the_command_line(tmp_path, capsys):
    data = image_folder(tmp_path / "in", 6)
    (tmp_path / "tiny.json").write_text(config.dumps(TINY))
    shared = [
        "--data",
        data,
        "--architecture",
        tmp_path / "tiny.json",
        "--steps",
        2,
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    prior, pdae = tmp_path / "prior", tmp_path / "pdae"
    assert run(train.main, "prior", *shared, "--out", prior, "--sample-every", 2) == 0
    assert run(train.main, "pdae", *shared, "--out", pdae, "--init-from", prior, "--sample-every", 2) == 0
    for out in (prior, pdae):
        assert {p.name for p in out.iterdir()} == {
            "config.json", "model.safetensors", "checkpoint.pt", "train.json", "log.jsonl", "samples",
        }  # fmt: skip
        with Image.open(out / "samples" / "0000002.png") as picture:
            picture.load()
        assert json.loads((out / "train.json").read_text())["batch_size"] == 2
    assert (
        run(
            reconstruct.main, "--model", pdae, "--input", data, "--steps", 2, "--out", tmp_path / "o", "--device", "cpu"
        )
        == 0
    )
    capsys.readouterr()
    # A second start must not overwrite the first run.
    assert run(train.main, "prior", *shared, "--out", prior) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(train.main, "pdae", *shared, "--out", tmp_path / "new") == 2
    assert "--init-from" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_pdae_can_start_from_a_trained_one_around_another_prior(tmp_path, capsys):
    tiny_pdae().save_pretrained(tmp_path / "start")
    other = tiny_prior()
    other.save_pretrained(tmp_path / "prior")
    paths = {"--init-from": "prior", "--start-from": "start", "--architecture": "start/config.json"}
    options = [word for flag, path in paths.items() for word in (flag, str(tmp_path / path))]
    arguments = parse(["pdae", "--data", "x", "--out", "y", *options])
    model = build_model(arguments)
    start = PDAE.from_pretrained(tmp_path / "start")
    for name, value in model.state_dict().items():
        unet = name.removeprefix("decoder.")
        expected = other.unet.state_dict().get(unet, start.state_dict()[name])
        assert torch.equal(value, expected), name
    assert not torch.equal(other.unet.out[2].weight, start.decoder.out[2].weight)
    PDAE(dataclasses.replace(TINY, latent_dim=24)).save_pretrained(tmp_path / "wide")
    base = ["--data", image_folder(tmp_path / "in", 2), "--architecture", tmp_path / "start" / "config.json"]
    for task, start_from, words in (
        ("pdae", tmp_path / "wide", "its latent_dim is 24"),
        ("prior", tmp_path / "start", "train prior starts from --init-from"),
    ):
        out = ["--out", tmp_path / "out", "--init-from", tmp_path / "prior", "--start-from", start_from]
        assert run(train.main, task, *base, *out) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "-1"], "lr must be a positive number"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--amp", "float8"], "amp must be off or bfloat16"),
        (["--architecture", "resnet"], "neither an architecture"),
        (["--data", "/none"], "no such input"),
        (["--save-every", "0"], "--save-every must be at least 1"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_training_mistakes(tmp_path, capsys, arguments, words):
    (tmp_path / "tiny.json").write_text(config.dumps(TINY))
    base = [
        "prior",
        "--data",
        image_folder(tmp_path / "in", 2),
        "--out",
        tmp_path / "out",
        "--architecture",
        tmp_path / "tiny.json",
    ]
    assert run(train.main, *base, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_info(capsys):
    assert run(info.main) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "triton" in printed and "bundled models" in printed
    if not torch.cuda.is_available():
        assert "cuda  no:" in printed


def test_json_has_no_infinities(tmp_path):
    cli.write_json(tmp_path / "x.json", {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": (1, float("-inf"))}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": [1, None]}}


def test_presets_and_what_overrides_them(tmp_path, model_dir, capsys):
    base = ["--model", model_dir, "--input", image_folder(tmp_path / "in", 2), "--modes", "inferred", "--device", "cpu"]
    assert run(reconstruct.main, *base, "--out", tmp_path / "a", "--preset", "fast", "--steps", 3) == 0
    report = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert (report["preset"], report["steps"], report["spacing"], report["iterations"]) == ("fast", 3, "quadratic", 2)
    assert report["modes"]["inferred"]["network_evaluations_per_image"]["trunk"] == 1 + 2 * 3 + 3
    assert "3 steps solved by 2 evaluations each and 3 down by ddim, quadratic spacing" in capsys.readouterr().out
    assert run(reconstruct.main, *base, "--out", tmp_path / "b", "--preset", "fast", "--encode-steps", 5) == 2
    assert "leave out --encode-steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(reconstruct.main, *base, "--out", tmp_path / "b", "--preset", "fastest")
    assert "published" in capsys.readouterr().err


NOISY = {"ddpm": ("--solver", "ddpm"), "eta": ("--eta", 0.5)}


@pytest.mark.parametrize("name", NOISY)
def test_solvers_that_draw_noise(tmp_path, model_dir, capsys, name):
    folder, out = image_folder(tmp_path / "in", 3), tmp_path / "out"
    base = [
        "--model",
        model_dir,
        "--input",
        folder,
        "--device",
        "cpu",
        "--steps",
        4,
        *NOISY[name],
        "--dtype",
        "float32",
    ]
    assert run(reconstruct.main, *base, "--out", out) == 2  # x_T is inferred unless told otherwise
    error = capsys.readouterr().err
    assert "x_T cannot be inferred" in error and "decode from random x_T" in error and len(error.splitlines()) == 1
    assert not out.exists()
    for size in (1, 3):
        more = ["--modes", "random", "prior", "--batch-size", size, "--out", out / str(size), "--seed", 5]
        assert run(reconstruct.main, *base, *more) == 0
    one, three = (json.loads((out / size / "metrics.json").read_text()) for size in ("1", "3"))
    assert (one["solver"], one["eta"], one["encode_steps"]) == ("ddpm" if name == "ddpm" else "ddim", *(
        (0.0, None) if name == "ddpm" else (0.5, None)
    ))  # fmt: skip
    for mode in ("random", "prior"):  # an image's noise is its own, whatever the batch
        assert one["modes"][mode]["mean"]["mse"] == pytest.approx(three["modes"][mode]["mean"]["mse"], rel=1e-3)
        assert one["modes"][mode]["network_evaluations_per_image"]["trunk"] == 4
    capsys.readouterr()
    assert run(evaluate.main, *base, "--modes", "random", "--out", out / "evaluation") == 0
    assert run(pareto.main, *base, "--only", "published 5+5", "--no-plot", "--out", out / "pareto") == 0
    rows = json.loads((out / "pareto" / "metrics.json").read_text())["rows"]
    assert [row["mode"] for row in rows if row["name"] == "yours"] == ["random"]
    more = image_folder(tmp_path / "more", 12)
    assert run(sample.main, *base, "--input", more, "--count", 2, "--latent-steps", 2, "--out", out / "samples") == 0
    assert run(evaluate.main, *base, "--modes", "inferred", "--out", out / "x") == 2
    assert "x_T cannot be inferred" in capsys.readouterr().err and not (out / "x").exists()
    assert run(encode.main, *base, "--with-x-T", "--out", out / "x") == 2 and not (out / "x").exists()
    assert run(encode.main, *base, "--out", out / "codes") == 0


def test_help_states_a_default_once_and_none_that_is_not():
    p = cli.parser("x", "about")
    p.add_argument("--a", default=7, help="seven")
    p.add_argument("--b", help="one of its own (default: chosen)")
    p.add_argument("--c", action="store_true", help="a switch")
    text = " ".join(p.format_help().split())
    assert "seven (default: 7)" in text and "of its own (default: chosen)" in text
    assert text.count("default") == 2 and text.endswith("a switch")


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1.5", "None"])
@pytest.mark.parametrize("command", [reconstruct, sample, encode, evaluate, pareto])
def test_a_bad_seed_writes_nothing(tmp_path, model_dir, capsys, command, seed):
    with pytest.raises(SystemExit, match="2"):
        run(command.main, "--model", model_dir, "--out", tmp_path / "out", f"--seed={seed}", "--device", "cpu")
    error = capsys.readouterr().err
    assert error.startswith("error: argument --seed: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_ends_a_command_from_outside(capsys):
    def terminated(argv):
        signal.raise_signal(signal.SIGTERM)

    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.run(terminated) == 143 and cli.run(interrupted) == 130
    assert capsys.readouterr().err == "interrupted; files written so far are complete\n" * 2


@pytest.mark.parametrize("error", [UserError("seven dogs"), KeyboardInterrupt()], ids=["mistake", "interrupted"])
def test_a_termination_while_the_end_is_told(monkeypatch, error):
    class Terminating(io.StringIO):
        def write(self, text):
            signal.raise_signal(signal.SIGTERM)
            return super().write(text)

    def fails(argv):
        raise error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "stderr", Terminating())
    status = cli.run(fails)
    told = {2: "error: seven dogs\n", 130: "interrupted; files written so far are complete\n"}
    assert sys.stderr.getvalue() == told[status] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("command", [["info"], ["pareto", "--list"]], ids=" ".join)
def test_a_reader_that_has_enough(command):
    line = f"{sys.executable} -m pdae_fast.{' '.join(command)} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1 and done.returncode in (0, 141)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK or MASTER_ADDR or MASTER_PORT: start the processes with torch"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "WORLD_SIZE=2 but no MASTER_ADDR: start"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many, which is no number of processes; unset it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0, which is no number"),
    ],
)
def test_half_an_environment_of_torchrun(tmp_path, model_dir, capsys, monkeypatch, environment, words):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = image_folder(tmp_path / "in", 2)
    base = ["--model", model_dir, "--input", folder, "--out", tmp_path / "out", "--device", "cpu", "--steps", 2]
    assert run(reconstruct.main, *base) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_warnings_of_libraries_stay_inside(recwarn):
    def main(argv):
        for module in ("PIL.Image", "PIL.TiffImagePlugin", "torch.nn.parallel.distributed", "somebody.else"):
            warnings.warn_explicit("odd", UserWarning, "file.py", 1, module=module)

    assert cli.run(main) == 0
    assert len(recwarn) == 1  # somebody else's


def test_results_are_not_read_as_images(tmp_path, model_dir, monkeypatch):
    image_folder(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert run(reconstruct.main, "--model", model_dir, "--input", ".", "--out", "out", "--steps", 2, "--quiet",
                   "--device", "cpu") == 0  # fmt: skip
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 1


def test_the_crop_is_the_models_unless_asked(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "1.png")
    tiny_pdae(dataclasses.replace(TINY, crop="celeba")).save_pretrained(tmp_path / "celeba")
    tiny_pdae(TINY).save_pretrained(tmp_path / "plain")
    found = {}
    for name, model, options in (
        ("told", "celeba", ()),
        ("asked", "plain", ("--crop", "celeba")),
        ("against", "celeba", ("--crop", "centre")),
        ("nothing", "plain", ()),
    ):
        capsys.readouterr()
        assert run(encode.main, "--model", tmp_path / model, "--input", tmp_path / "in", "--out", tmp_path / name,
                   "--device", "cpu", "--quiet", *options) == 0  # fmt: skip
        report = json.loads((tmp_path / name / "metrics.json").read_text())
        with np.load(tmp_path / name / "latents.npz") as archive:
            found[name] = report["crop"], archive["z"].tobytes()
    assert found["told"] == found["asked"] != found["against"] == found["nothing"]
