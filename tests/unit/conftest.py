"""Unit tests compute on tiny models, which several threads only slow down."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
