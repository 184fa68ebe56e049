"""Remove the harmless mean from directions."""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans


def project_out_mean(vectors: Tensor, harmless: ResidualMeans) -> Tensor:
    """Project directions [layers, count, width] off the harmless mean of their layer."""
    common = torch.nn.functional.normalize(harmless.mean, dim=-1).unsqueeze(1)
    return vectors - (vectors * common).sum(-1, keepdim=True) * common
