"""Reductions, normalisations and softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.runtimes.mil.arguments import Arguments, Operator


def reduction(function: Callable[..., Tensor]) -> Operator:
    """Over ``axes``, by default all, one axis kept as size 1 where ``keep_dims`` says so."""
    def run(a: Arguments) -> Tensor:
        x = a["x"]
        return function(x, dim=a.ints("axes", list(range(x.ndim))), keepdim=a.flag("keep_dims"))
    return run


def argument(function: Callable[..., Tensor]) -> Operator:
    """Index of the extreme value along ``axis``."""
    return lambda a: function(a["x"], dim=a.int("axis", -1), keepdim=a.flag("keep_dims"))


def _l2(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    return x.square().sum(dim, keepdim).sqrt()


def softmax(a: Arguments) -> Tensor:
    return a["x"].softmax(a.int("axis", -1))


def layer_norm(a: Arguments) -> Tensor:
    """Over ``axes``; gamma and beta have the shape of these axes."""
    x, eps = a["x"], a.float("epsilon", 1e-5)
    axes = sorted(axis % x.ndim for axis in a.ints("axes", list(range(x.ndim))))
    if axes == list(range(x.ndim - len(axes), x.ndim)):
        return F.layer_norm(x, x.shape[axes[0]:], a.optional("gamma"), a.optional("beta"), eps)
    y = (x - x.mean(axes, keepdim=True)) * torch.rsqrt(x.var(axes, correction=0, keepdim=True) + eps)
    shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    gamma, beta = a.optional("gamma"), a.optional("beta")
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def batch_norm(a: Arguments) -> Tensor:
    return F.batch_norm(a["x"], a["mean"], a["variance"], a.optional("gamma"), a.optional("beta"), False, 0.0,
                        a.float("epsilon", 1e-5))


def instance_norm(a: Arguments) -> Tensor:
    return F.instance_norm(a["x"], weight=a.optional("gamma"), bias=a.optional("beta"), eps=a.float("epsilon", 1e-5))


TABLE: dict[str, Operator] = {
    "reduce_sum": reduction(torch.sum), "reduce_mean": reduction(torch.mean), "reduce_max": reduction(torch.amax),
    "reduce_min": reduction(torch.amin), "reduce_l2_norm": reduction(_l2), "reduce_argmax": argument(torch.argmax),
    "reduce_argmin": argument(torch.argmin), "softmax": softmax, "layer_norm": layer_norm, "batch_norm": batch_norm,
    "instance_norm": instance_norm,
}
