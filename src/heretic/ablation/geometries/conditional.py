"""W - s v aT: an edit that fires on inputs of harmful prompts and stays silent on those of benign prompts.

Let X_h, X_b be a writer's inputs (the keys) of n_h harmful and n_b benign tokens. Of all maps M the edit W - s v vT M uses

    argmin_M  mean_h |M x - W x|^2 + BENIGN_WEIGHT mean_b |M x|^2 + mu |M|^2  =  Y_hT B,     Y_h = X_h WT,   mu = RIDGE mean |x_h|^2
    B = [I 0] (K + mu diag(n_h ..., n_b / BENIGN_WEIGHT ...))^-1 [X_h; X_b],                 K the Gram matrix of all keys

so a = MT v = BT (Y_h v). A ridge regression on keys is the edit of MEMIT (Meng et al. 2022, arXiv 2210.07229), the silence on other
inputs is the aim of AlphaEdit's null space (Fang et al. 2024, arXiv 2410.02355), and apostate nulls refusal by such keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heretic.ablation.operator import Operator
from heretic.ablation.weight_stats import ELEMENTS_PER_CHUNK

BENIGN_WEIGHT = 20.0
RIDGE = 0.002
HARMFUL_KEYS, BENIGN_KEYS = 256, 768  # of a writer, at most; a map has a row for every harmful key


@dataclass(frozen=True)
class InputMap:
    """M = outputsT inputs of one writer, in float32."""

    outputs: Tensor  # Y_h [harmful keys, width]
    inputs: Tensor  # B [harmful keys, inputs]

    def double(self) -> InputMap:
        """Convert to float64."""
        return replace(self, outputs=self.outputs.double(), inputs=self.inputs.double())


@torch.no_grad()
def input_map(weight: Tensor, harmful: Tensor, benign: Tensor) -> InputMap:
    """Compute the map of a weight [width, inputs] for harmful and benign keys [keys, inputs], in RAM.

    Sums are in float64: single keys can be a thousand times longer than the others.
    """
    keys = torch.cat([harmful, benign]).float()
    count, total = len(harmful), len(keys)
    columns = max(1, ELEMENTS_PER_CHUNK // total)
    gram = torch.zeros(total, total, dtype=torch.float64)
    for part in keys.split(columns, dim=1):
        gram.addmm_(part.double(), part.double().mT)
    mu = RIDGE * gram.diagonal()[:count].mean()
    gram.diagonal()[:count] += mu * count
    gram.diagonal()[count:] += mu * (total - count) / BENIGN_WEIGHT
    selected = torch.eye(total, count, dtype=torch.float64)
    solution = torch.cholesky_solve(selected, torch.linalg.cholesky(gram)).mT
    inputs = torch.cat([(solution @ part.double()).float() for part in keys.split(columns, dim=1)], dim=1)
    chosen = keys[:count].to(weight.device)
    rows = weight.split(max(1, ELEMENTS_PER_CHUNK // weight.shape[1]))
    outputs = torch.cat([chosen @ part.float().mT for part in rows], dim=1)
    return InputMap(outputs.cpu(), inputs)


def conditional(v: Tensor, strength: float | Tensor, facts: InputMap, mix: Tensor) -> Operator:
    """Remove v from the part of the output that M explains."""
    return Operator(strength * v, None, a=(v @ facts.outputs.mT) @ facts.inputs)
