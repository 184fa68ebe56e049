"""Text files: their encodings, line ends and kinds; private files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heretic.errors import UserError
from heretic.files import open_private, read_text, split_lines

FILE = Path("text.txt")


def code_of(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_text(path)
    return error.value.code


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_mark_and_line_ends_do_not_change_the_text(mark: bytes, end: str) -> None:
    FILE.write_bytes(mark + f"ä{end}{end}b".encode())
    assert read_text(FILE) == "ä\n\nb"


def test_only_line_ends_end_a_line() -> None:
    assert split_lines("a\u2028b\x85c\x0cd\x1ce\rf\r\ng\n\nh\n") == ["a\u2028b\x85c\x0cd\x1ce", "f", "g", "", "h"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a\nb".encode("utf-16"), 1),
        ("a\nb".encode("utf-16-be"), 1),
        ("a\nb".encode("utf-32"), 1),
        (b"a\r\nb\rc \xe4", 3),
        (b"\xef\xbb\xbfa\n\xff", 2),
        (b"a\nb\0", 2),
    ],
)
def test_other_encodings_are_refused_with_their_line(content: bytes, line: int) -> None:
    FILE.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(FILE)
    assert (error.value.code, error.value.where) == ("file-encoding", f"text.txt:{line}")


def test_only_regular_files_are_opened() -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    assert {code_of(Path(p)) for p in ("pipe", "link", ".", "/dev/zero", "/dev/null")} == {"not-a-regular-file"}
    assert code_of(Path("nowhere")) == "missing-file"
    assert code_of(Path("a\0b")) == code_of(Path("a" * 300)) == "unreadable-file"


def test_a_file_without_end_is_refused() -> None:
    FILE.touch()
    os.truncate(FILE, 2 << 30)
    assert code_of(FILE) == "file-too-large"


def test_the_locale_does_not_matter() -> None:
    FILE.write_text("ä", encoding="utf-8")
    program = "from pathlib import Path; from heretic.files import read_text; print(ascii(read_text(Path('text.txt'))))"
    environment = {"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout == "'\\xe4'\n"


def test_a_private_file_is_not_written_through_a_link() -> None:
    mine = Path("mine")
    mine.write_text("kept")
    Path("run.log").symlink_to(mine)
    for mode in ("a", "w"):
        with pytest.raises(UserError) as refused:
            open_private(Path("run.log"), mode)
        assert refused.value.code == "link-in-run-folder"
    assert mine.read_text() == "kept"
    before = os.umask(0)
    try:
        os.close(open_private(Path("fresh"), "a"))
    finally:
        os.umask(before)
    assert Path("fresh").stat().st_mode & 0o777 == 0o600
