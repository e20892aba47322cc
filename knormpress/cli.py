"""The ``knormpress`` command: parsing, calls and messages. What takes long to import is imported where it is needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from knormpress.commands import Stopped, judge_runs, measure_cells, search_plan, write_page
from knormpress.errors import KnormError
from knormpress.options import (
    CorpusText,
    Device,
    Dtype,
    Fresh,
    Json,
    Model,
    NewTokens,
    Output,
    Precision,
    PrefillChunk,
    PromptTokens,
    Rounds,
    Samples,
    Seconds,
    number,
    numbers,
    words,
)
from knormpress.press import KnormPress

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

Options may be spelled with dashes or underscores: --keep-ratios and --keep_ratios are one.""",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)

_RESULTS = Path("results")
_SWEEP_FILE = "results.jsonl"
_BASELINE_FILE = "baseline.jsonl"
_PLAN_FILE = "plan.json"
# What a shell reports for a command that SIGINT ended.
_STOPPED = 130


@app.command()
def baseline(
    *,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    corpus: CorpusText = None,
    prompt_tokens: PromptTokens = "1024",
    new_tokens: NewTokens = 32,
    prefill_chunk: PrefillChunk = None,
    samples: Samples = 3,
    rounds: Rounds = 5,
    precision: Precision = 3.0,
    seconds: Seconds = 20.0,
    output: Output = _RESULTS,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure the full cache alone.

    Its time, memory and perplexity; and since it is measured against itself, in turn, also how far two equal
    measurements lie apart on this machine.

    \b
    Examples:
      knormpress baseline
      knormpress baseline --device cuda --dtype bfloat16 --prompt-tokens 1024,8192
    """
    lengths = numbers("prompt_tokens", prompt_tokens, int)

    from knormpress.baseline import describe_baseline
    from knormpress.sweep import SweepSettings

    settings = SweepSettings(
        presses=(KnormPress(keep_ratio=1.0),),
        method="full",
        samples=samples,
        prompt_tokens=lengths,
        new_tokens=new_tokens,
        rounds=rounds,
        precision=precision,
        seconds=seconds,
        prefill_chunk=prefill_chunk,
        model=model,
        dtype=dtype,
        corpus=corpus,
        devices=words(device),
    )
    for record in measure_cells(settings, output / _BASELINE_FILE, fresh=fresh):
        if as_json:
            typer.echo(record.model_dump_json())
            continue
        typer.echo("")
        for line in describe_baseline(record):
            typer.echo(line)


@app.command()
def sweep(
    *,
    keep_ratios: Annotated[str, typer.Option(help="Shares of the seen tokens to keep, separated by commas.")] = (
        "1.0,0.9,0.8,0.7"
    ),
    samples: Samples = 3,
    prune_after: Annotated[int, typer.Option(help="Tokens a layer must have seen before it is pruned.")] = 512,
    skip_layers: Annotated[
        str, typer.Option(help='Layers never pruned, separated by commas, or "none"; -1 is the last.')
    ] = "0",
    method: Annotated[
        str,
        typer.Option(help="knorm, full, a control (random, highest-norm, recent-window, keydiff), or module:object."),
    ] = "knorm",
    plan: Annotated[Path | None, typer.Option(help="Measure this plan of knormpress tune too.")] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    corpus: CorpusText = None,
    prompt_tokens: PromptTokens = "1024",
    new_tokens: NewTokens = 32,
    prefill_chunk: PrefillChunk = None,
    rounds: Rounds = 5,
    precision: Precision = 3.0,
    seconds: Seconds = 20.0,
    output: Output = _RESULTS,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure keep ratios against the full cache.

    Prints each change with its interval, and judges the guide's targets and claims.
    Finished cells are kept in OUTPUT/results.jsonl: the same command goes on where it was stopped.

    \b
    Examples:
      knormpress sweep --keep_ratios 1.0,0.9,0.8,0.7 --num_wikitext_samples 3 --prune_after 512 --skip_layers 0
      knormpress sweep --keep-ratios 0.9,0.5 --samples 2 --skip-layers none
      knormpress sweep --keep-ratios 1.0,0.7,0.5 --prompt-tokens 512,2048,8000
      knormpress sweep --method random --keep-ratios 0.7 --output results-random
    """
    skipped = () if skip_layers.strip().lower() in ("", "none") else numbers("skip_layers", skip_layers, int)
    ratios = numbers("keep_ratios", keep_ratios, float)
    presses = [KnormPress(keep_ratio=ratio, prune_after=prune_after, skip_layers=skipped) for ratio in ratios]
    lengths = numbers("prompt_tokens", prompt_tokens, int)

    from knormpress.compare import summarize
    from knormpress.plan import read_plan
    from knormpress.sweep import SweepSettings
    from knormpress.table import print_tables

    settings = SweepSettings(
        presses=tuple(presses),
        method=method,
        samples=samples,
        prompt_tokens=lengths,
        new_tokens=new_tokens,
        rounds=rounds,
        precision=precision,
        seconds=seconds,
        prefill_chunk=prefill_chunk,
        plan=None if plan is None else read_plan(plan),
        model=model,
        dtype=dtype,
        corpus=corpus,
        devices=words(device),
    )
    path = output / _SWEEP_FILE
    records = measure_cells(settings, path, fresh=fresh)
    if as_json:
        for record in records:
            typer.echo(record.model_dump_json())
        return
    print_tables(map(summarize, records))
    typer.echo(f"results: {path}; pictures: knormpress plot {path}")


@app.command()
def tune(
    *,
    target_ppl: Annotated[str, typer.Option(help="Rise of perplexity that is allowed, in %.")] = "5%",
    target_passkey: Annotated[
        str, typer.Option(help='Share of the passkeys that must still be found, or "none".')
    ] = "0.9",
    minutes: Annotated[float, typer.Option(help="Time for the search; measuring the plan comes on top.")] = 4.0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    corpus: CorpusText = None,
    context: Annotated[int, typer.Option(help="Tokens of context that the plan is tuned behind.")] = 1024,
    output: Annotated[Path, typer.Option(help="The plan file.")] = _RESULTS / _PLAN_FILE,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier search measured.")] = False,
    as_json: Json = False,
) -> None:
    """Find the keep ratio of each layer with which least is kept within a loss.

    The search sees one half of the text's documents; the plan is measured on the others, beside uniform ratios and
    other methods. Stopped, the same command goes on where it was.

    \b
    Examples:
      knormpress tune --target-ppl 5%
      knormpress tune --target-ppl 1% --target-passkey none --minutes 20 --output plan-1.json
      knormpress sweep --plan results/plan.json --keep-ratios 1.0,0.8
    """
    from knormpress.plan_table import print_plan
    from knormpress.tune import Targets

    percent = number("target_ppl", target_ppl.strip().removesuffix("%"))
    share = None if target_passkey.strip().lower() == "none" else number("target_passkey", target_passkey)
    plan = search_plan(
        Targets(percent, share),
        output,
        model=model,
        device=device,
        dtype=dtype,
        corpus=corpus,
        context=context,
        minutes=minutes,
        fresh=fresh,
    )
    if as_json:
        typer.echo(output.read_text(encoding="utf-8"), nl=False)
        return
    print_plan(plan)
    use = f"KnormPress.from_plan({str(output)!r}, model)"
    typer.echo(f"plan: {output}\npictures: knormpress plot {output}\nuse it: {use}")


@app.command()
def plot(
    results: Annotated[
        Path, typer.Argument(help="The results of a sweep, or a plan (.json) that was tuned.")
    ] = _RESULTS / _SWEEP_FILE,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; that of the results unless given.")
    ] = None,
) -> None:
    """Draw the pictures of a sweep or of a plan.

    Four of the longest prompts, and one of how time grows with the context where there are several lengths.

    \b
    Examples:
      knormpress plot
      knormpress plot results/results.jsonl --output pictures
      knormpress plot plan.json
    """
    from knormpress.compare import summarize
    from knormpress.plan import read_plan
    from knormpress.plots import draw_all, draw_plan
    from knormpress.records import read_records

    if results.suffix == ".json":
        for picture in draw_plan(read_plan(results), output or results.parent):
            typer.echo(picture)
        return
    for picture in draw_all(map(summarize, read_records(results)), output or results.parent):
        typer.echo(picture)


@app.command()
def compare(
    base: Annotated[
        str | None, typer.Argument(help="A commit to measure in turn with HEAD, now; the stored runs unless given.")
    ] = None,
    *,
    tests: Annotated[str, typer.Option(help="With BASE: what pytest is to run.")] = "tests/perf tests/quality",
    storage: Annotated[Path, typer.Option(help="pytest-benchmark's storage.")] = Path(".benchmarks"),
    thresholds: Annotated[str, typer.Option(help="Losses in % that are allowed, such as tpot=5,bytes=0.5.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Write the verdicts to this file too, as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Say what became of every figure since its baseline; exit with status 1 if one regressed.

    Without BASE: the newest stored run against the nearest ancestor commit that has data.
    With BASE: it and HEAD are checked out beside each other and measured in the order base, head, head, base.

    \b
    Examples:
      pytest tests/perf tests/quality --knorm-save && knormpress compare
      knormpress compare main
      knormpress compare HEAD~1 --tests "tests/perf --knorm-keep-ratios 0.5" --markdown summary.md
    """
    from knormpress.verdict_table import fill, verdict_lines, verdict_markdown
    from knormpress.verdicts import read_thresholds

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
        markdown.write_text("\n\n".join([verdict_markdown(verdicts), *faults]), encoding="utf-8")
    if faults or any(verdict.word == "regressed" for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def report(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Records of sweeps, and plans (.json); those in results/ unless given.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Write a summary to this file too, as Markdown.")] = None,
    storage: Annotated[Path, typer.Option(help="pytest-benchmark's storage, for the history.")] = Path(".benchmarks"),
) -> None:
    """Write one page of verdicts, tables and charts.

    A single HTML file that needs no network, from any records and the runs stored by --knorm-save.

    \b
    Examples:
      knormpress report
      knormpress report results/results.jsonl results-random/results.jsonl --output report.html --markdown summary.md
    """
    usual = (_RESULTS / name for name in (_SWEEP_FILE, _BASELINE_FILE, _PLAN_FILE))
    notes = write_page(files or [path for path in usual if path.is_file()], storage, output, markdown)
    typer.echo("\n".join(map(str, filter(None, (*notes, output, markdown)))))


@app.command()
def doctor() -> None:
    """Show what this machine can do.

    Which devices are really usable, each tried out, and where the default model and text would come from.

    \b
    Example:
      knormpress doctor
    """
    from knormpress.corpora import describe_source
    from knormpress.devices import describe_devices
    from knormpress.models import describe_sources

    for device, name, reason in describe_devices():
        typer.echo(f"{device:8}" + (f"usable: {name}" if reason is None else f"not usable: {reason}"))
    for place in describe_sources():
        typer.echo(f"model   {place}")
    typer.echo(f"text    {describe_source()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for what the user can mend, 130 when interrupted."""
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
        # What typer raises for a command line it can't parse; where that class lives differs between its versions.
        format_message: Callable[[], str] | None = getattr(error, "format_message", None)
        if format_message is None:
            raise
        context = getattr(error, "ctx", None)
        command = "knormpress" if context is None else context.command_path
        typer.echo(f"error: {format_message()} (see {command} --help)", err=True)
        return 2
    # Typer ends a command so itself when Ctrl-C reaches it.
    if status == _STOPPED:
        typer.echo("stopped: nothing is half written, and the same command starts over", err=True)
    return status
