"""The one error class for problems that the user can fix."""

from __future__ import annotations

__all__ = ["KnormError"]


class KnormError(ValueError):
    """The input or the environment is one that KnormPress can't work with.

    The message is one line: what was given, what was wanted, what to do. The command line prints it without a traceback
    and exits with status 2. In a library call it is an ordinary ``ValueError``.
    """
