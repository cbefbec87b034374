"""The nearest matrices of a wanted form, in the Frobenius norm."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasmith.engine.export.changes import AnyChange, Change

_OVERSAMPLING, _POWERS = 16, 4
_SMALL = 512
"""Matrices up to this side are decomposed fully, which is exact and quick."""


def nearest_product(change: AnyChange, rank: int) -> Change:
    """Return the best change of at most `rank`, as factors of one size and strength 1, in the shape of the change.

    A product is truncated exactly. Of a large whole matrix the leading directions are found by random sampling with
    power iterations (Halko et al., arXiv:0909.4061), from a fixed seed.
    """
    if isinstance(change, Change):
        return change.balanced(rank)
    matrix = change.weight.float().flatten(1)
    up, values, down = leading_directions(matrix, rank)
    root = values.sqrt()
    up, down = up * root, root[:, None] * down
    return Change(down.reshape(-1, *change.shape[1:]), up.reshape(*up.shape, *[1] * (len(change.shape) - 2)), 1.0)


def leading_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values and vectors: (out, k), (k,), (k, in) with k = min(rank, out, in)."""
    count = min(rank, *matrix.shape)
    if min(matrix.shape) <= _SMALL:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left[:, :count].float(), values[:count].float(), right[:count].float()
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(matrix.shape[1], min(count + _OVERSAMPLING, *matrix.shape), generator=draw)
    basis = torch.linalg.qr(matrix @ sample).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :count], values[:count], right[:count]


def nearest_kronecker(matrix: Tensor, first: tuple[int, ...], second: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return A (first) and B (second) of one size whose Kronecker product is nearest to `matrix`.

    With the blocks of the matrix as rows that is the best product of rank 1.
    """
    (rows, columns), (block_rows, block_columns) = first, second
    blocks = matrix.reshape(rows, block_rows, columns, block_columns).permute(0, 2, 1, 3)
    left, values, right = leading_directions(blocks.reshape(rows * columns, block_rows * block_columns), 1)
    root = values[0].sqrt()
    return (left[:, 0] * root).reshape(rows, columns), (right[0] * root).reshape(block_rows, block_columns)
