"""Attribute tables in the formats of CelebA, CelebAMask-HQ and CSV, and their labels for a folder's images."""

import pytest
import torch

from pdae_fast.data import labels_for, read_attributes
from pdae_fast.data.attributes import file_labels
from pdae_fast.errors import UserError

# CelebA pads with two spaces where a -1 would have its sign; CelebAMask-HQ has two after the name.
CELEBA = """\
3
Bald Smiling Young
000001.jpg -1  1  1
000002.jpg  1 -1 -1
000003.jpg -1 -1  1
"""
MASK_HQ = """\
2
Bald Smiling Young\x20
0.jpg  -1 1 1
1.jpg  1 -1 -1
"""
AVATARS = """\
image,beard,hat,hair_color
000000.png,0,1,none
000001.png,1,0,red
000002.png,0,0,black
"""


@pytest.fixture
def table(tmp_path):
    def write(text, name="table.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_celeba(table):
    found = read_attributes(table(CELEBA))
    assert found.images == ["000001", "000002", "000003"] and found.columns == ["Bald", "Smiling", "Young"]
    assert found.values.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 1]]
    assert read_attributes(table(CELEBA.replace("\n", "\r\n"))).values.tolist() == found.values.tolist()


def test_celebamask_hq(table):
    found = read_attributes(table(MASK_HQ))
    assert found.images == ["0", "1"] and found.values.tolist() == [[0, 1, 1], [1, 0, 0]]


def test_csv(table):
    found = read_attributes(table(AVATARS))
    assert found.columns == ["beard", "hat"] and found.values.tolist() == [[0, 1], [1, 0], [0, 0]]
    kaggle = "\ufeffimage_id,Bald,Smiling\r\n000001.jpg,-1,1\r\n000002.jpg,1,-1\r\n"
    assert read_attributes(table(kaggle)).values.tolist() == [[0, 1], [1, 0]]


def test_only_above_zero_is_positive(table):
    found = read_attributes(table("image,a\n1.png,-1\n2.png,0\n3.png,0.5\n4.png,2\n5.png,-0.5\n"))
    assert found.values[:, 0].tolist() == [0, 0, 1, 1, 0]


def test_columns_and_categories(table):
    path = table(AVATARS)
    found = read_attributes(path, ["hair_color=red", "hat", "hair_color"])
    assert found.columns == ["hair_color=red", "hat", "hair_color=black", "hair_color=none", "hair_color=red"]
    assert found.values.tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    with pytest.raises(UserError, match="no attribute shoes; there are beard, hat, hair_color"):
        read_attributes(path, ["shoes"])
    with pytest.raises(UserError, match="no attribute hair_color=blue; there are black, none, red"):
        read_attributes(path, ["hair_color=blue"])
    found = read_attributes(path, ["hair_color=red+black"])
    assert found.columns == ["hair_color=red+black"] and found.values.tolist() == [[0], [1], [1]]
    with pytest.raises(UserError, match=r"no attribute hair_color=red\+; there are black, none, red"):
        read_attributes(path, ["hair_color=red+"])
    spelt = read_attributes(table("image,c\n1.png,x+y\n2.png,x\n3.png,y\n"), ["c=x+y"])
    assert spelt.values.tolist() == [[1], [0], [0]]
    with pytest.raises(UserError, match="no column holds numbers; name the columns to use: c"):
        read_attributes(table("image,c\n1.png,x\n"))


def test_labels_follow_the_order_of_the_images(table):
    found = labels_for(["000003", "000001", "000002"], table(CELEBA))
    assert found.values.dtype == torch.uint8 and found.values.tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 0]]
    assert found.indices == [0, 1, 2] and found.missing == [] == found.extra and found.report() == ""


def test_missing_and_extra_images_are_reported(table):
    found = labels_for(["000009", "000002", "000008"], table(CELEBA), ["Young"])
    assert found.indices == [1] and found.values.tolist() == [[0]]
    assert found.missing == ["000009", "000008"] and found.extra == ["000001", "000003"]
    assert found.report() == (
        "2 images have no attributes (000009, 000008); 2 rows have no image (000001, 000003)"
    )  # fmt: skip
    with pytest.raises(UserError, match=r"2 images have no row \(000009, 000008\)"):
        labels_for(["000009", "000002", "000008"], table(CELEBA), allow_missing=False)


def test_extensions_and_folders_do_not_matter(table):
    path = table(CELEBA)
    found = labels_for(["img_align_celeba/000002", "a/b/000001.png", "000003.PNG"], path)
    assert found.indices == [0, 1, 2] and found.values[:, 0].tolist() == [1, 0, 0]
    # A dot in a name is no extension, and a row with folders of its own comes first.
    path = table("image,a\nv1.5.png,1\nx/1.png,1\n1.png,0\n")
    assert labels_for(["v1.5", "x/1", "y/1"], path).values[:, 0].tolist() == [1, 1, 0]


def test_two_images_cannot_share_a_row(table):
    with pytest.raises(UserError, match=r"the row 000002 fits several images \(train/000002, test/000002\)"):
        labels_for(["train/000002", "000001", "test/000002"], table(CELEBA))


def test_a_table_for_other_images(table):
    with pytest.raises(UserError, match=r"no row for any image: they are called x0 \.\.\., its rows 000001 \.\.\."):
        labels_for(["x0", "x1"], table(CELEBA))
    with pytest.raises(UserError, match="no row for any image"):
        labels_for([], table(CELEBA))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with ''; expected CelebA's text format"),
        ("hello\n", "starts with 'hello'"),
        ("3\n\n", "no attributes"),
        ("image,\n", "no images"),
        ("a,b\n", "no images"),
        ("1\nBald Bald\n1.jpg 1 1\n", "two columns Bald"),
        (CELEBA.replace("3\n", "4\n", 1), "3 rows, but its first line says 4"),
        (CELEBA.replace("3\n", "2\n", 1), "3 rows, but its first line says 2"),
        (CELEBA.replace(" -1 -1\n", " -1\n"), "line 4: 2 values, expected 3 after the image's name"),
        (CELEBA.replace("000003", "000002"), "line 5: the image 000002 a second time"),
        (AVATARS.replace("1,0,red", "1,0"), "line 3: 2 values, expected 3"),
        (AVATARS.replace("red", '"red'), "line"),
        (b"image,a\n\xff\xfe.png,1\n", "not a text file"),
    ],
)
def test_bad_tables_are_one_line(table, text, message):
    path = table(text)
    with pytest.raises(UserError) as caught:
        read_attributes(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match="cannot read .*gone.txt: No such file"):
        read_attributes(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="Is a directory"):
        read_attributes(tmp_path)


def write_table(path, names, values):
    lines = ["name,smile,glasses", *(f"{n},{a},{b}" for n, (a, b) in zip(names, values, strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["a", "b/c", "d"], ["a.png", "c.jpg", "d"]),
        (["256-00000", "256-00001", "256-00002"], ["0.jpg", "1.jpg", "2.jpg"]),  # CelebA-HQ
        (["None-0000000", "None-0000001", "None-0000002"], ["000001.jpg", "000002.jpg", "000003.jpg"]),  # CelebA
        (["256-00000", "256-00001", "256-00002"], ["256-00000", "256-00001", "256-00002"]),
    ],
)
def test_labels_of_a_file(tmp_path, names, rows):
    values = [(1, -1), (0, 1), (1, 1)]
    found = file_labels(names, write_table(tmp_path / "t.csv", rows, values))
    assert found.indices == [0, 1, 2] and found.columns == ["smile", "glasses"] and found.report() == ""
    assert found.values.tolist() == [[1, 0], [0, 1], [1, 1]]


def test_labels_of_an_lmdb_where_some_are_missing(tmp_path):
    """CelebA's image 100000 is number 99999 of the LMDB, not number 100000."""
    table = write_table(tmp_path / "t.csv", ["099999.jpg", "100000.jpg"], [(1, 0), (0, 1)])
    found = file_labels(["None-0099998", "None-0099999", "None-0100000"], table, ["glasses"])
    assert found.values.tolist() == [[0], [1]] and found.indices == [0, 1] and found.missing == ["None-0100000"]
    with pytest.raises(UserError, match="no row for any image"):
        file_labels(["256-00007"], table)
    with pytest.raises(UserError, match="no attribute hat"):
        file_labels(["None-0099998"], table, ["hat"])


NUMBERS = "3\na b\n1.jpg {} 1\n2.jpg -1 1\n3.jpg -1 -1\n"


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-Infinity", "1" * 5000, "1e999"])
@pytest.mark.parametrize("text", [NUMBERS, "image,a,b\n0,1,1\n1,{},1\n2,-1,0\n"], ids=["text", "csv"])
def test_numbers_that_are_none(tmp_path, text, value):
    path = tmp_path / "a.txt"
    path.write_text(text.format(value))
    with pytest.raises(UserError, match=r"a.txt, line 3: a is .*; expected a number in every row") as caught:
        read_attributes(path)
    assert len(str(caught.value)) < 200 + len(str(path))
    assert read_attributes(path, ["b"]).columns == ["b"]  # nobody asked for it


def test_an_empty_cell_is_said(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,a,b,c\n0,1,red,1\n1,,blue,1\n2,-1, ,0\n")
    with pytest.raises(UserError, match="a.csv, line 3: a has no value; expected a number in every row"):
        read_attributes(path)
    for column in ("b", "b=red"):
        with pytest.raises(UserError, match="a.csv, line 4: no b; expected a word in every row"):
            read_attributes(path, [column])
    assert read_attributes(path, ["c"]).values.tolist() == [[1], [1], [0]]


@pytest.mark.parametrize("first", ["²", "1" * 5000, "１２", "-3", "1.0"])
def test_a_first_line_that_is_no_count(tmp_path, first):
    path = tmp_path / "a.txt"
    path.write_text(f"{first}\na b\n1.jpg 1 1\n")
    with pytest.raises(UserError, match="starts with") as caught:
        read_attributes(path)
    assert "\n" not in str(caught.value)


def test_superscripts_are_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,a,b\n0,²,1\n1,³,0\n")
    assert read_attributes(path).columns == ["b"] and read_attributes(path, ["a=²"]).values.tolist() == [[1], [0]]


def test_a_header_that_no_csv_has(tmp_path):
    (tmp_path / "a.csv").write_text('image,"' + "a" * 200_000 + "\n")
    with pytest.raises(UserError, match="a.csv, line 1: field larger than field limit"):
        read_attributes(tmp_path / "a.csv")
