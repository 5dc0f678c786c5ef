"""Exact sparse attention: alpha-entmax instead of softmax, forward and backward.

Start at :func:`entmax_attention`.
"""

from importlib.metadata import version

from adasplash2.contract import AttentionStats
from adasplash2.dispatch import BackendRefused, BackendStatus, Explanation, available_backends
from adasplash2.functional import (
    attention_stats,
    entmax,
    entmax15,
    entmax_attention,
    explain,
    sparsemax,
)

__version__ = version("adasplash2")

__all__ = [
    "AttentionStats",
    "BackendRefused",
    "BackendStatus",
    "Explanation",
    "attention_stats",
    "available_backends",
    "entmax",
    "entmax15",
    "entmax_attention",
    "explain",
    "sparsemax",
]
