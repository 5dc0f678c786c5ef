"""Modules of models that are trained with entmax attention.

>>> import torch, adasplash2
>>> attention = adasplash2.nn.EntmaxMultiheadAttention(64, 4, batch_first=True)
>>> x = torch.randn(2, 16, 64)
>>> out, weights = attention(x, x, x)
>>> out.shape, weights.shape
(torch.Size([2, 16, 64]), torch.Size([2, 16, 16]))
"""

from adasplash2.nn.alpha import AlphaSchedule, LearnedAlpha
from adasplash2.nn.attention import EntmaxMultiheadAttention
from adasplash2.nn.heads import HeadScale, ScaleMatcher
from adasplash2.nn.length import LengthScale, nape_slopes
from adasplash2.nn.mappings import Entmax, Sparsemax
from adasplash2.nn.monitor import AttentionMonitor, Watched

__all__ = [
    "AlphaSchedule",
    "AttentionMonitor",
    "Entmax",
    "EntmaxMultiheadAttention",
    "HeadScale",
    "LearnedAlpha",
    "LengthScale",
    "ScaleMatcher",
    "Sparsemax",
    "Watched",
    "nape_slopes",
]
