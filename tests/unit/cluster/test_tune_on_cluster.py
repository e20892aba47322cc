"""A search on a cluster finds the plan of one machine, whatever is stopped or lost on the way."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from knormpress.cache.score import StoredTokens
from knormpress.cache.scores.keydiff import key_difference
from knormpress.cli.app import main
from knormpress.measure.options import Source
from knormpress.records.plan import Plan, read_plan
from knormpress.tune import search, texts
from knormpress.tune.cluster import tune_on_cluster
from knormpress.tune.search import Targets, tune
from knormpress.workload.bench import Bench
from knormpress.workload.corpora import load_corpus
from knormpress.workload.tasks.haystack import Haystack, haystacks
from tests.answered import answered
from tests.tiny_folder import save_model, save_text
from tests.unit.cluster.conftest import Told, with_ray

TARGETS = Targets(ppl=60.0, retrieval=0.2)
HOW: dict[str, Any] = {"scores": ("knorm", f"{__name__}:deadly"), "context": 512, "minutes": 10.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune")
    save_text(path / "text.txt", characters=14_000)
    return save_model(path, positions=2048)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source(model=str(folder), device=("cpu",), corpus=str(folder / "text.txt"))


@pytest.fixture(scope="module")
def command(source: Source) -> list[str]:
    given = {"model": source.model, "corpus": source.corpus, "context": 512, "target-retrieval": "none"}
    return ["tune", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few texts and policies, which the driver chooses for all nodes. They have the current folder too."""

    def findable(bench: Bench, tasks: Sequence[str], *, count: int, which: Any) -> list[Haystack]:
        return [answered(bench.model, prompt) for prompt in haystacks(bench, tasks, count=count, which=which)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "TASKS", ("passkey",))
    monkeypatch.setattr(texts, "haystacks", findable)
    numbers = {"CALIBRATION_SCORED": 32, "SCORED": 32, "CALIBRATION_TEXTS": 2, "HELD_OUT_TEXTS": 1}
    for name, number in numbers.items():
        monkeypatch.setattr(texts, name, number)
    for name in ("_COMPARED", "_UNIFORM", "_OTHER_RATIOS"):
        monkeypatch.setattr(search, name, (0.5,))


def deadly(tokens: StoredTokens) -> Tensor:
    """KeyDiff; where a worker finds a file called "die", it removes that and dies."""
    if os.environ.get("RAY_RAYLET_PID"):
        with suppress(FileNotFoundError):
            Path("die").unlink()  # by one alone
            os.kill(os.getpid(), signal.SIGKILL)
    return key_difference(tokens)


class Interrupts(Told):
    """Ctrl-C, once three layers were measured."""

    def step(self, done: int, total: int, doing: str) -> None:
        super().step(done, total, doing)
        if doing == "each layer alone" and done == 3:
            raise KeyboardInterrupt


def noted(path: Path) -> list[str]:
    return path.with_name("plan.json.search.jsonl").read_text(encoding="utf-8").splitlines()


def undated(plan: Plan) -> Plan:
    return plan.model_copy(update={"made": {}})


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says, which ends with status 2 and leaves no file."""
    assert main(arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert list(Path().iterdir()) == []
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "nowhere"], "HOST:PORT"),
        (["--ray", "127.0.0.1:1"], "nothing answers at --ray 127.0.0.1:1"),
        (["--ray", "local", "--device", "cuda:1"], "use cuda"),
        (["--ray", "local", "--device-map", "auto"], "--device-map"),
        (["--ray", "local", "--device", "cpu,cuda"], "name only one"),
    ],
)
def test_what_can_not_be_distributed_is_one_line(
    command: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    assert said in one_line(capsys, *command, "--output", "plan.json", *options)


class TestOnCluster:
    pytestmark = with_ray

    def test_stopped_and_with_a_lost_worker_the_plan_is_that_of_one_machine(
        self, nodes: Any, source: Source, tmp_path: Path
    ) -> None:
        """With the same measurements, bit for bit."""
        corpus = load_corpus(source.corpus)
        bench = Bench.open(source.model, corpus, device=torch.device("cpu"), dtype="float32")
        (tmp_path / "alone").mkdir()
        alone = tune(bench, TARGETS, tmp_path / "alone" / "plan.json", **HOW)
        assert alone.press.layer_scores is not None

        path = tmp_path / "plan.json"
        with pytest.raises(KeyboardInterrupt):
            tune_on_cluster(TARGETS, source, path, address=nodes.address, progress=Interrupts(), **HOW)
        before = noted(path)
        assert len(before) == 1 + 3

        Path("die").touch()
        told = Told()
        plan = tune_on_cluster(TARGETS, source, path, address=nodes.address, progress=told, **HOW)
        assert not Path("die").exists()
        assert undated(plan) == undated(alone)
        assert read_plan(path) == plan
        assert noted(path)[: len(before)] == before
        assert sorted(noted(path)) == sorted(noted(tmp_path / "alone" / "plan.json"))
        (lost,) = (line for line in told.lines if "the worker was lost" in line)
        assert lost.endswith("it is measured again")
        assert {f"{name}: reading the calibration texts" for name in ("first", "second")} <= told.steps

    def test_a_device_that_no_node_has_is_one_line(
        self, nodes: Any, command: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = one_line(capsys, *command, "--output", "plan.json", "--device", "cuda", "--ray", nodes.address)
        assert "no GPU; its nodes: first, second" in line

    def test_a_node_with_other_weights_is_refused(
        self,
        nodes: Any,
        folder: Path,
        command: list[str],
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What the driver opens is changed before the nodes open it."""
        changing = tmp_path_factory.mktemp("changing") / "model"
        shutil.copytree(folder, changing)
        sound = Bench.open

        def open_and_change(*given: Any, **how: Any) -> Bench:
            bench = sound(*given, **how)
            other = AutoModelForCausalLM.from_pretrained(changing)
            other.get_input_embeddings().weight.data.mul_(1.5)
            other.save_pretrained(changing)
            return bench

        monkeypatch.setattr(Bench, "open", open_and_change)
        words = [*command, "--model", str(changing), "--output", "plan.json", "--device", "cpu", "--ray", nodes.address]
        assert "its model has other weights than the driver's" in one_line(capsys, *words)
