"""Every fenced block of the documentation does what it shows: code runs, commands parse, workflows are sound."""

from __future__ import annotations

import configparser
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from _pytest.config import get_config
from markupsafe import Markup
from matplotlib.figure import Figure

import knormpress.measure.latency
import knormpress.workload.corpora
import knormpress.workload.models
import tests.perf.conftest
import tests.quality.conftest
from knormpress import KnormPress
from knormpress.cache.fingerprint import model_fingerprint
from knormpress.cli.app import app, main
from knormpress.measure import options
from knormpress.policy import plan as plan_file
from knormpress.records.plan import write_plan
from knormpress.show.page import report
from knormpress.tune import search, texts
from knormpress.workload.models import load_model
from tests.plan_factory import make_plan
from tests.tiny_folder import save_model, save_text
from tests.unit.test_packaging import PROJECT

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE_CN = ROOT / "USAGE_GUIDE_CN.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, GUIDE_CN, ROOT / "CONTRIBUTING.md", *DOCS]
SCRIPTS = {"baseline_test.py": "baseline", "optimized_test.py": "sweep", "visualize_results.py": "plot"}
LANGUAGES = {"python", "bash", "yaml", "toml"}
OUR_ACTION = "OWNER/knormpress@COMMIT # v1"


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [Block(each[1], each[2], page[: each.start()].count("\n") + 1) for each in found]


def of(path: Path, language: str) -> list[Block]:
    return [block for block in blocks(path.read_text(encoding="utf-8")) if block.language == language]


def by_page(language: str) -> Any:
    return pytest.mark.parametrize("path", [path for path in PAGES if of(path, language)], ids=lambda path: path.name)


def run_python(page: list[Block], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a page's blocks in one namespace; what a comment `# -> ` says must have been printed, in that order."""
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for block in page:
            file = re.match(r"# (\w+\.py)\n", block.text)
            if file:
                Path(file[1]).write_text(block.text, encoding="utf-8")
            # Blank lines in front make the lines of a traceback those of the page.
            exec(compile("\n" * block.line + block.text, name, "exec"), namespace)
            printed = iter(capsys.readouterr().out.splitlines())
            for told in re.findall(r"# -> (.+)", block.text):
                assert told in printed, f"{name} line {block.line} did not print {told!r}"
    finally:
        # Its functions hold on to it, and what it holds would outlive the test: frozen garbage is never collected.
        namespace.clear()


def commands(text: str) -> list[list[str]]:
    """The words of each command in lines of shell, without settings of the environment and redirections."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" >> ")[0], comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while "=" in command[0]:
                command = command[1:]
            found.append(command)
    return found


def without_python(words: list[str]) -> list[str]:
    """A command without the `python -m` in front of it, and without the folder of its program."""
    words = [Path(words[0]).name, *words[1:]]
    return words[2:] if words[0].startswith("python") and words[1] == "-m" else words


def knormpress_arguments(words: list[str]) -> list[str] | None:
    """What `knormpress` is given, by its own name or by that of a script of the guide; None for other commands."""
    program, *arguments = without_python(words)
    if program.startswith("python") and arguments[0] in SCRIPTS:
        return [SCRIPTS[arguments[0]], *arguments[1:]]
    return arguments if program == "knormpress" else None


def check_command(words: list[str], parser: pytest.Parser) -> None:
    """Have the real command line of each program read its words, and fail on what it doesn't know."""
    program, *arguments = without_python(words)
    own = knormpress_arguments(words)
    if own is not None:
        arguments = own
        group = typer.main.get_command(app)
        with group.make_context("knormpress", arguments[:1]) as context:
            assert isinstance(group, typer.core.TyperGroup)
            name, command, rest = group.resolve_command(context, arguments)
            assert command is not None
            command.make_context(name, rest, parent=context)
    elif program == "pytest":
        known, unknown = parser.parse_known_and_unknown_args(arguments)
        assert not unknown, f"pytest knows no {unknown}"
        for place in known.file_or_dir:
            assert (ROOT / place).exists() or place.startswith("test_my_"), f"there is no {place}"
    elif program == "tox":
        tox = configparser.ConfigParser(interpolation=None)
        tox.read(ROOT / "tox.ini", encoding="utf-8")
        factors = {name for section in tox.sections() for name in re.split(r"[:{},]", section)}
        for name in arguments[1:2] if arguments[:1] == ["-e"] else []:
            assert name in factors, f"tox.ini has no {name}"
    elif program == "pip":
        extras = [
            extra for word in arguments for names in re.findall(r"^\.\[(.+)\]$", word) for extra in names.split(",")
        ]
        assert set(extras) <= set(PROJECT["optional-dependencies"]), f"not all of {extras} are extras"
    elif program.startswith("tests."):
        assert (ROOT / program.replace(".", "/")).with_suffix(".py").exists(), f"there is no {program}"
    elif program not in ("venv", "cat", "ray", "srun"):
        raise AssertionError(f"nothing here knows how to check {program}")


@pytest.fixture(scope="module")
def parser() -> pytest.Parser:
    """pytest's own, with the options of the installed plugins, and of the perf and quality tests."""
    config = get_config()
    config.pluginmanager.load_setuptools_entrypoints("pytest11")
    config.pluginmanager.register(tests.perf.conftest)
    config.pluginmanager.register(tests.quality.conftest)
    return config._parser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text, and a plan for the model; made once for all pages."""
    path = tmp_path_factory.mktemp("site")
    folder = save_model(path / "tiny", positions=8_192)
    save_text(path / "wikitext-2-valid.txt", characters=30_000)
    fingerprint = model_fingerprint(load_model(str(folder), device=torch.device("cpu")).model)
    press = KnormPress(layer_keep_ratios=(1.0, 0.5, 0.25), prune_after=16)
    model = {"name": "tiny", "dtype": "float32", "fingerprint": fingerprint}
    write_plan(make_plan(press=press, model=model, frontier=(), sensitivities=None, kept=None), path / "plan.json")
    return path


@pytest.fixture
def folder(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a page: the default model is tiny, so is the offline text, and there is a plan."""
    monkeypatch.chdir(tmp_path)
    models = knormpress.workload.models
    monkeypatch.setattr(models, "_default", lambda: models._named(str(site / "tiny")))
    monkeypatch.setattr(knormpress.workload.corpora, "_online", lambda: False)
    text = (site / "wikitext-2-valid.txt").read_text(encoding="ascii")
    monkeypatch.setattr(pydoc_data.topics, "topics", {"tiny": text})
    # The speed check takes longer than what is measured here.
    monkeypatch.setattr(knormpress.measure.latency, "calibrate", lambda device: 1.0)
    (tmp_path / "results").mkdir()
    shutil.copy(site / "plan.json", tmp_path / "results")
    monkeypatch.setattr(plan_file, "_SHIPPED", site)
    shutil.copy(site / "wikitext-2-valid.txt", tmp_path)
    return tmp_path


def test_every_block_is_of_a_language_that_is_checked() -> None:
    for path in PAGES:
        found = blocks(path.read_text(encoding="utf-8"))
        assert {block.language for block in found} <= LANGUAGES, path.name
        assert 2 * len(found) == len(re.findall(r"^ *```", path.read_text(encoding="utf-8"), re.MULTILINE)), path.name


@by_page("python")
def test_python_runs(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grad = torch.is_grad_enabled()
    try:
        run_python(of(path, "python"), path.name, capsys)
    finally:
        torch.set_grad_enabled(grad)


@by_page("bash")
def test_commands_are_known(path: Path, parser: pytest.Parser) -> None:
    for block in of(path, "bash"):
        for words in commands(block.text):
            check_command(words, parser)


MADE_QUICK = {
    "sweep": ["--quick"],
    "baseline": ["--quick"],
    "tune": ["--minutes", "1", "--context", "512"],
    "lm-eval": ["--limit", "1"],
}
"""What commands get so that they take seconds: of two equal options the last holds, which is that of the page."""


@pytest.fixture
def _quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run and one text, also where a page asks for more, and a short search. What is drawn has its own tests."""
    for name, number in {"rounds": 1, "new_tokens": 2, "samples": 1}.items():
        monkeypatch.setitem(options._QUICK, name, number)
    for name in ("CALIBRATION_TEXTS", "HELD_OUT_TEXTS"):
        monkeypatch.setattr(texts, name, 1)
    for name in ("_COMPARED", "_UNIFORM", "_OTHER_RATIOS"):
        monkeypatch.setattr(search, name, (0.5,))
    monkeypatch.setattr(report, "inline_svg", lambda chart, identifier: Markup("<svg></svg>"))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: path.touch())


class Shown(NamedTuple):
    """A `knormpress` command of a page, and whether it is told to find modules in the current folder."""

    arguments: list[str]
    finds_modules: bool


def shown_runs(path: Path) -> list[Shown]:
    """The `knormpress` commands and the guide's scripts of a page, but for stored runs, own tests and clusters."""
    found = []
    for line in (line for block in of(path, "bash") for line in block.text.replace("\\\n", " ").splitlines()):
        for arguments in filter(None, map(knormpress_arguments, commands(line))):
            if arguments[0] not in ("compare", "accept", "rename", "selftest") and "--ray" not in arguments:
                found.append(Shown(arguments, "PYTHONPATH=. " in line))
    return found


def runs_by_page() -> dict[Path, list[Shown]]:
    """The commands that each page is the first to show: what several pages show is run once."""
    seen: list[Shown] = []
    found = {}
    for path in PAGES:
        found[path] = [shown for shown in shown_runs(path) if shown not in seen]
        seen += found[path]
    return {path: shown for path, shown in found.items() if shown}


RUNS = runs_by_page()


@pytest.mark.usefixtures("_quicker")
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_commands_of_knormpress_run(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, one after the other as on the page."""
    for block in of(path, "python"):
        if module := re.match(r"# (\w+\.py)\n", block.text):
            (folder / module[1]).write_text(block.text, encoding="utf-8")
    if path.name == "your-own-method.md":  # it continues from the README's sweep
        assert main(["sweep", *MADE_QUICK["sweep"], "--keep-ratios", "0.9"]) == 0
    if path.name == "lm-eval.md":
        run_python(of(path, "python")[:1], path.name, capsys)
    try:
        for (command, *given), finds_modules in RUNS[path]:
            with monkeypatch.context() as patched:
                if finds_modules:
                    patched.syspath_prepend(folder)
                status = main([command, *MADE_QUICK.get(command, []), *given])
            assert status == 0, f"{command} {shlex.join(given)}: {capsys.readouterr().err}"
    finally:
        sys.modules.pop("my_module", None)


def test_the_chinese_guide_shows_the_commands_of_the_readme() -> None:
    shown = [[words for block in of(path, "bash") for words in commands(block.text)] for path in (README, GUIDE_CN)]
    assert shown[0] == shown[1]


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 128] == []


def test_the_tests_of_a_method_of_ones_own_run_as_shown(run: Callable[..., pytest.RunResult]) -> None:
    page = ROOT / "docs" / "your-own-method.md"
    module, shown = of(page, "python")
    Path("my_module.py").write_text(module.text, encoding="utf-8")
    (words,) = [words for words in commands(of(page, "bash")[0].text) if words[0] == "pytest"]
    # The options of the page, but for the file: it has another name in the test.
    result = run(shown.text, *words[2:], keep_ratios=None, ppl_tolerance="1e6", samples=2)
    # The text is too short for as many documents as the quality gate needs.
    result.assert_outcomes(passed=2, xfailed=2)
    result.stdout.fnmatch_lines(["4 no-baseline"])
    assert sum(len(block.text.strip().splitlines()) for block in (module, shown)) <= 30


def test_the_retrieval_test_runs_as_shown(run: Callable[..., pytest.RunResult]) -> None:
    (shown,) = [block for block in of(ROOT / "docs" / "measuring.md", "python") if "def test_" in block.text]
    # A model with fresh weights finds nothing; its text is too short for prose.
    result = run(shown.text.replace("texts=8", 'tasks=["passkey"], texts=2'))
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["*no task gates*", "*the full cache solves 0 of 2*"])


@by_page("toml")
def test_settings_are_known(path: Path, parser: pytest.Parser) -> None:
    tomllib = pytest.importorskip("tomllib")
    for block in of(path, "toml"):
        settings = tomllib.loads(block.text)
        given = settings.get("tool", {}).get("pytest", {}).get("ini_options", {})
        assert set(given) <= set(parser._inidict)
        assert given or settings["project"]["entry-points"]["knormpress.methods"]


@by_page("yaml")
def test_workflows_pin_actions_and_run_known_commands(path: Path, parser: pytest.Parser) -> None:
    for block in of(path, "yaml"):
        steps = [step for job in yaml.safe_load(block.text)["jobs"].values() for step in job["steps"]]
        for step in steps:
            for words in commands(step.get("run", "")):
                check_command(words, parser)
        used = re.findall(r"uses: (.+)", block.text)
        assert len(used) == sum("uses" in step for step in steps)
        ours = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
        others = [action for action in used if action != OUR_ACTION]
        assert all(f"uses: {action}\n" in ours for action in others), "not the pins that Dependabot keeps up to date"


def lint(tool: str, workflow: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Check a workflow with the command of `tox -e lint`."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    lines = [line.partition(" -- ")[2].split() for line in tox["testenv:lint"]["commands"].splitlines()]
    (command,) = [words for words in lines if words[:1] == [tool] and any(word.startswith(".github") for word in words)]
    found = shutil.which(tool, path=str(Path(sys.executable).parent))
    if found is None and "CI" not in os.environ:
        pytest.skip(f"{tool} is not installed")
    assert found, f"{tool} is not installed"
    shutil.copytree(ROOT / ".github", folder / ".github")
    shutil.copy(ROOT / "action.yml", folder)
    # The page leaves open which commit it is; what counts is that it is one.
    workflow = workflow.replace(OUR_ACTION, f"owner/knormpress@{'0' * 40} # v1")
    (folder / ".github" / "workflows" / "ci.yml").write_text(workflow, encoding="utf-8")
    return subprocess.run([found, *command[1:]], cwd=folder, capture_output=True, text=True, check=False)


@by_page("yaml")
@pytest.mark.parametrize("tool", ["zizmor", "check-jsonschema"])
def test_workflows_pass_the_checks_of_our_own(tool: str, path: Path, tmp_path: Path) -> None:
    for block in of(path, "yaml"):
        done = lint(tool, block.text, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def anchors(page: str) -> set[str]:
    """What links can lead to in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def dead_links(text: str, path: Path) -> list[str]:
    """The links of a page at ``path`` that lead to no file or no heading of this repository."""
    dead = []
    for link in re.findall(r"\]\(((?!https?://)[^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path.read_text(encoding="utf-8"), path) == []


def test_control_a_dead_link_is_found() -> None:
    text = "[a](docs/none.md) [b](README.md#nowhere) [c](#nowhere) [d](README.md) [e](docs/gates.md#the-reference)"
    assert dead_links(text, README) == ["docs/none.md", "README.md#nowhere", "#nowhere"]


@pytest.mark.parametrize("guide", [README, GUIDE_CN], ids=lambda path: path.name)
def test_every_page_can_be_reached(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in text] == []


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_the_stations_of_a_keep_ratio_are_in_the_code() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| `([\w/]+\.py)` \| `(\w+)` \|$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 20
    for file, name in rows:
        code = (ROOT / "knormpress" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b", code, re.MULTILINE) or f"    {name}:" in code, (
            f"{file} has no {name}"
        )


def test_the_files_that_are_named_are_there() -> None:
    for file in re.findall(r"`((?:[\w]+/)+\w+\.py)`", ARCHITECTURE.read_text(encoding="utf-8")):
        assert (ROOT / "knormpress" / file).is_file(), file


def test_the_map_shows_every_folder() -> None:
    shown = re.findall(r'class="name"[^>]*>(\w+)/<', (ROOT / "docs" / "images" / "architecture.svg").read_text("utf-8"))
    assert sorted(shown) == sorted(path.parent.name for path in (ROOT / "knormpress").glob("*/__init__.py"))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("knormpress sweep --keep-ratio 0.9", "No such option"),
        ("knormpress sweeep", "No such command"),
        ("knormpress plot --output", "requires an argument"),
        ("python optimized_test.py --num_wikitext_sample 3", "No such option"),
        ("pytest tests/perf --knorm-keep-ratio 0.9", "pytest knows no"),
        ("pytest tests/performance", "there is no"),
        ("PYTHONPATH=. pytest tests/perf && knormpress compare --base main", "No such option"),
        ("python3 -m venv .venv && .venv/bin/tox -e demon", "has no demon"),
        ('pip install ".[harnes]"', "are extras"),
        ("make docs", "how to check make"),
    ],
)
def test_control_a_broken_command_fails(broken: str, reason: str, parser: pytest.Parser) -> None:
    # What typer raises for a command line that it can't parse differs between its versions.
    *before, last = commands(broken)
    for words in before:
        check_command(words, parser)
    with pytest.raises(Exception, match=reason):
        check_command(last, parser)


@pytest.mark.parametrize(
    "broken",
    ["from knormpress import KnormPres\n", "print(1 + 1)  # -> 3\n", "assert False, 'as shown'\n", "if\n"],
)
def test_control_a_broken_block_fails(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = blocks(f"Text.\n\n```python\nx = 1\n```\n\n```python\n{broken}```\n")
    assert [(block.language, block.line) for block in page] == [("python", 3), ("python", 7)]
    with pytest.raises((ImportError, AssertionError, SyntaxError)):
        run_python(page, "page.md", capsys)


@pytest.mark.parametrize("tool", ["zizmor", "check-jsonschema"])
def test_control_a_broken_workflow_fails(tool: str, tmp_path: Path) -> None:
    (block,) = of(ROOT / "docs" / "ci.md", "yaml")
    broken = re.sub(r"@[0-9a-f]{40} # (v\d)[.\d]+", r"@\1", block.text).replace("runs-on", "run-on")
    assert lint(tool, broken, tmp_path).returncode != 0
