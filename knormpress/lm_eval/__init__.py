"""Tasks of lm-evaluation-harness through the pruned cache: the model ``knormpress``, and a run beside the full cache.

Needs the extra ``lm-eval``. Importing ``knormpress.lm_eval.model`` registers the model. Imports what stands below.
"""

from __future__ import annotations

from importlib.util import find_spec

from knormpress.errors import KnormError

__all__ = ["expect_harness"]


def expect_harness() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        KnormError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise KnormError('lm-evaluation-harness is not installed; pip install "knormpress[lm-eval]"')
