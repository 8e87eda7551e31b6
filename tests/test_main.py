"""`python -m pdae_fast` alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import pdae_fast
from pdae_fast import __main__ as listing
from pdae_fast import cli, export


def commands():
    """The modules and packages that `python -m` runs."""
    top, exports = Path(pdae_fast.__file__).parent, Path(export.__file__).parent
    modules = {path.stem for path in top.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    packages = {path.parent.name for path in [*top.glob("*/__main__.py"), *exports.glob("__main__.py")]}
    return modules - {"__main__"} | packages


def test_every_command_has_its_line(capsys):
    assert cli.run(listing.main, []) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[2:]] == list(listing.COMMANDS)
    assert set(listing.COMMANDS) == commands()
    assert max(map(len, printed)) <= 100


@pytest.mark.parametrize(
    ("word", "words"), [("reconstrct", "unknown command"), ("sample", "python -m pdae_fast.sample")]
)
def test_another_word_is_one_line(word, words, capsys):
    assert cli.run(listing.main, [word]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_it_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "pdae_fast", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "reconstruct" in run.stdout and not run.stderr
