"""Files that are never half-written, and what killed processes leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gkl import atomic
from gkl.atomic import atomically


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    with atomically(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomically(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError), atomically(path / "below") as temporary:
        temporary.write_text("x")


def test_a_write_that_fails_says_where(tmp_path: Path) -> None:
    """write(2) does not: a full disk was told without a name."""
    with pytest.raises(OSError) as error, atomically(tmp_path / "file"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert error.value.filename == str(tmp_path / "file")


def test_a_folder_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for words in ("first", "second"):
        try:
            with atomically(path) as temporary:
                (temporary / "part").mkdir(parents=True)
                (temporary / "part/file").write_text(words)
        except OSError:
            assert words == "second"  # a folder that is there stays
    assert (path / "part/file").read_text() == "first" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from gkl.atomic import atomically
with atomically(Path(sys.argv[1])) as temporary:
    temporary.mkdir() if sys.argv[2] == "folder" else temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    killed = subprocess.run([sys.executable, "-c", KILLED, path, kind], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = tmp_path / ".another.1.tmp"
    others.write_text("")
    with atomically(path) as temporary:  # another machine may be writing it
        temporary.write_text("whole")
    assert left.exists() and path.read_text() == "whole"
    ago = time.time() - atomic.UNCHANGED_SECONDS
    os.utime(left, (ago, ago))
    with atomically(path) as temporary:
        temporary.write_text("whole")
    assert not left.exists() and others.exists()
