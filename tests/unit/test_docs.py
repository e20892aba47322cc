"""Every fenced block of the documentation does what it shows: code runs, commands parse, workflows are sound."""

from __future__ import annotations

import configparser
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from _pytest.config import get_config

import knormpress.corpora
import knormpress.models
import tests.perf.conftest
from knormpress.cli import app, main
from tests.tiny_folder import save_model, save_text
from tests.unit.test_packaging import PROJECT
from tests.unit.test_plugin import plan_file
from tests.unit.test_workflows import lint

ROOT = Path(__file__).parents[2]
GUIDE_CN = ROOT / "USAGE_GUIDE_CN.md"
PAGES = [ROOT / "README.md", GUIDE_CN, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"baseline_test.py": "baseline", "optimized_test.py": "sweep", "visualize_results.py": "plot"}
LANGUAGES = {"python", "bash", "yaml", "toml"}


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
        extras = [extra for word in arguments for extra in re.findall(r"^\.\[(\w+)\]$", word)]
        assert set(extras) <= set(PROJECT["optional-dependencies"]), f"not all of {extras} are extras"
    elif program not in ("venv", "cat"):
        raise AssertionError(f"nothing here knows how to check {program}")


@pytest.fixture(scope="module")
def parser() -> pytest.Parser:
    """pytest's own, with the options of the installed plugins and of the perf tests."""
    config = get_config()
    config.pluginmanager.load_setuptools_entrypoints("pytest11")
    config.pluginmanager.register(tests.perf.conftest)
    return config._parser


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a page: the default model is tiny, and there is a plan for it."""
    monkeypatch.chdir(tmp_path)
    tiny = knormpress.models._Found(model_folder, "tiny", "fresh weights")
    monkeypatch.setattr(knormpress.models, "_default", lambda: tiny)
    (tmp_path / "results").mkdir()
    plan_file(model_folder, tmp_path / "results" / "plan.json")
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


QUICK = ["--rounds", "1", "--seconds", "0", "--new-tokens", "2", "--samples", "1"]
MADE_QUICK = {"sweep": QUICK, "baseline": QUICK, "tune": ["--minutes", "0.02"]}
"""What commands get where a page leaves it open, so that they take seconds: of two equal options the last holds."""


class Shown(NamedTuple):
    """A `knormpress` command of a page, and whether it is told to find modules in the current folder."""

    arguments: list[str]
    finds_modules: bool


def shown_runs(path: Path) -> list[Shown]:
    """The `knormpress` commands and the guide's scripts of a page, but for what compares commits."""
    found = []
    for line in (line for block in of(path, "bash") for line in block.text.replace("\\\n", " ").splitlines()):
        for arguments in filter(None, map(knormpress_arguments, commands(line))):
            if arguments[0] != "compare":
                found.append(Shown(arguments, "PYTHONPATH=. " in line))
    return found


RUN = [path for path in PAGES if shown_runs(path) and path != GUIDE_CN]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_commands_of_knormpress_run(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, one after the other as on the page."""
    save_text(folder / "wikitext-2-valid.txt", characters=30_000)
    tiny = knormpress.models._Found(save_model(folder / "tiny", positions=8_192), "tiny", "fresh weights")
    monkeypatch.setattr(knormpress.models, "_default", lambda: tiny)
    monkeypatch.setattr(knormpress.corpora, "_online", lambda: False)
    for block in of(path, "python"):
        if module := re.match(r"# (\w+\.py)\n", block.text):
            (folder / module[1]).write_text(block.text, encoding="utf-8")
    if path.name == "your-own-method.md":  # it goes on from the README's sweep
        assert main(["sweep", *QUICK]) == 0
    try:
        for (command, *given), finds_modules in shown_runs(path):
            with monkeypatch.context() as patched:
                if finds_modules:
                    patched.syspath_prepend(folder)
                status = main([command, *MADE_QUICK.get(command, []), *given])
            assert status == 0, f"{command} {shlex.join(given)}: {capsys.readouterr().err}"
    finally:
        sys.modules.pop("my_module", None)


def test_the_chinese_guide_shows_the_commands_of_the_readme() -> None:
    shown = [[words for block in of(path, "bash") for words in commands(block.text)] for path in (PAGES[0], GUIDE_CN)]
    assert shown[0] == shown[1]


def test_the_tests_of_a_method_of_ones_own_run_as_shown(run: Callable[..., pytest.RunResult]) -> None:
    page = ROOT / "docs" / "your-own-method.md"
    module, shown = of(page, "python")
    Path("my_module.py").write_text(module.text, encoding="utf-8")
    (words,) = [words for words in commands(of(page, "bash")[0].text) if words[0] == "pytest"]
    # The options of the page, but for the file: it has another name in the test.
    result = run(shown.text, *words[2:], keep_ratios=None, ppl_tolerance="1e6")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["4 no-baseline"])
    assert sum(len(block.text.strip().splitlines()) for block in (module, shown)) <= 30


def test_the_passkey_test_runs_as_shown(run: Callable[..., pytest.RunResult]) -> None:
    (shown,) = [block for block in of(ROOT / "docs" / "measuring.md", "python") if "def test_" in block.text]
    # A model with fresh weights finds no key.
    result = run(shown.text.replace("count=40", "count=2"))
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["*the full cache found no passkey*"])


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
        assert all(f"uses: {action}\n" in ours for action in used), "not the pins that Dependabot keeps up to date"


@by_page("yaml")
@pytest.mark.parametrize("tool", ["zizmor", "check-jsonschema"])
def test_workflows_pass_the_checks_of_our_own(tool: str, path: Path, tmp_path: Path) -> None:
    for block in of(path, "yaml"):
        done = lint(tool, block.text, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(((?!https?://)[^)#]+)", text):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


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
