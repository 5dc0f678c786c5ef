"""Exact sparse attention: alpha-entmax instead of softmax, forward and backward.

Start at :func:`entmax_attention`.
"""

from importlib.metadata import version

from adasplash2 import nn
from adasplash2.auxiliary import AttentionAux
from adasplash2.contract import AttentionStats
from adasplash2.dispatch import BackendRefused, BackendStatus, Explanation, available_backends
from adasplash2.functional import (
    attention_stats,
    entmax,
    entmax15,
    entmax_attention,
    entmax_attention_varlen,
    entmax_attention_with_kvcache,
    explain,
    sparsemax,
)
from adasplash2.integrations import torch_tools

torch_tools.register()

__version__ = version("adasplash2")

__all__ = [
    "AttentionAux",
    "AttentionStats",
    "BackendRefused",
    "BackendStatus",
    "Explanation",
    "attention_stats",
    "available_backends",
    "entmax",
    "entmax15",
    "entmax_attention",
    "entmax_attention_varlen",
    "entmax_attention_with_kvcache",
    "explain",
    "nn",
    "sparsemax",
]
