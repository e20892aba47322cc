"""The one error class for problems that the user can fix, and what errors of others say."""

from __future__ import annotations

__all__ = ["KnormError", "one_line"]


class KnormError(ValueError):
    """The input or the environment is one that KnormPress can't work with.

    The message is one line: what was given, what was wanted, what to do. The command line prints it without a traceback
    and exits with status 2. In a library call it is an ordinary ``ValueError``.
    """


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
