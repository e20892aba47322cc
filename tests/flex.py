"""Flex attention compiled with the masks that KnormCache gives it: exit status 3 where torch can't compile it here.

In a process of its own: what else was imported decides whether torch can compile. ``unit/cache/test_masks.py`` has the
rest, without a compiler.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from knormpress.cache.masks import flex_mask


def main() -> int:
    """Compare its output with sdpa's under the same mask, which differs between heads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, length, 8, generator=generator) for length in (5, 30, 30))
    mask = torch.rand(1, 4, 5, 30, generator=generator) < 0.5
    try:
        with torch.no_grad():
            found = torch.compile(flex_attention)(query, key, value, block_mask=flex_mask(mask))
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"torch {torch.__version__} can't compile flex attention here: {str(error).splitlines()[0]}")
        return 3
    worst = (found - scaled_dot_product_attention(query, key, value, attn_mask=mask)).abs().max()
    print(f"outputs differ by {worst:.3g}")
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
