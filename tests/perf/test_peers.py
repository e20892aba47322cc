"""The plans beside uniform ratios and kvpress's presses that keep as many tokens: what each costs, and what each finds.

One table and its picture, made with ``--peers-table FILE``; no gate. Bytes and TPOT are measured behind a long context,
TTFT, perplexity and retrieval behind the usual ones, on documents and items that a search leaves out, so that the plans
were not tuned on them if ``--knorm-corpus`` names the text that they were tuned on.
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
from knormpress.measure.quality import measure_quality
from knormpress.methods.full import FullCache
from knormpress.methods.registry import make_method
from knormpress.show.pictures.style import DPI
from knormpress.stats.intervals import ratio_change
from knormpress.tune.texts import split
from tests.perf.conftest import interval
from tests.perf.drawn import Peer, draw_peers
from tests.perf.test_targets import copy_of, decoding

KVPRESS = ("Knorm", "KeyDiff", "ExpectedAttention", "SnapKV", "TOVA", "StreamingLLM", "Random")
# They choose by the attention of the last tokens, which are meant to be the question. Here they are the text's.
WANT_THE_QUESTION = ("SnapKV", "TOVA")
UNIFORM = (0.98, 0.95)
TASKS = ("multikey-prose", "list", "json", "multikey-filler")
CONTEXT = 1_024
PICTURE = "knormpress_peers.png"


@pytest.fixture
def write(pytestconfig):
    """Replace the table of peers in the page that --peers-table names, and its picture; skip where none is named."""
    page = pytestconfig.option.peers_table
    if not page:
        pytest.skip("no --peers-table was given")
    text = Path(page).read_text(encoding="utf-8") if Path(page).is_file() else ""
    before, mark, rest = text.partition("<!-- peers -->\n")
    _, end, after = rest.partition("\n<!-- end of peers -->")
    # Told now, and not when everything has been measured.
    if not mark or not end:
        raise pytest.UsageError(f"--peers-table is {page}; wanted a Markdown file with the marks of a table")

    def write(rows, figure):
        head, *others = rows
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others))
        print(table)
        Path(page).write_text(f"{before}{mark}{table}{end}{after}", encoding="utf-8")
        images = Path(page).parent / "images"
        images.mkdir(exist_ok=True)
        figure.savefig(images / PICTURE, format="png", dpi=DPI)

    return write


@pytest.fixture
def candidates(write, knorm_bench, without_attention_of_kvpress):
    """Each method by its name, with its policy."""
    found = {}
    try:
        best, norms = (KnormPress.for_model(knorm_bench.model, scores=scores) for scores in (None, ("knorm",)))
        equal = KnormPress(round(best.mean_keep, 3), skip_layers=())
        for name in KVPRESS:
            mark = " *" if name in WANT_THE_QUESTION else ""
            found[f"kvpress's {name}{mark}"] = (make_method(f"kvpress:{name}Press", equal), equal)
    except KnormError as error:
        # Whoever asks for the table gets it, or is told why not.
        raise pytest.UsageError(f"--peers-table: {error}") from error
    uniform = [KnormPress(keep, skip_layers=()) for keep in UNIFORM]
    ours = {"plan, any score": best, "plan, key norms": norms}
    ours |= {f"keep {press.keep_ratio} in every layer": press for press in (*uniform, equal)}
    without_attention_of_kvpress()
    return {name: (press, press) for name, press in ours.items()} | found


def test_the_plans_beside_others_of_their_size(write, knorm_bench, candidates, knorm_retrieval, quick):
    model, tokens = knorm_bench.model, 1_300 if quick else 8_000
    methods, policies = (list(each) for each in zip(*candidates.values(), strict=True))
    _, held_out = split(knorm_bench, context=CONTEXT, with_items=False)
    quality = measure_quality(model, methods, held_out.documents[: 1 if quick else None], context=CONTEXT)
    retrieval = knorm_retrieval(methods, tasks=TASKS, texts=1 if quick else 4)
    (ids,) = knorm_bench.documents(length=tokens, count=1)
    first_tokens = timed_first_tokens(model, methods, ids[:, : 600 if quick else 2_000], rounds=1 if quick else 6)
    with torch.inference_mode():
        full = DynamicCache(config=model.config)
        prefill(model, ids, full)
    whole = cache_bytes(full)
    peers = []
    for number, (name, method, policy) in enumerate(zip(candidates, methods, policies, strict=True)):
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
        peers.append(
            Peer(
                name=name,
                mean_keep=fmean(policy.ratios(knorm_bench.layers)),
                held=held,
                ttft=first_tokens[number],
                tpot=ratio_change(pairs.baseline, pairs.candidate),
                ppl=quality[number].ppl,
                found=retrieval[number].retrieval.share,
                nll_rise=retrieval[number].retrieval.nll_rise,
            )
        )
    rows = [["policy", "mean keep", "bytes", "TTFT", "TPOT", "PPL", "found", "rise of the NLL"], *map(row, peers)]
    write(rows, draw_peers(peers))


def row(peer):
    times = [
        f"{1 + change.percent / 100:.2f} ({interval(change) or 'no interval'})" for change in (peer.ttft, peer.tpot)
    ]
    quality = [f"{peer.ppl} ({peer.ppl.interval})", f"{peer.found}: {peer.found.percent}", f"{peer.nll_rise:+.2f}"]
    return [peer.name, f"{peer.mean_keep:.3f}", f"{peer.held:.3f}", *times, *quality]


def timed_first_tokens(model, methods, ids, *, rounds):
    """The change of TTFT of each method, one prompt sent whole, all in turn with the full cache."""

    def first_token(method):
        def run():
            with torch.inference_mode(), method(model) as new_cache:
                prefill(model, ids, new_cache()).argmax(dim=-1).item()

        return clocked(run)

    runs = [first_token(method) for method in (FullCache(), *methods)]
    for run in runs:
        run()
    return [ratio_change(pairs.baseline, pairs.candidate) for pairs in in_turn(*runs, rounds=rounds)]


def clocked(run):
    """A function that returns the seconds that ``run`` takes."""

    def seconds():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds
