"""What is known without a backend: calls in which no query may see any key, and the gradient of
alpha, both with torch's own operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adasplash2.contract import Forward
from adasplash2.problem import Inputs, Problem


def nothing_forward(problem: Problem, inputs: Inputs, saved_bytes: int) -> Forward:
    """No query may see any key: zeros, and thresholds above every score, or where a sink has all
    of the probability."""
    rows = (problem.batch, problem.heads_q, problem.length_q)
    query, sinks = inputs.query, inputs.sinks
    tau = query.new_full(rows, math.inf, dtype=problem.compute_dtype)
    if sinks is not None:
        alphas = problem.alpha if inputs.alphas is None else inputs.alphas
        with_sinks = ((alphas - 1.0) * sinks.detach() - 1.0).unsqueeze(-1)
        tau = torch.where(sinks.unsqueeze(-1) == -math.inf, tau, with_sinks)
    return Forward(
        out=query.new_zeros((*rows, problem.head_dim_v)),
        tau=tau,
        saved=query.new_empty(max(saved_bytes, 0), dtype=torch.uint8),
    )


def alpha_gradient(grad_y: Tensor, y: Tensor, alphas: Tensor, dim: int) -> Tensor:
    """Gradient of ``alphas`` from the output and its gradient, by torch's own operators.

    With ``e = alpha - 1``, ``L = -log p``, ``u = p^(2 - alpha)`` and ``w = u / sum u`` a row's is
    ``sum_j dy_j dp_j/dalpha``, ``dp/dalpha = (p - w) / e^2 + p L / e - w sum_k p_k L_k / e``
    (Correia, Niculae, Martins 2019), whose terms cancel where ``e`` is small. With ``E = (exp(e L)
    - 1) / e`` and ``M = sum p E`` it is ``u = p (1 + e E)`` and ``sum u = 1 + e M``, and because
    ``sum w (dy - delta) = 0`` the sum of ``p (M L - Q + M (M - E) / sum u) (dy - delta) / sum u``,
    ``Q = (E - L) / e``, where nothing grows.
    """
    p, dy = y.to(alphas.dtype), grad_y.to(alphas.dtype)
    e = alphas - 1.0
    outside = p <= 0.0  # not where NaN
    log = -torch.where(outside, 1.0, p).log()
    x = e * log
    excess = torch.expm1(x) / e
    u = p * (1.0 + e * excess)
    mean = (p * excess).sum(dim, keepdim=True)
    mass = 1.0 + e * mean
    delta = torch.where(outside, 0.0, u * dy).sum(dim, keepdim=True) / mass
    # Q / L^2 = (exp(x) - 1 - x) / x^2, by its series where that cancels.
    series = torch.zeros_like(x)
    for k in range(16 if x.dtype == torch.float64 else 9, 1, -1):
        series = (series * x + 1.0) / k
    far = (torch.expm1(x) - x) / torch.where(x < 0.5, 1.0, x * x)
    q = log * log * torch.where(x < 0.5, series, far)
    weight = mean * log - q + mean * (mean - excess) / mass
    terms = torch.where(outside, 0.0, p * weight * (dy - delta))
    rows = terms.sum(dim, keepdim=True) / mass
    return rows.to(torch.float64).sum_to_size(alphas.shape).to(alphas.dtype)
