"""Flex attention against the oracle, as far as torch compiles it for a CPU: exit status 3 where it does not.

torch 2.13 fails to compile it for padded batches, whatever the cache, and for layers of two lengths in one pass.
"""

from __future__ import annotations

import sys

import torch

from knormpress import KnormCache, KnormPress
from tests.oracle import run_masked, run_pruned
from tests.strategies import VOCABULARY, tiny_model


def main() -> int:
    """Compare the logits of three passes."""
    press = KnormPress(0.5, prune_after=8, skip_layers=(), prune_interval=2)
    ids = torch.randint(2, VOCABULARY, (1, 21), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama", "flex_attention", torch.float32)
    try:
        trace = run_pruned(model, KnormCache(model, press), ids, [15, 1, 5])
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"torch {torch.__version__} can't compile flex attention here: {str(error).splitlines()[0]}")
        return 3
    worst = (trace.logits - run_masked(tiny_model("llama", "sdpa", torch.float32), ids, trace.visible)).abs().max()
    print(f"logits differ by {worst:.3g}")
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
