"""Whether the Hugging Face Hub can be asked at all, found out quickly and without noise."""

from __future__ import annotations

import threading

from huggingface_hub import constants, get_session

__all__ = ["HUB_TIMEOUT_S", "hub_reachable"]

HUB_TIMEOUT_S = 2.0
"""Seconds that ``hub_reachable`` waits for an answer."""


def hub_reachable(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """True if the hub answers one small request within ``timeout_s`` seconds; never raises.

    ``HF_HUB_OFFLINE`` and ``TRANSFORMERS_OFFLINE`` make it False without a request; ``HF_ENDPOINT`` and the usual proxy
    variables are honoured, since the request goes through huggingface_hub's own session.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout_s).is_success)
        except Exception:
            # Name lookup, TLS, proxy, a malformed endpoint: whatever went wrong, there is no hub to ask.
            answers.append(False)

    # A name lookup obeys no time limit of the HTTP client, so the whole request is left behind when the time is up.
    asking = threading.Thread(target=ask, name="knormpress-hub", daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answers == [True]
