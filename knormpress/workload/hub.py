"""Check quickly and silently whether the Hugging Face Hub can be reached."""

from __future__ import annotations

import threading

from huggingface_hub import constants, get_session

__all__ = ["HUB_TIMEOUT_S", "hub_reachable"]

HUB_TIMEOUT_S = 2.0
"""Seconds that ``hub_reachable`` waits for an answer."""


def hub_reachable(timeout_s: float = HUB_TIMEOUT_S) -> bool:
    """Whether the hub answers one small request within ``timeout_s`` seconds; never raises.

    With ``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE`` it is False without a request. ``HF_ENDPOINT`` and the usual
    proxy variables are used, since the request goes through huggingface_hub's own session.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout_s).is_success)
        except Exception:
            # Name lookup, TLS, proxy, a malformed endpoint: in all cases the hub can't be used.
            answers.append(False)

    # The HTTP client's time limit does not cover name lookup, so the request runs in a thread that may be abandoned.
    asking = threading.Thread(target=ask, name="knormpress-hub", daemon=True)
    asking.start()
    asking.join(timeout_s)
    return answers == [True]
