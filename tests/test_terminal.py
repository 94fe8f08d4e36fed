"""What people read in a terminal, beside what a pipe gets."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import textwrap

import pytest

from fl_lightning.evaluation.tables import plain_table
from fl_lightning.evaluation.uncertainty import Interval
from fl_lightning.terminal import Bar, TimeLeft, closing, command, duration, of_change, prose, table

ROWS = [
    {"strategy": "none", "local": 0.8, "change": None, "said of it": "as it is"},
    {"strategy": "ft", "local": 0.9, "change": Interval(0.1, 0.05, 0.15), "said of it": "gains [b]much[/b]"},
    {"strategy": "lp_ft", "local": 0.7, "change": Interval(-0.1, -0.15, -0.05), "said of it": "harms"},
    {"strategy": "ditto", "local": 0.8, "change": Interval(0.0, -0.05, 0.05), "said of it": "does not show"},
]


def in_terminal(columns: int, do, **environment: str) -> str:
    """What is written by a forked process whose standard output and error are a terminal of so many columns."""
    child, terminal = pty.fork()
    if child == 0:
        code = 1
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
            for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
                os.environ.pop(name, None)
            os.environ.update({"TERM": "xterm-256color", **environment})
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding="utf-8")
                for number in (1, 2)
            )  # not pytest's
            do()
            sys.stdout.flush()
            sys.stderr.flush()
            code = 0
        finally:
            os._exit(code)
    written = b""
    while True:
        try:
            some = os.read(terminal, 65536)
        except OSError:  # Linux says so at the end
            break
        if not some:
            break
        written += some
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)


def show_table() -> None:
    print(table(ROWS, best={"local": "max"}, tones={"change": of_change("change")}))


def test_a_pipe_gets_the_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    show_table()
    assert capsys.readouterr().out == plain_table(ROWS, best={"local": "max"}) + "\n"
    assert table(ROWS) == plain_table(ROWS)
    assert in_terminal(80, show_table, TERM="dumb").strip() == plain_table(ROWS, best={"local": "max"}).strip()


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_gets_colours(columns: int) -> None:
    written = in_terminal(columns, show_table)
    assert "\x1b[1m0.900*" in written  # bold
    assert "\x1b[1;31m-0.100 [-0.150, -0.050]" in written  # red
    assert "\x1b[32m" in written  # green
    assert "\x1b[2m" in written  # dim
    lines = without_codes(written).strip().splitlines()
    # The same words at the same places but for the rule.
    plain = plain_table(ROWS, best={"local": "max"}).splitlines()
    assert [line.split() for line in lines[:1] + lines[2:]] == [line.split() for line in plain[:1] + plain[2:]]
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("columns", [20, 33, 40])
def test_a_narrow_terminal_gets_every_cell(columns: int) -> None:
    written = without_codes(in_terminal(columns, show_table))
    for words in ("0.900*", "-0.100 [-0.150, -0.050]", "gains [b]much[/b]", "does not show"):
        assert words in written
    longest = max(len("strategy") + 2 + len("-0.100 [-0.150, -0.050]"), columns)
    assert max(len(line.rstrip()) for line in written.splitlines()) <= longest


def test_no_color() -> None:
    written = in_terminal(80, show_table, NO_COLOR="1")
    assert set(re.findall(r"\x1b\[([\d;]*)m", written)) <= {"0", "1", "2"}  # bold and dim are no colours
    assert "0.900*" in written


def test_prose_fills_lines_of_a_terminal_alone() -> None:
    text = f"{'word ' * 21}and\nso on.\nname: short\n\n{'word ' * 20}"
    assert prose(text) == text
    lines = in_terminal(60, lambda: print(prose(text))).splitlines()
    assert max(map(len, lines)) <= 60
    joined = " ".join(f"{'word ' * 21}and so on.".split())
    assert lines[: len(textwrap.wrap(joined, 60))] == textwrap.wrap(joined, 60)
    assert "name: short" in lines


def test_closing_lines_are_never_broken() -> None:
    command = "tensorboard --logdir '/a folder/" + "x" * 200 + "'"
    lines = {"run folder": "/a folder", "next": command}
    assert closing(lines) == f"run folder: /a folder\nnext:       {command}"
    assert without_codes(in_terminal(60, lambda: print(closing(lines)))).strip() == closing(lines)


def test_the_next_command_is_called_as_this_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    assert command("personalize") == "python personalize.py"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fl-train"])
    assert (command("personalize"), command("train")) == ("fl-personalize", "fl-train")


def test_time_left() -> None:
    """Of work that takes 2 s a unit after a first unit of 30 s."""
    now = [0.0]
    for slowly, expected in ((True, 2 * 7.0), (False, 34 / 3 * 7)):
        now[0] = 0.0
        left = TimeLeft(10, slowly, clock=lambda: now[0])
        assert left.words() == ""
        now[0] += 30
        left.add(1)
        assert (left.words() == "") == slowly
        for _ in range(2):
            now[0] += 2
            left.add(1)
        assert left.seconds == pytest.approx(expected)
        now[0] += 2
        left.add(7)
        assert left.seconds == 0


def test_duration() -> None:
    seconds = [0.4, 59, 89, 100, 3540, 3660, 6000, 36_000, 100_000]
    words = ["0 s", "59 s", "89 s", "2 min", "59 min", "1 h", "1 h 40 min", "10 h", "28 h"]
    assert list(map(duration, seconds)) == words


def draw() -> None:
    with Bar("rounds", 4, done=1, inner="clients") as bar:
        for number in range(3):
            bar.begin(2)
            bar.advance_inner()
            print(f"printed in {number}")
            bar.advance()
            bar.show("accuracy [0.5]")


@pytest.mark.parametrize("columns", [30, 80])
def test_bar(columns: int, capfd: pytest.CaptureFixture[str]) -> None:
    written = in_terminal(columns, draw)
    assert "4/4" in written or columns == 30
    assert all(f"printed in {number}" in written for number in range(3))
    # Wiped off at the end, and the cursor is back.
    assert written.rstrip().endswith(("\x1b[?25h", "\x1b[2K"))
    assert "\x1b[?25h" in written
    draw()  # no terminal
    got = capfd.readouterr()
    assert (got.out, got.err) == ("printed in 0\nprinted in 1\nprinted in 2\n", "")
