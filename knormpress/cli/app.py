"""The ``knormpress`` command: parsing, calls and messages. Slow imports are made where they are needed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from knormpress.cli.actions import Stopped, accept_loss, judge_runs, measure_cells, run_tasks, search_plan, write_page
from knormpress.cli.options import Cost, Fresh, Json, Output, Quick, Ray, number, taking
from knormpress.errors import KnormError
from knormpress.files import room_for, writing
from knormpress.measure.options import Candidates, Effort, Source, options_of, read_option, words

__all__ = ["app", "main"]

app = typer.Typer(
    help="Keep the KV-cache tokens with the lowest key norms, and measure honestly what that costs and gains.",
    epilog="""\b
Examples:
  knormpress doctor
  knormpress baseline
  knormpress sweep --keep_ratios 1.0,0.9,0.8,0.7 --num_wikitext_samples 3 --prune_after 512 --skip_layers 0
  knormpress plot
  knormpress report

Options may have dashes or underscores: --keep-ratios and --keep_ratios are the same.""",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)

Storage = Annotated[Path, typer.Option(help="pytest-benchmark's storage, which holds the stored runs.")]
_RESULTS = Path("results")
_SWEEP_FILE = "results.jsonl"
_BASELINE_FILE = "baseline.jsonl"
_PLAN_FILE = "plan.json"
_TASKS_FILE = "lm-eval.jsonl"
# The exit status that a shell reports for a command ended by SIGINT.
_STOPPED = 130


@app.command()
@taking(source=Source, effort=Effort)
def baseline(
    *,
    source: Source,
    effort: Effort,
    quick: Quick = False,
    output: Output = _RESULTS,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure the full cache alone.

    Prints its time, memory and perplexity. It is also measured in turn with itself, which shows how much two equal
    measurements differ on this machine.

    \b
    Examples:
      knormpress baseline
      knormpress baseline --device cuda --dtype bfloat16 --prompt-tokens 1024,8192
    """
    from knormpress.show.full_cache import describe_full_cache

    full = Candidates(keep_ratios=(1.0,), method="full", plan=None)
    effort = effort.quick() if quick else effort
    effort = replace(effort, tasks=effort.tasks or ())  # what the full cache finds is all that it could lose
    for record in measure_cells(full, effort, source, output / _BASELINE_FILE, fresh=fresh):
        if as_json:
            typer.echo(record.model_dump_json())
            continue
        typer.echo("")
        for line in describe_full_cache(record):
            typer.echo(line)


@app.command()
@taking(candidates=Candidates, source=Source, effort=Effort)
def sweep(
    *,
    candidates: Candidates,
    source: Source,
    effort: Effort,
    quick: Quick = False,
    cost: Cost = False,
    output: Output = _RESULTS,
    fresh: Fresh = False,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Compare keep ratios with the full cache.

    Prints each change with its interval, and judges the guide's targets and claims.
    Finished cells are kept in OUTPUT/results.jsonl: after a stop, the same command continues.

    \b
    Examples:
      knormpress sweep --keep_ratios 1.0,0.9,0.8,0.7 --num_wikitext_samples 3 --prune_after 512 --skip_layers 0
      knormpress sweep --keep-ratios 0.9,0.5 --samples 2 --skip-layers none
      knormpress sweep --keep-ratios 1.0,0.7,0.5 --prompt-tokens 512,2048,8000
      knormpress sweep --method random --keep-ratios 0.7 --output results-random
      knormpress sweep --prompt-tokens 512,2048,8000 --ray auto
    """
    from knormpress.records.checks import sound
    from knormpress.show.sweep_table import print_tables

    path = output / _SWEEP_FILE
    effort = replace(effort.quick() if quick else effort, cost=cost)
    records = measure_cells(candidates, effort, source, path, fresh=fresh, ray=ray)
    if as_json:
        for record in records:
            typer.echo(record.model_dump_json())
        return
    print_tables(map(sound, records))
    typer.echo(f"results: {path}; pictures: knormpress plot {path}")


@app.command()
@taking(source=Source)
def tune(
    *,
    source: Source,
    target_ppl: Annotated[str, typer.Option(help="Allowed rise of perplexity, in %.")] = "5%",
    target_retrieval: Annotated[
        str, typer.Option(help='Share of the full cache\'s items that must still be found, or "none".')
    ] = "0.9",
    scores: Annotated[
        str, typer.Option(help="Scores that a layer may get, separated by commas; module:object for your own.")
    ] = "knorm,keydiff,keydiff-128,leverage",
    minutes: Annotated[
        float, typer.Option(help="Time for the search and its report; four whole plans are tried in any case.")
    ] = 8.0,
    context: Annotated[int, typer.Option(help="Tokens of context that the plan is tuned for.")] = 1024,
    output: Annotated[Path, typer.Option(help="The plan file.")] = _RESULTS / _PLAN_FILE,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore the measurements of an earlier search.")] = False,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Find a keep ratio and a score for each layer, to keep as few tokens as possible within an allowed loss.

    The search uses some of the text's documents; the plan is measured on the others, beside uniform ratios and other
    methods. After a stop, the same command continues.

    \b
    Examples:
      knormpress tune --target-ppl 5%
      knormpress tune --target-ppl 1% --target-retrieval none --scores knorm --minutes 20 --output plan-1.json
      knormpress tune --target-ppl 2% --ray auto
      knormpress sweep --plan results/plan.json --keep-ratios 1.0,0.8
    """
    from knormpress.show.plan_table import print_plan
    from knormpress.tune.search import Targets

    percent = number("target_ppl", target_ppl.strip().removesuffix("%"))
    share = None if target_retrieval.strip().lower() == "none" else number("target_retrieval", target_retrieval)
    plan = search_plan(
        Targets(percent, share),
        source,
        output,
        scores=words(scores),
        context=context,
        minutes=minutes,
        fresh=fresh,
        ray=ray,
    )
    if as_json:
        typer.echo(json.dumps(json.loads(output.read_text(encoding="utf-8"))))
        return
    print_plan(plan)
    use = f"KnormPress.from_plan({str(output)!r}, model)"
    typer.echo(f"plan: {output}\npictures: knormpress plot {output}\nuse it: {use}")


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="The results of a sweep, or a plan (.json).")] = _RESULTS
    / _SWEEP_FILE,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; the folder of the results unless given.")
    ] = None,
) -> None:
    """Draw the pictures of a sweep or of a plan.

    Four pictures for the longest prompts. With several prompt lengths, one more shows how time grows with the context.
    Where something was asked, one more shows what is found; where the cost was counted, one more shows that.

    \b
    Examples:
      knormpress plot
      knormpress plot results/results.jsonl --output pictures
      knormpress plot plan.json
    """
    from knormpress.records.checks import sound
    from knormpress.records.jsonl import read_records
    from knormpress.records.plan import read_plan
    from knormpress.show.pictures.draw import draw_all, draw_plan

    if results.suffix == ".json":
        for picture in draw_plan(read_plan(results), output or results.parent):
            typer.echo(picture)
        return
    for picture in draw_all(map(sound, read_records(results)), output or results.parent):
        typer.echo(picture)


@app.command()
def compare(
    base: Annotated[
        str | None,
        typer.Argument(help="A commit to measure now, in turn with the working tree; stored runs unless given."),
    ] = None,
    *,
    tests: Annotated[str, typer.Option(help="With BASE: the arguments for pytest.")] = "tests/perf tests/quality",
    storage: Annotated[Path, typer.Option(help="pytest-benchmark's storage.")] = Path(".benchmarks"),
    thresholds: Annotated[str, typer.Option(help="Allowed losses in %, such as tpot=5,bytes=0.5.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Also write the verdicts to this file, as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every figure with its reference run; exit with status 1 if one regressed.

    Without BASE: the newest stored run is compared with the nearest ancestor commit that has data.
    With BASE: BASE and the working tree (head) are measured in the order base, head, head, base, each in a folder of
    its own. Uncommitted changes count, untracked files do not.

    \b
    Examples:
      pytest tests/perf tests/quality --knorm-save && knormpress compare
      knormpress compare main
      knormpress compare HEAD~1 --tests "tests/perf --knorm-keep-ratios 0.5" --markdown summary.md
    """
    from knormpress.compare.verdicts import read_thresholds
    from knormpress.show.verdict_table import fill, verdict_lines, verdict_markdown

    with room_for(*filter(None, (markdown,))):
        verdicts, notes, faults = judge_runs(base, tests, storage, read_thresholds(thresholds))
        for line in notes:
            typer.echo(fill(line), err=as_json)
        for verdict in verdicts if as_json else ():
            typer.echo(json.dumps(dataclasses.asdict(verdict), allow_nan=False))
        for line in () if as_json else verdict_lines(verdicts):
            typer.echo(line)
        for line in faults:
            typer.echo(fill(line), err=as_json)
        if markdown is not None:
            with writing(markdown) as temporary:
                temporary.write_text("\n\n".join([verdict_markdown(verdicts), *faults]), encoding="utf-8")
    if faults or any(verdict.word == "regressed" for verdict in verdicts):
        raise typer.Exit(1)


@app.command("lm-eval")
def lm_eval(
    *,
    tasks: Annotated[str, typer.Option(help="Names of the harness, or YAML files, separated by commas.")],
    keep_ratio: Annotated[float | None, typer.Option(help="Share of the seen tokens to keep.")] = None,
    plan: Annotated[
        str | None, typer.Option(help="In its place: a plan of knormpress tune, or auto for the shipped one.")
    ] = None,
    method: Annotated[str, typer.Option(help="As for sweep.")] = "knorm",
    prune_after: Annotated[int, typer.Option(help="Tokens a layer must have seen before it is pruned.")] = 512,
    skip_layers: Annotated[str, typer.Option(help='Layers never pruned, separated by commas, or "none".')] = "0",
    split: Annotated[
        str | None,
        typer.Option(help="What a question begins with: it is fed after the pruning. See docs/lm-eval.md."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples; as the task says unless given.")] = None,
    limit: Annotated[int | None, typer.Option(help="The most documents of a task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with YAML files of your own tasks.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    prefill_chunk: Annotated[int | None, typer.Option(help="Send contexts in chunks of this many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Continuations behind one context in one pass.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Hub id or local folder; SmolLM2-135M-Instruct unless given.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps or xpu.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="As for sweep: in place of a device, spread the model over all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    output: Output = _RESULTS,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness through the full cache and through the pruned one.

    Every answer is scored behind the pruned context. The result is added to OUTPUT/lm-eval.jsonl.

    \b
    Examples:
      knormpress lm-eval --tasks lambada_openai --keep-ratio 0.5 --prune-after 32 --limit 100
      knormpress lm-eval --tasks gsm8k --num-fewshot 5 --plan auto --limit 50
      knormpress lm-eval --tasks my_task --include-path tasks --method random --keep-ratio 0.5 --split "Question:"
    """
    from knormpress.show.task_table import print_tasks

    path = output / _TASKS_FILE
    settings = {option.name: option for group in (Candidates, Source) for option in options_of(group)}
    spread = read_option(settings["device_map"], device_map, "--device_map")
    entry = run_tasks(
        words(tasks),
        path,
        source=Source(model=model, device=(device,), device_map=spread, dtype=dtype),
        folder=include_path,
        few_shot=num_fewshot,
        limit=limit,
        chat_template=apply_chat_template,
        keep_ratio=keep_ratio,
        plan=plan,
        method=method,
        prune_after=prune_after,
        skip_layers=read_option(settings["skip_layers"], skip_layers, "--skip_layers"),
        split=split,
        prefill_chunk=prefill_chunk,
        batch_size=batch_size,
    )
    if as_json:
        typer.echo(entry.model_dump_json())
        return
    print_tasks(entry)
    typer.echo(f"results: {path}; page: knormpress report {path}")


@app.command()
def accept(
    test: Annotated[str, typer.Argument(help="The test's id; or a function or file, for all its tests that lost.")],
    metric: Annotated[str, typer.Argument(help="The metric that lost, as in its verdict.")],
    why: Annotated[str, typer.Option(help="The reason, for those who read the next reports.")],
    storage: Storage = Path(".benchmarks"),
    thresholds: Annotated[str, typer.Option(help="Allowed losses in %, such as tpot=5,bytes=0.5.")] = "",
) -> None:
    """Accept what a test's newest stored run lost.

    Later runs are compared with the accepted level, for this metric alone. Who accepted it, when and why is kept in the
    history, and every later report shows it.

    \b
    Example:
      knormpress accept "tests/perf/test_it.py::test_bytes[cpu-0.9]" bytes --why "positions take 4 bytes a token more"
    """
    for line in accept_loss(test, metric, why, storage, thresholds):
        typer.echo(line)


@app.command()
def rename(
    old: Annotated[str, typer.Argument(help="The earlier id of a test, or name of a function or file of tests.")],
    new: Annotated[str, typer.Argument(help="The present one.")],
    storage: Storage = Path(".benchmarks"),
) -> None:
    """Let a renamed test keep its stored runs.

    \b
    Examples:
      knormpress rename tests/perf/test_it.py::test_size tests/perf/test_it.py::test_bytes
      knormpress rename tests/test_perf.py tests/perf/test_it.py
    """
    from knormpress.compare.decided import rename as renaming
    from knormpress.records.decisions import decide
    from knormpress.records.history import History

    decide(storage, renaming(History.read(storage), old, new))
    typer.echo(f"the stored runs of {old} are those of {new} from now on")


@app.command()
def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Records of sweeps and of lm-eval, and plans (.json); those in results/ unless given."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Also write a summary to this file, as Markdown.")] = None,
    storage: Annotated[Path, typer.Option(help="pytest-benchmark's storage, for the history.")] = Path(".benchmarks"),
) -> None:
    """Write one page of verdicts, tables and charts.

    It is a single HTML file that needs no network, made from records and from the runs stored by --knorm-save.

    \b
    Examples:
      knormpress report
      knormpress report results/results.jsonl results-random/results.jsonl --output report.html --markdown summary.md
    """
    usual = (_RESULTS / name for name in (_SWEEP_FILE, _BASELINE_FILE, _TASKS_FILE, _PLAN_FILE))
    notes = write_page(files or [path for path in usual if path.is_file()], storage, output, markdown)
    typer.echo("\n".join(map(str, filter(None, (*notes, output, markdown)))))


@app.command()
def selftest(
    tests: Annotated[str, typer.Option(help="The arguments for pytest.")] = "tests/perf tests/quality",
) -> None:
    """Plant known losses into your own tests, and show which of them would be seen.

    Runs the tests twice without a loss, and then with each one those that measure what it changes, with their gates and
    thresholds and the noise of this machine. Exits with status 1 if no test sees a loss that some test measures.

    \b
    Examples:
      knormpress selftest
      knormpress selftest --tests "tests/perf/test_it.py --knorm-keep-ratios 0.5 --knorm-samples 4"
    """
    from knormpress.cli.selftest import selftest as run

    blind, indent = False, " " * 13
    for found in run(tests, lambda text: typer.echo(f"selftest: {text}", err=True)):
        blind |= found.word == "blind"
        typer.echo(f"{found.word:13}{found.loss}")
        for test, why in found.why.items():
            typer.echo(textwrap.fill(f"{test}: {why}", 80, initial_indent=indent, subsequent_indent=indent))
    if blind:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Show what this machine can do.

    Tries which devices are really usable, and shows where the default model and text would come from.

    \b
    Example:
      knormpress doctor
    """
    from knormpress.cache.attention import why_off
    from knormpress.workload.corpora import describe_source
    from knormpress.workload.devices import describe_devices
    from knormpress.workload.models import describe_sources

    for device, name, reason in describe_devices():
        typer.echo(f"{device:8}" + (f"usable: {name}" if reason is None else f"not usable: {reason}"))
    for place in describe_sources():
        typer.echo(f"model   {place}")
    typer.echo(f"text    {describe_source()}")
    reason = why_off()
    typer.echo("attention  " + ("KnormPress's faster functions, on the CPU" if reason is None else f"slower: {reason}"))
    if importlib.util.find_spec("kvpress") is not None:
        typer.echo("attention  slower in a process that imports kvpress, which replaces transformers' sdpa attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 0, 1 if a figure regressed, 2 for a user error, 130 for Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = int(app(args=given or ["--help"], prog_name="knormpress", standalone_mode=False) or 0)
    except KnormError as error:
        typer.echo(f"error: {error}", err=True)
        return 2
    except Stopped as stopped:
        typer.echo(stopped, err=True)
        return _STOPPED
    except (KeyboardInterrupt, typer.Abort):
        status = _STOPPED
    except Exception as error:
        # typer raises this for an invalid command line; the module of its class differs between versions.
        format_message: Callable[[], str] | None = getattr(error, "format_message", None)
        if format_message is None:
            raise
        context = getattr(error, "ctx", None)
        command = "knormpress" if context is None else context.command_path
        typer.echo(f"error: {format_message()} (see {command} --help)", err=True)
        return 2
    # Typer itself also ends a command with this status after Ctrl-C.
    if status == _STOPPED:
        typer.echo("stopped: no file is half written, and the same command starts over", err=True)
    return status
