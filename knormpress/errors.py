"""The one kind of error that is the user's to mend."""

from __future__ import annotations

__all__ = ["KnormError"]


class KnormError(ValueError):
    """Input or environment that KnormPress can't work with.

    The message is one line: what was got, what was wanted, what to do. The command line prints it without a traceback
    and exits with status 2; in a library call it is an ordinary ``ValueError``.
    """
