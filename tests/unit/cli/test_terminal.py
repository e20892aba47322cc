"""What a command writes to a terminal: colours and a bar where they are wanted, and plain text where they are not."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from knormpress.cli.app import main
from tests.unit.cli.conftest import Swept

STYLE = re.compile(r"\x1b\[[\d;]*m")


def read_all(end: int) -> str:
    """All that is written to the other end of a terminal until it is closed."""
    written = b""
    while True:
        try:
            part = os.read(end, 65536)
        except OSError:  # so Linux tells that the other end is closed
            part = b""
        if not part:
            return written.decode()
        written += part


@contextmanager
def terminals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make stdout and stderr terminals; the list gets what was written to each."""
    texts: list[str] = []
    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patched:
        ends = [os.openpty() for _ in range(2)]
        written = [pool.submit(read_all, master) for master, _ in ends]
        for name, (_, slave) in zip(("stdout", "stderr"), ends, strict=True):
            patched.setattr(sys, name, os.fdopen(slave, "w", encoding="utf-8"))
        yield texts
        sys.stdout.close()
        sys.stderr.close()
        texts += [text.result(timeout=60) for text in written]
        for master, _ in ends:
            os.close(master)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals there")
def test_no_color_leaves_plain_text_on_a_terminal(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    sweep = swept.copied(tmp_path)
    with terminals(monkeypatch) as coloured:
        assert main(sweep) == 0
    monkeypatch.setenv("NO_COLOR", "1")
    with terminals(monkeypatch) as plain:
        assert main(sweep) == 0
    assert "Change against the full cache" in plain[0]
    assert "\x1b" not in plain[0]
    assert not STYLE.search(plain[1])
    assert STYLE.search(coloured[0])
    assert STYLE.search(coloured[1])
    assert STYLE.sub("", coloured[0]) == plain[0]
