"""Avatars: what is decided (no drawing packages needed), what is drawn, and the folder it is written to."""

import csv
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from importlib import metadata, resources

import numpy as np
import pytest
from PIL import Image

from pdae_fast import cli
from pdae_fast.data import __main__ as data_command
from pdae_fast.data import avatar_render, avatars, labels_for, make_avatars, open_dataset
from pdae_fast.data.avatar_render import PARTS, Renderer
from pdae_fast.data.avatar_style import (
    BACKGROUND,
    CANVAS,
    CHOICES,
    CLOTH,
    HAIR,
    HATS,
    LANDMARKS,
    SKIN,
    Avatar,
    Pose,
    draw,
    draw_pair,
    labels,
    landmarks,
    shown,
)
from pdae_fast.data.avatars import is_avatars
from pdae_fast.errors import UserError

GOLDEN_DRAW = "54696689a16567e3d917f20b43d57040ed396316f802951acebfd8d9835d4ea8"
# What may come into sight or vanish with another value of an attribute.
DEPENDENT = {
    "top": ("hair_color", "hat_color", "clothes", "graphic"),
    "facial_hair": ("facial_hair_color",),
    "accessories": ("accessories_color", "eyes"),
    "clothes": ("graphic",),
}
STRAIGHT = Pose(1.0, 0.0, 0.0, 0.0)
PLAIN = {name: values[0] for name, values in CHOICES.items()} | {
    "top": "shortFlat", "facial_hair": "none", "accessories": "none", "eyes": "default", "mouth": "default",
    "clothes": "shirtCrewNeck", "hair_color": "black", "background": "mist",
}  # fmt: skip


def test_a_seed_means_the_same_avatars_for_ever():
    # When this changes on purpose, raise AVATARS_VERSION: folders drawn before cannot be continued.
    drawn = [[draw(0, k), labels(draw(0, k).choices), draw_pair(7, k)] for k in range(50)]
    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
    assert digest == GOLDEN_DRAW


def test_indices_seeds_and_streams_are_independent():
    keys = [(seed, index, stream) for seed in range(3) for index in range(30) for stream in ("avatar", "pair")]
    assert len({json.dumps(draw(*key)) for key in keys}) == len(keys)


def test_every_value_comes_up_as_often_as_the_others():
    count = 6000
    drawn = [draw(1, k).choices for k in range(count)]
    for name, values in CHOICES.items():
        times = Counter(choices[name] for choices in drawn)
        for value, weight in Counter(values).items():
            p = weight / len(values)
            assert abs(times[value] - p * count) < 5 * math.sqrt(count * p * (1 - p)), (name, value)
    assert CHOICES["accessories"].count("none") * 2 == len(CHOICES["accessories"])
    assert CHOICES["facial_hair"].count("none") * 2 == len(CHOICES["facial_hair"])


def test_what_cannot_be_seen_is_no_attribute():
    seen = shown(PLAIN)
    assert {seen[name] for name in ("hat_color", "facial_hair_color", "accessories_color", "graphic")} == {"none"}
    assert seen["hair_color"] == "black" and labels(PLAIN)["black_hair"] == 1
    hat = shown(PLAIN | {"top": "turban", "accessories": "kurt", "eyes": "closed"})
    assert hat["hair_color"] == "none" != hat["hat_color"] and hat["eyes"] == "none"
    found = labels(PLAIN | {"top": "turban", "accessories": "kurt", "eyes": "closed"})
    assert [found[n] for n in ("hat", "black_hair", "eyes_closed", "sunglasses", "eyeglasses")] == [1, 0, 0, 1, 1]
    found = labels(PLAIN | {"accessories": "eyepatch", "clothes": "graphicShirt", "top": "hijab"})
    assert [found[n] for n in ("eyepatch", "eyeglasses", "graphic_shirt", "hat")] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("beard", {"facial_hair": "beardLight"}, {"facial_hair": "moustacheFancy"}),
        ("moustache", {"facial_hair": "moustacheMagnum"}, {"facial_hair": "beardMedium"}),
        ("eyeglasses", {"accessories": "round"}, {"accessories": "eyepatch"}),
        ("sunglasses", {"accessories": "wayfarers"}, {"accessories": "prescription01"}),
        ("long_hair", {"top": "straight01"}, {"top": "theCaesar"}),
        ("bald", {"top": "sides"}, {"top": "hijab"}),
        ("blond_hair", {"hair_color": "platinum"}, {"hair_color": "silver"}),
        ("brown_hair", {"hair_color": "dark_brown"}, {"hair_color": "auburn"}),
        ("gray_hair", {"hair_color": "silver"}, {"hair_color": "silver", "top": "hat"}),
        ("pale_skin", {"skin_color": "light"}, {"skin_color": "tanned"}),
        ("dark_skin", {"skin_color": "deep"}, {"skin_color": "brown"}),
        ("smiling", {"mouth": "twinkle"}, {"mouth": "serious"}),
        ("mouth_open", {"mouth": "screamOpen"}, {"mouth": "twinkle"}),
        ("eyes_closed", {"eyes": "happy"}, {"eyes": "wink"}),
        ("jacket", {"clothes": "blazerAndShirt"}, {"clothes": "hoodie"}),
        ("dark_background", {"background": "plum"}, {"background": "sand"}),
    ],
)
def test_labels(name, yes, no):
    assert (labels(PLAIN | yes)[name], labels(PLAIN | no)[name]) == (1, 0)


def test_every_label_is_a_fair_question():
    found = Counter()
    for k in range(3000):
        found.update({name for name, value in labels(draw(2, k).choices).items() if value})
    for name in labels(PLAIN):
        assert 0.02 < found[name] / 3000 < 0.6, name


def test_pairs_differ_in_one_choice_that_shows():
    names = Counter()
    for k in range(400):
        first, second, name = draw_pair(3, k)
        assert first.pose == second.pose
        assert [n for n in CHOICES if first.choices[n] != second.choices[n]] == [name]
        before, after = shown(first.choices), shown(second.choices)
        assert (before[name], after[name]) == (first.choices[name], second.choices[name])
        assert {n for n in CHOICES if before[n] != after[n]} <= {name, *DEPENDENT.get(name, ())}
        names[name] += 1
    assert names.keys() >= set(CHOICES) - {"graphic", "hat_color"}


def test_pose():
    quarter = Pose(2.0, 90.0, 10.0, -5.0)
    assert quarter.apply(150.0, 140.0) == pytest.approx((140 + 28, 160 - 14))  # right turns down: clockwise
    assert STRAIGHT.apply(3.0, 5.0) == pytest.approx((3.0, 5.0))
    for k in range(500):
        pose = draw(4, k).pose
        assert all(round(value, 4) == value for value in pose)
        assert all(pose.apply(x, CANVAS)[1] >= CANVAS for x in (40.0, 140.0, 240.0)), "the cut of the body shows"
        for x, y in landmarks(pose, 64).values():
            assert 0 < x < 64 and 0 < y < 64


# --- Drawing. Everything below needs the packages of the extra "data".


@pytest.fixture(scope="module")
def definition():
    pytest.importorskip("dicebear", reason='needs pip install "pdae_fast[data]"')
    pytest.importorskip("resvg_py", reason='needs pip install "pdae_fast[data]"')
    pytest.importorskip("dicebear_styles", reason='needs pip install "pdae_fast[data]"')
    return json.loads(resources.files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def renderer(definition):
    return avatars._renderer()


def _colours(elements):
    for element in elements:
        for value in (element.get("attributes") or {}).values():
            if isinstance(value, dict):
                yield value["name"]
        yield from _colours(element.get("children", []))


def test_the_tables_are_the_styles(definition):
    part = {
        "top": "top", "eyes": "eyes", "eyebrows": "eyebrows", "mouth": "mouth", "facialHair": "facial_hair",
        "accessories": "accessories", "clothes": "clothes", "clothesGraphic": "graphic",
    }  # fmt: skip
    components = definition["components"]
    for component, name in part.items():
        assert set(components[component]["variants"]) == set(CHOICES[name]) - {"none"}
    assert set(components) - set(part) == {"nose"}
    for variant, content in components["top"]["variants"].items():
        assert set(_colours(content["elements"])) == {"hat" if variant in HATS else "hair"}
    palettes = {"skin": SKIN, "hair": HAIR, "facialHair": HAIR, "hat": CLOTH, "accessories": CLOTH, "clothes": CLOTH}
    for colour, table in palettes.items():
        assert set(table.values()) <= set(definition["colors"][colour]["values"])
        # The style drops a colour that must not equal another.
        others = {"background": BACKGROUND, **palettes}
        for other in definition["colors"][colour].get("notEqualTo", []):
            assert not set(table.values()) & set(others[other].values())


def test_the_drawing_takes_our_choices(renderer):
    for k in range(20):
        avatar = draw(5, k)
        options = avatar_render._options(avatar) | {"backgroundColor": BACKGROUND[avatar.choices["background"]]}
        used = renderer._drawing(renderer._style, options).to_json()["options"]
        for asked, value in options.items():
            if asked.endswith("Color") and asked in used:
                value = [value]
            if asked in used:
                assert used[asked] == value
        seen = shown(avatar.choices)
        keys = {
            "hair_color": "hairColor",
            "hat_color": "hatColor",
            "graphic": "clothesGraphicVariant",
            "facial_hair_color": "facialHairColor",
            "accessories_color": "accessoriesColor",
        }
        for name, key in keys.items():
            if seen[name] != "none":
                assert key in used


def test_mask_and_image_agree(renderer):
    size = 128
    for k in range(12):
        avatar = draw(6, k)
        image, mask = renderer.image(avatar, size), renderer.mask(avatar, size)
        assert image.mode == "RGB" and image.size == mask.size == (size, size) and mask.mode == "P"
        pixels, part = np.asarray(image), np.asarray(mask)
        c = shown(avatar.choices)
        expected = {"background", "skin", "clothes"}
        expected |= {"hat" if c["top"] in HATS else "hair"}
        expected |= {"accessories"} if c["accessories"] != "none" else set()
        expected |= {"facial_hair"} if c["facial_hair"] != "none" else set()
        found = {PARTS[value] for value in np.unique(part)}
        assert expected <= found <= expected | {"mouth", "nose", "eyes", "eyebrows"}
        # Away from edges, where colours mix, the mask says exactly where background and skin are.
        inner = np.ones_like(part, bool)
        for axis in (0, 1):
            for shift in (-1, 1):
                inner &= np.roll(part, shift, axis) == part
        inner[[0, -1]] = inner[:, [0, -1]] = False
        background, skin = BACKGROUND[c["background"]], SKIN[c["skin_color"]]
        for name, colour, share in (("background", background, 0.99), ("skin", skin, 0.6)):
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            here = inner & (part == PARTS.index(name))
            assert (pixels[here] == rgb).all(-1).mean() > share
        if "hat" in found:
            assert "hair" not in found


def test_faint_shadows_belong_to_what_is_below(renderer):
    def mask(**choices):
        return np.asarray(renderer.mask(Avatar(PLAIN | choices, STRAIGHT), 280))

    xs = np.nonzero(mask(mouth="eating") == PARTS.index("mouth"))[1]
    assert xs.max() - xs.min() < 60  # the cheeks of this mouth blush out to 90
    eyes = (mask() == PARTS.index("eyes")).sum()
    for glasses in ("prescription01", "prescription02", "round"):
        found = mask(accessories=glasses)
        assert (found == PARTS.index("eyes")).sum() == eyes
        assert 1000 < (found == PARTS.index("accessories")).sum() < 1900  # shadows would add 400


def test_landmarks_are_where_the_parts_are(renderer):
    size = 280
    for pose in (STRAIGHT, Pose(1.1, -8.0, 5.0, 3.0), Pose(0.95, 8.0, -6.0, 9.0)):
        points = landmarks(pose, size)
        assert points.keys() == LANDMARKS.keys()
        part = np.asarray(renderer.mask(Avatar(PLAIN, pose), size))
        pairs = {"eyes": ["left_eye", "right_eye"], "eyebrows": ["left_eyebrow", "right_eyebrow"]}
        for name in ("eyes", "eyebrows", "nose", "mouth"):
            ys, xs = np.nonzero(part == PARTS.index(name))
            expected = [points[point] for point in pairs.get(name, [name])]
            assert xs.mean() + 0.5 == pytest.approx(np.mean([x for x, _ in expected]), abs=2)
            assert ys.mean() + 0.5 == pytest.approx(np.mean([y for _, y in expected]), abs=2.5)
            if name in pairs:
                middle = xs.mean()
                assert xs[xs < middle].mean() + 0.5 == pytest.approx(expected[0][0], abs=3)
        # Just inside the chin and the ears is skin, well outside is not.
        skin = part == PARTS.index("skin")
        cx, cy = pose.apply(140.0, 117.0)
        for name in ("left_ear", "right_ear"):
            x, y = points[name]
            assert skin[int(y + 0.05 * (cy - y)), int(x + 0.05 * (cx - x))]
            assert not skin[int(y - 0.12 * (cy - y)), int(x - 0.12 * (cx - x))]


# --- The folder.


@pytest.fixture(scope="module")
def folder(definition, tmp_path_factory):
    path = tmp_path_factory.mktemp("avatars") / "out"
    assert make_avatars(path, 5, 32, seed=1, pairs=2) == (9, 0)
    return path


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written(folder):
    names = [f"{k:06d}.png" for k in range(5)]
    for part in ("images", "masks"):
        assert sorted(os.listdir(folder / part)) == names
        assert sorted(os.listdir(folder / "pairs" / part)) == [f"{k:06d}_{h}.png" for k in range(2) for h in "ab"]
    with Image.open(folder / "images/000003.png") as image, Image.open(folder / "masks/000003.png") as mask:
        assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (32, 32), "P", (32, 32))
        renderer = avatars._renderer()
        assert np.array_equal(np.asarray(image), np.asarray(renderer.image(draw(1, 3), 32)))
        assert np.array_equal(np.asarray(mask), np.asarray(renderer.mask(draw(1, 3), 32)))
    table = rows(folder / "attributes.csv")
    assert [row["image"] for row in table] == names
    for k, row in enumerate(table):
        choices = draw(1, k).choices
        expected = {"image": names[k], **{n: str(v) for n, v in labels(choices).items()}, **shown(choices)}
        assert row == expected
    points = rows(folder / "landmarks.csv")[2]
    pose = draw(1, 2).pose
    assert float(points["chin_y"]) == pytest.approx(landmarks(pose, 32)["chin"][1], abs=1e-3)
    assert [float(points[name]) for name in Pose._fields] == list(pose)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 1 and manifest["size"] == 32 and manifest["parts"] == list(PARTS)
    readme = (folder / "README.md").read_text()
    assert "not photographs" in readme and "free for personal and commercial" in " ".join(readme.split())
    assert not [p for p in folder.rglob(".*")]


def test_pairs_are_named(folder):
    attributes = {row["image"]: row for row in rows(folder / "pairs/attributes.csv")}
    for row in rows(folder / "pairs/pairs.csv"):
        first, second = attributes[row["first"]], attributes[row["second"]]
        differ = {name for name in CHOICES if first[name] != second[name]}
        assert row["attribute"] in differ <= {row["attribute"], *DEPENDENT.get(row["attribute"], ())}
        assert (first[row["attribute"]], second[row["attribute"]]) == (row["before"], row["after"])
        images = [(folder / "pairs/images" / row[which]).read_bytes() for which in ("first", "second")]
        assert images[0] != images[1]


def test_image_k_is_the_same_whatever_count_pairs_and_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(avatars, "_CHUNK", 3)  # else so few are not worth a second process
    make_avatars(tmp_path / "more", 8, 32, seed=1, workers=2)
    few, more = contents(folder), contents(tmp_path / "more")
    assert len([name for name in more if name.startswith("images/")]) == 8
    for name, content in few.items():
        if name.startswith(("images/", "masks/")) or name in ("manifest.json", "README.md"):
            assert more[name] == content
        elif name in ("attributes.csv", "landmarks.csv"):
            assert more[name].startswith(content)


def test_a_stopped_run_is_completed_by_the_same_call(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    original, calls = Renderer.image, []

    def stop(self, avatar, size):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, avatar, size)

    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "image", stop)
        with pytest.raises(KeyboardInterrupt):
            make_avatars(out, 5, 32, seed=1, pairs=2)
    assert len(os.listdir(out / "images")) == 3 and not (out / "attributes.csv").exists()
    before = {p: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    assert make_avatars(out, 5, 32, seed=1, pairs=2) == (6, 3)
    assert contents(out) == contents(folder)
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())


def test_a_full_disk_is_one_line_and_leaves_whole_files(folder, tmp_path, monkeypatch):
    saved = []
    original = Image.Image.save

    def full(self, file, *args, **kwargs):
        saved.append(1)
        if len(saved) == 6:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(self, file, *args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"cannot write .*images/000002.png: No space left"):
            make_avatars(out, 5, 32, seed=1, pairs=2)
    assert sorted(os.listdir(out / "images")) == ["000000.png", "000001.png"]
    make_avatars(out, 5, 32, seed=1, pairs=2)
    assert contents(out) == contents(folder)


def test_a_larger_count_adds_and_a_smaller_one_removes_nothing(definition, tmp_path):
    make_avatars(tmp_path, 3, 16, pairs=1)
    (tmp_path / "images/notes.png").write_bytes(b"")
    assert make_avatars(tmp_path, 4, 16) == (1, 3)
    assert make_avatars(tmp_path, 2, 16, pairs=1) == (0, 4)
    assert [row["image"] for row in rows(tmp_path / "attributes.csv")] == [f"{k:06d}.png" for k in range(4)]
    assert len(rows(tmp_path / "pairs/pairs.csv")) == 1


def test_another_seed_size_or_version_is_refused(folder, monkeypatch):
    before = contents(folder)
    for arguments, have, ask in (((5, 32, 2), "seed 1", "seed 2"), ((5, 64, 1), "size 32", "size 64")):
        with pytest.raises(UserError, match=rf"holds avatars of {have}, not {ask}; choose another folder"):
            make_avatars(folder, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(avatars, "AVATARS_VERSION", 99)
        with pytest.raises(UserError, match="version 1, not version 99"):
            make_avatars(folder, 5, 32, 1)
    with monkeypatch.context() as patch:
        patch.setattr(avatars, "versions", lambda: {"dicebear-core": "9.0"})
        with pytest.raises(UserError, match=r"not packages dicebear-core 9\.0"):
            make_avatars(folder, 5, 32, 1)
    assert contents(folder) == before


def test_a_damaged_manifest_is_told_and_nothing_is_taken_for_plain_images(folder, tmp_path):
    own = tmp_path / "avatars"
    shutil.copytree(folder, own)
    path = own / "manifest.json"
    whole = path.read_bytes()
    damaged = (b"", whole[:100], b"[" * 10**5, b"null", b"\xff", whole.replace(b'"seed": 1', b'"seed": 2'), None,
               whole.replace(b'"format"', b'"fromat"'))  # fmt: skip
    for content in damaged:
        path.unlink() if content is None else path.write_bytes(content)
        for use in (is_avatars, lambda own: open_dataset(own, 32, 3), lambda own: make_avatars(own, 9, 32, seed=1)):
            with pytest.raises(UserError, match="manifest.json: missing or damaged.*draw them into another folder"):
                use(own)
        assert len(os.listdir(own / "images")) == len(os.listdir(folder / "images"))
    older = {name: value for name, value in json.loads(whole).items() if name != "manifest_sha256"}
    path.write_text(json.dumps(older))
    assert len(open_dataset(own, 32, 3)) == len(os.listdir(own / "images"))
    # A manifest of something else, and no README of ours.
    path.write_text("{}")
    (own / "README.md").write_text("mine")
    assert not is_avatars(own)


def test_a_folder_of_other_things_is_refused(definition, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty and holds no manifest.json"):
        make_avatars(tmp_path, 1)
    assert os.listdir(tmp_path) == ["photo.png"]
    with pytest.raises(UserError, match="a file has this name"):
        make_avatars(tmp_path / "photo.png", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count must be at least 0, not -1"),
        ({"count": 0}, "nothing to draw"),
        ({"count": 1, "size": 8}, "size must be from 16 to 2048, not 8"),
        ({"count": 1, "seed": -3}, "seed must be at least 0"),
        ({"count": 1, "pairs": -1}, "pairs must be at least 0"),
        ({"count": 1, "workers": 0}, "workers must be at least 1"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make_avatars(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_without_the_packages_the_line_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dicebear", None)
    with pytest.raises(UserError, match=r'not installed.*pip install "pdae_fast\[data\]"'):
        Renderer()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r'dicebear-core.*pip install "pdae_fast\[data\]"'):
        make_avatars(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_the_command(definition, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["avatars", "--out", str(out), "--count", "2", "--size", "16", "--pairs", "1", "--workers", "1"]
    assert cli.run(data_command.main, arguments) == 0
    printed = capsys.readouterr()
    assert f"{out}: 4 images drawn, 0 were there" in printed.out and "4/4" in printed.err
    assert cli.run(data_command.main, [*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.run(data_command.main, [*arguments, "--seed", "5"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "seed 0, not seed 5" in lines[0]
    for bad in ([], ["avatars"], ["avatars", "--out", str(out), "--count", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.run(data_command.main, bad)
        assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_readers_take_it(folder):
    dataset = open_dataset(folder, 32)
    assert dataset.names == [f"{k:06d}" for k in range(5)]  # neither masks nor pairs
    found = labels_for(dataset.names, folder / "attributes.csv")
    assert found.columns == list(labels(PLAIN)) and found.report() == ""
    assert found.values.tolist() == [list(labels(draw(1, k).choices).values()) for k in range(5)]
