"""Unit tests compute on tiny models, which several threads only slow down; the plugin runs in a stranger's folder.

torch and all that stands on it are imported where they are used: a process that only hands out tests to workers of
pytest-xdist needs none of it.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from matplotlib.backend_bases import RendererBase
    from matplotlib.text import Text

    from tests.pictures import Drawn

Run = Callable[..., pytest.RunResult]

SLOW = (
    "test_sweep_on_cluster.py",
    "test_tune_on_cluster.py",
    "test_docs.py",
    "test_action.py",
    "test_pictures.py",
    "test_compare.py",
    "test_workers.py",
    "test_lm_eval.py",
    "test_cost.py",
    "test_counts.py",
    "test_sweep.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files come first, so that workers of pytest-xdist end at about the same time."""
    # pytester forgets what a run imports, and datasets can't be imported twice.
    import datasets  # noqa: F401
    import torch

    import knormpress.pytest_plugin.measured
    import knormpress.show.verdict_table  # noqa: F401

    torch.set_num_threads(1)
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Measuring collects garbage before each run: 0.1 s for all that torch and transformers hold.

    What is frozen here stays so, whatever a measurement unfreezes after itself.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_list_of_packages() -> Iterator[None]:
    """lm-evaluation-harness asks pip and others about the machine for each result: seconds, for nothing used here."""
    from torch.utils import collect_env

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", str)
        yield


@pytest.fixture(scope="module", autouse=True)
def _benches_of_their_own() -> None:
    """A session keeps its model and environment, of which the commit of the folder that it ran in is a part."""
    from knormpress.pytest_plugin import plugin

    plugin._bench.cache_clear()


@pytest.fixture(autouse=True)
def _keep_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture(autouse=True)
def _runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of pytest inside a test is no worker of pytest-xdist, whatever the test itself runs in."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    """Every text that is really drawn, with its box in pixels: an axis also holds labels that it never draws."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts: Drawn = defaultdict(list)
    draw: Callable[..., Any] = Text.draw

    def watched(self: Text, renderer: RendererBase, *args: Any, **kwargs: Any) -> None:
        draw(self, renderer, *args, **kwargs)
        figure = self.get_figure(root=True)
        if self.get_text().strip() and self.get_visible() and isinstance(figure, Figure):
            texts[figure].append((self.get_text(), self.get_window_extent(renderer)))

    monkeypatch.setattr(Text, "draw", watched)
    yield texts
    texts.clear()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_folder import save_model, save_text

    path = tmp_path_factory.mktemp("tiny")
    save_text(path / "text.txt", characters=4000)
    return save_model(path, positions=2048)


@pytest.fixture
def run(pytester: pytest.Pytester, model_folder: Path) -> Run:
    """Runs pytest on the test file given, with a tiny model and what else is given as options or settings."""

    def run(source: str, *arguments: str, ini: str = "", how: str = "options", **options: object) -> pytest.RunResult:
        given = {
            "model": model_folder,
            "corpus": model_folder / "text.txt",
            "device": "cpu",
            "seconds": 0,
            "prune_after": 16,
        }
        given |= {"samples": 8, "keep_ratios": "0.5"} | options
        settings, words = [ini], list(arguments)
        for name, value in given.items():
            if name in options and how == "ini":
                settings.append(f"knorm_{name} = {value}")
            elif value is not None:
                words.append(f"--knorm-{name.replace('_', '-')}={value}")
        pytester.makeini("\n".join(["[pytest]", *settings]))
        pytester.makepyfile(test_it=source)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rA", *words)

    return run
