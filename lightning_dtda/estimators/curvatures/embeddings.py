"""Kronecker factors of embeddings: their inputs are rows of the unit matrix, so that one factor is diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Lookups = Callable[[], Iterable[Sequence[tuple[Tensor, Tensor]]]]
"""Goes over the training data, and has for each embedding the rows that a batch looked up ``(B, ...)``, and the
derivatives by what it found there ``(B, ..., d)``."""


def embedding_factors(
    lookups: Lookups, rows: Sequence[int], examples: int, is_corrected: bool
) -> list[tuple[Tensor, Tensor]]:
    r"""Return the eigenvectors of each embedding's block, and its eigenvalues, summed over the examples.

    With unit vectors :math:`a_{nt}` for the rows looked up at the T positions of an example, and derivatives
    :math:`g_{nt}`,

    .. math:: \left(\frac1{NT} \sum_{nt} a_{nt} a_{nt}^\top\right) \otimes \left(\sum_{nt} g_{nt} g_{nt}^\top\right)

    as for a linear layer of one-hot vectors, whose diagonal matrix of inputs is not written out.

    Args:
        lookups: The batches.
        rows: Number of rows of each embedding.
        examples: N.
        is_corrected: Whether the eigenvalues are those that fit the matrix best with these eigenvectors.

    Returns:
        Eigenvectors of the derivatives' factor ``(d, d)``, and eigenvalues ``(rows, d)``.
    """
    frequencies, covariances = [torch.zeros(())] * len(rows), [torch.zeros(())] * len(rows)
    for batch in lookups():
        for number, (found, derivatives) in enumerate(batch):
            flat = derivatives.flatten(0, -2)
            counts = torch.bincount(found.flatten(), minlength=rows[number]).to(flat)
            frequencies[number] = frequencies[number].to(flat) + counts / (examples * found[0].numel())
            covariances[number] = covariances[number].to(flat) + flat.T @ flat
    factors = [torch.linalg.eigh(covariance) for covariance in covariances]
    bases = [basis for _, basis in factors]
    if not is_corrected:
        values = [frequency[:, None] * of_basis for frequency, (of_basis, _) in zip(frequencies, factors, strict=True)]
        return list(zip(bases, values, strict=True))
    corrected = [basis.new_zeros(count, len(basis)) for count, basis in zip(rows, bases, strict=True)]
    for batch in lookups():
        for (found, derivatives), basis, total in zip(batch, bases, corrected, strict=True):
            of_examples = basis.new_zeros(len(found), *total.shape)
            place = found.flatten(1)[..., None].expand(-1, -1, len(basis))
            of_examples.scatter_add_(1, place, derivatives.flatten(1, -2) @ basis)
            total += of_examples.square_().sum(0)
    return list(zip(bases, corrected, strict=True))
