"""Whether the hub can be asked: against servers on this machine, that answer, refuse or say nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from knormpress.workload.hub import hub_reachable


class Hub(HTTPServer):
    """A server on this machine that answers every HEAD with ``status``."""

    status = 200
    asked = 0


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def test_a_hub_that_answers_is_reachable(hub: Hub) -> None:
    assert hub_reachable()


@pytest.mark.parametrize("status", [403, 407, 502, 503])
def test_a_hub_or_proxy_that_refuses_is_not(hub: Hub, status: int) -> None:
    hub.status = status
    assert not hub_reachable()
    assert hub.asked == 1


def test_offline_mode_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_reachable()
    assert hub.asked == 0


@pytest.mark.parametrize("endpoint", ["http://no-such-host.invalid", "nonsense", "http://127.0.0.1:1"])
def test_an_endpoint_that_is_not_there_is_no_hub_and_no_noise(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], endpoint: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert not hub_reachable()
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        asking = threading.Thread(target=lambda: answers.append(hub_reachable(timeout_s=0.2)), daemon=True)
        asking.start()
        asking.join(timeout=60)
        assert answers == [False]
