"""The operators of the backbone in plain torch: their definition, and what runs where nothing faster does."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Backbone:
    """See `Operators`."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        cos_T11C, sin_T11C = (table[: qkv_BT3HC.shape[1], None, None] for table in (cos_TC, sin_TC))
        first, second = qkv_BT3HC[:, :, :2].chunk(2, dim=-1)
        rotated = (first * cos_T11C - second * sin_T11C, second * cos_T11C + first * sin_T11C)
        return torch.cat([torch.cat(rotated, dim=-1).to(qkv_BT3HC.dtype), qkv_BT3HC[:, :, 2:]], dim=2)

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        targets_T1 = targets_T.unsqueeze(1)
        log_probabilities_TV = logits_TV.log_softmax(dim=-1)
        torch.exp(log_probabilities_TV, out=logits_TV)
        logits_TV.scatter_add_(1, targets_T1, logits_TV.new_full(targets_T1.shape, -1.0)).mul_(scale)
        return -log_probabilities_TV.gather(1, targets_T1).squeeze(1)
