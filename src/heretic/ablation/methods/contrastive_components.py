"""Contrastive principal components: the axes along which harmful prompts spread and harmless ones do not
(Abid et al. 2018, Nature Communications 9:2134, section "Contrastive PCA", with a contrast of 1).

Both spreads are taken around the harmless mean, so that the difference of the means counts among what harmful prompts do and
the first component lies near it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heretic.model.capture import ResidualMeans

CONTRAST = 1.0  # how much spread of harmless prompts takes away from that of harmful ones
MOST_PROMPTS = 1024  # of each kind, the first ones: with those a layer is one decomposition of at most 2048 x 2048


def contrastive_components(
    harmful: ResidualMeans, harmless: ResidualMeans, count: int, device: torch.device | str
) -> Tensor:
    """The first components [layers, count, width], each pointing to the harmful side.

    A layer costs one QR decomposition [width, prompts] and the eigenvalues of a symmetric matrix [prompts, prompts], prompts of
    both kinds together; the matrix [width, width] never exists.
    """
    layers = zip(harmful.whole[:MOST_PROMPTS].unbind(1), harmless.whole[:MOST_PROMPTS].unbind(1), strict=True)
    return torch.stack([_components(a.to(device).double(), b.to(device).double(), count).cpu() for a, b in layers])


def _components(harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
    middle = harmless.mean(dim=0)
    rows = torch.cat([(harmful - middle) / len(harmful) ** 0.5, (harmless - middle) / len(harmless) ** 0.5])
    signs = torch.cat([rows.new_ones(len(harmful)), rows.new_full((len(harmless),), -CONTRAST)])
    # rows.T = Q R, so rows.T diag(signs) rows = Q (R diag(signs) R.T) Q.T: its eigenvectors are Q times those of the middle.
    basis, small = torch.linalg.qr(rows.mT)
    _, vectors = torch.linalg.eigh((small * signs) @ small.mT)
    found = (basis @ vectors[:, -count:].flip(1)).mT
    return found * torch.where(found @ (harmful.mean(dim=0) - middle) < 0, -1.0, 1.0).unsqueeze(1)
