"""One line of an error, of which Ray's have many."""

from __future__ import annotations

__all__ = ["first_line", "last_line"]


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not empty; the error's kind if there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line of the error's text that is not empty; the error's kind if there is none."""
    return next(filter(None, map(str.strip, reversed(str(error).splitlines()))), type(error).__name__)
