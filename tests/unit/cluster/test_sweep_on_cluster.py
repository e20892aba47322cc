"""A sweep on a cluster of two nodes, which are processes of this machine: what is lost is measured again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from knormpress import KnormPress
from knormpress.cli.app import main
from knormpress.cluster import pool
from knormpress.cluster.devices import Device, devices_of
from knormpress.errors import KnormError
from knormpress.measure.cluster import run_on_cluster
from knormpress.measure.options import Candidates, Effort, Source
from knormpress.measure.sweep import SweepSettings, run
from knormpress.methods.method import Method
from knormpress.records.jsonl import read_records
from knormpress.records.schema import Record
from knormpress.show.progress import TerminalProgress
from tests.unit.cluster.conftest import Told, with_ray


def node(number: int, **changes: Any) -> dict[str, Any]:
    address = f"10.0.0.{number}"
    known = {"NodeID": f"id{number}", "Alive": True, "NodeName": address, "NodeManagerAddress": address}
    return known | {"NodeManagerHostname": f"host{number}", "Resources": {"CPU": 8.0, "memory": 1e9}} | changes


def test_a_device_is_a_gpu_with_its_share_of_the_cpus_or_all_cpus_of_a_node() -> None:
    nodes = [
        node(1),
        node(2, NodeName="second", Resources={"CPU": 9.0, "GPU": 2.0}),
        node(3, Alive=False),
        node(4, Resources={"memory": 1e9}),
    ]
    assert devices_of(nodes) == [
        Device("id1", "host1", 0, 8),
        Device("id2", "second", 1, 4, 0),
        Device("id2", "second", 1, 4, 1),
        Device("id2", "second", 0, 9),
    ]


def test_without_ray_the_extra_is_named(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KnormError, match=r"knormpress\[cluster\]"):
        run_on_cluster(settings, tmp_path / "results.jsonl", address="local")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["nowhere", "ray://127.0.0.1:10001", "127.0.0.1:many", "127.0.0.1:{closed}"])
def test_an_address_that_does_not_answer_is_told_of(settings: SweepSettings, tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    address = address.format(closed=closed)
    with pytest.raises(KnormError, match=re.escape(address)) as raised:
        run_on_cluster(settings, tmp_path / "results.jsonl", address=address)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_device_by_number_is_refused(settings: SweepSettings, tmp_path: Path) -> None:
    numbered = replace(settings, source=replace(settings.source, device=("cpu", "cuda:1")))
    with pytest.raises(KnormError, match=r"cuda:1.* use cuda$"):
        run_on_cluster(numbered, tmp_path / "results.jsonl", address="local")


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> SweepSettings:
    return SweepSettings(
        Candidates(keep_ratios=(1.0, 0.5), prune_after=16, plan=None),
        Effort(
            tasks=("passkey",),
            texts=1,
            prompt_tokens=(320, 384),
            new_tokens=3,
            samples=1,
            rounds=1,
            seconds=0.0,
            scored_tokens=32,
            cost=True,
        ),
        Source(model=str(model_folder), device=("cpu",), corpus=str(model_folder / "text.txt")),
    )


@pytest.fixture(scope="module")
def alone(settings: SweepSettings, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The sweep in this process."""
    return list(run(settings, tmp_path_factory.mktemp("alone") / "results.jsonl"))


def cells(records: list[Record]) -> list[tuple[int, float]]:
    return [(record.conditions.prompt_tokens, record.policy.keep_ratio) for record in records]


class TestStopped:
    pytestmark = with_ray

    def test_a_driver_that_was_stopped_leaves_no_worker_and_goes_on(
        self,
        head: Any,
        settings: SweepSettings,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Killed, then interrupted. A worker that was left would hold the CPU, and the next driver wait for ever."""
        path = tmp_path / "results.jsonl"
        words = {"model": settings.source.model, "corpus": settings.source.corpus, "device": "cpu", "output": tmp_path}
        words |= {"plan": "none", "keep_ratios": 0.5, "prune_after": 16, "prompt_tokens": "320,352,384,416"}
        words |= {"new_tokens": 3, "tasks": "none", "samples": 1, "rounds": 1, "seconds": 0, "ray": head.address}
        sweep = ["sweep", *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
        driver = subprocess.Popen([sys.executable, "-m", "knormpress", *sweep], stderr=subprocess.PIPE, text=True)
        limit = time.monotonic() + 600
        while not path.exists() and driver.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        driver.kill()
        _, errors = driver.communicate(timeout=120)
        assert path.exists(), errors
        before = list(read_records(path))
        assert 1 <= len(before) < 4

        timers: list[Timer] = []

        def interrupt_soon(self: TerminalProgress, done: int, total: int, doing: str) -> None:
            """Once a worker measures, and the driver waits for it."""
            if doing.endswith(": loading the model") and not timers:
                timers.append(Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
                timers[0].start()

        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(TerminalProgress, "step", interrupt_soon)
                status = main(sweep)
        finally:
            for timer in timers:
                timer.cancel()
            signal.signal(signal.SIGINT, handler)
        assert status == 130
        errors = capsys.readouterr().err
        assert errors.splitlines()[-1].startswith(f"stopped: finished cells are kept in {path}")
        assert "Traceback" not in errors

        assert main(sweep) == 0
        records = list(read_records(path))
        assert records[: len(before)] == before
        assert sorted(cells(records)) == [(320, 0.5), (352, 0.5), (384, 0.5), (416, 0.5)]


class TestOnCluster:
    pytestmark = with_ray

    def test_the_figures_are_those_of_one_machine(
        self, nodes: Any, settings: SweepSettings, alone: list[Record], tmp_path: Path
    ) -> None:
        path = tmp_path / "results.jsonl"
        told = Told()
        records = run_on_cluster(settings, path, address=nodes.address, progress=told)
        assert cells(records) == cells(alone) == [(320, 1.0), (320, 0.5), (384, 1.0), (384, 0.5)]
        for here, there in zip(alone, records, strict=True):
            assert there.quality == here.quality
            assert there.retrieval == here.retrieval
            assert there.retrieval is not None
            assert there.cost == here.cost
            assert there.memory.candidate_cache_bytes == here.memory.candidate_cache_bytes
            assert there.environment.model_copy(update={"node": None}) == here.environment
        assert {record.environment.node for record in records} == {"first", "second"}
        assert sorted(read_records(path), key=records.index) == records
        assert told.lines[0].startswith("text: ")
        # The same command again measures nothing.
        written = path.read_bytes()
        assert run_on_cluster(settings, path, address=nodes.address, progress=told) == records
        assert path.read_bytes() == written
        assert sum("2 of 2 cells" in line for line in told.lines) == 1

    def test_what_a_killed_worker_measured_is_measured_again(
        self, nodes: Any, settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "results.jsonl"
        told = Told()
        records = run_on_cluster(dying(settings), path, address=nodes.address, progress=told)
        assert Path("died").read_text(encoding="utf-8").count("\n") == 1
        assert cells(records) == [(320, 0.5), (384, 0.5)]
        assert len(list(read_records(path))) == 2
        (lost,) = (line for line in told.lines if "lost" in line)
        assert re.match(r"(first|second): .* a prompt of 3\d\d tokens on cpu: .*measured again$", lost)

    def test_a_worker_that_always_dies_ends_the_sweep(
        self, nodes: Any, settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(pool, "_TRIES", 1)
        with pytest.raises(KnormError, match=r"^(first|second): .*lost.*try 1 of 1"):
            run_on_cluster(shorter(dying(settings)), tmp_path / "results.jsonl", address=nodes.address)

    def test_what_no_node_can_measure_is_told_of(self, nodes: Any, settings: SweepSettings, tmp_path: Path) -> None:
        refused(settings, ("cpu", "cuda"), nodes, tmp_path, "^device is cuda, .*no GPU.*first, second")

    def test_a_node_whose_torch_lacks_its_device_is_named(
        self, nodes: Any, settings: SweepSettings, tmp_path: Path
    ) -> None:
        """What else a worker can't do, as loading a model that isn't there, is told in the same way."""
        if torch.cuda.is_available():
            pytest.skip("a GPU is here")
        third = nodes.add_node(num_cpus=1, num_gpus=1, node_name="third")
        refused(settings, ("cuda",), nodes, tmp_path, r"^third: device 'cuda' can't be used")
        nodes.remove_node(third)


def refused(settings: SweepSettings, devices: tuple[str, ...], nodes: Any, folder: Path, message: str) -> None:
    """The sweep on these devices ends with one line, and leaves nothing."""
    wrong = shorter(replace(settings, source=replace(settings.source, device=devices)))
    with pytest.raises(KnormError, match=message) as raised:
        run_on_cluster(wrong, folder / "results.jsonl", address=nodes.address)
    assert "\n" not in str(raised.value)
    assert list(folder.iterdir()) == []


def dying(settings: SweepSettings) -> SweepSettings:
    """The same grid with one cell a length, of a method that kills its worker."""
    return replace(settings, candidates=replace(settings.candidates, keep_ratios=(0.5,), method=f"{__name__}:dies"))


def shorter(settings: SweepSettings) -> SweepSettings:
    """The same grid with one length."""
    return replace(settings, effort=replace(settings.effort, prompt_tokens=settings.effort.prompt_tokens[:1]))


def dies(press: KnormPress) -> Method:
    """A method that kills its worker, the first time that one needs it."""
    if os.environ.get("RAY_RAYLET_PID") and not Path("died").exists():
        with Path("died").open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        os.kill(os.getpid(), signal.SIGKILL)
    return press
