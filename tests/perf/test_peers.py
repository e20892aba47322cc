"""The plans beside other policies and presses that store as many bytes: what each costs, and what each still finds.

One table, made with ``--peers-table FILE``; no gate. Bytes and time are measured behind a long context, perplexity and
retrieval behind the usual ones, on documents and items that the plans were not tuned on if ``--knorm-corpus`` names the
text that they were tuned on.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import DynamicCache

from knormpress import KnormCache, KnormError, KnormPress
from knormpress.measure.memory import cache_bytes
from knormpress.measure.pairs import in_turn
from knormpress.measure.prefill import prefill
from knormpress.methods.registry import make_method
from knormpress.stats.intervals import ratio_change
from tests.perf.test_targets import copy_of, decoding

KVPRESS = ("KnormPress", "KeyDiffPress", "ExpectedAttentionPress")
UNIFORM = (0.98, 0.95)
TASKS = ("multikey-prose", "list", "json", "multikey-filler")


@pytest.fixture
def write(pytestconfig):
    """Replace the table of peers in the page that --peers-table names; skip where none is named."""
    page = pytestconfig.option.peers_table
    if not page:
        pytest.skip("no --peers-table was given")
    text = Path(page).read_text(encoding="utf-8") if Path(page).is_file() else ""
    before, mark, rest = text.partition("<!-- peers -->\n")
    _, end, after = rest.partition("\n<!-- end of peers -->")
    # Told now, and not when everything has been measured.
    if not mark or not end:
        raise pytest.UsageError(f"--peers-table is {page}; wanted a Markdown file with the marks of a table")

    def write(rows):
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        print(table)
        Path(page).write_text(f"{before}{mark}{table}{end}{after}", encoding="utf-8")

    return write


@pytest.fixture
def candidates(knorm_bench):
    """Each method by its name, with its policy."""
    pytest.importorskip("kvpress")
    try:
        best, norms = (KnormPress.for_model(knorm_bench.model, scores=scores) for scores in (None, ("knorm",)))
    except KnormError as error:
        pytest.skip(str(error))
    equal = KnormPress(round(best.mean_keep, 3), skip_layers=())
    found = {"plan, any score": (best, best), "plan, key norms": (norms, norms)}
    found |= {f"keep {keep} in every layer": (KnormPress(keep, skip_layers=()),) * 2 for keep in UNIFORM}
    found[f"keep {equal.keep_ratio} in every layer"] = (equal, equal)
    for name in KVPRESS:
        found[f"kvpress's {name}, {equal.keep_ratio}"] = (make_method(f"kvpress:{name}", equal), equal)
    return found


def clocked(run):
    """A function that returns the seconds that ``run`` takes."""

    def seconds():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def test_the_plans_beside_others_of_their_size(knorm_bench, candidates, knorm_quality, knorm_retrieval, write, quick):
    model, tokens = knorm_bench.model, 1_300 if quick else 8_000
    methods, policies = (list(each) for each in zip(*candidates.values(), strict=True))
    quality = knorm_quality(methods)
    retrieval = knorm_retrieval(methods, tasks=TASKS, texts=1 if quick else 4)
    (ids,) = knorm_bench.documents(length=tokens, count=1)
    full = DynamicCache(config=model.config)
    with torch.inference_mode():
        prefill(model, ids, full)
    whole = cache_bytes(full)
    rows = [["policy", "mean keep", "bytes", "TPOT", "PPL", "found"], ["---"] * 6]
    for name, method, policy, scored, asked in zip(candidates, methods, policies, quality, retrieval, strict=True):
        with torch.inference_mode(), method(model) as new_cache:
            cache = new_cache()
            if isinstance(cache, KnormCache):
                cache.prefill_from(full)
            else:
                prefill(model, ids, cache)
            held = cache_bytes(cache) / whole
        # Outside of the context: kvpress prunes in the first pass only, and its hooks cost time.
        with torch.inference_mode():
            runs = [clocked(decoding(model, each)) for each in (copy_of(model, full), cache)]
            (pairs,) = in_turn(*runs, rounds=6 if quick else 24)
        change = ratio_change(pairs.baseline, pairs.candidate)
        ppl, share = scored.quality.ppl, asked.retrieval.share
        rows.append(
            [
                name,
                f"{fmean(policy.ratios(knorm_bench.layers)):.3f}",
                f"{held:.3f}",
                f"{1 + change.percent / 100:.2f} ({1 + change.ends[0] / 100:.2f}..{1 + change.ends[1] / 100:.2f})",
                f"{ppl} ({ppl.interval})",
                f"{share}: {share.percent}",
            ]
        )
    write(rows)
