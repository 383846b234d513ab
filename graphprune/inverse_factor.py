"""The factor that the second-order methods share: what one weight's change asks of the others.

With ``H`` the Gram matrix of a layer's inputs, ``H^-1 = U'U``, ``U`` upper triangular. Fixing column ``j``
at an error ``d`` changes the columns behind it by ``-d U_jk / U_jj`` and costs ``d^2 / U_jj^2`` (Hassibi
and Stork,
*Optimal Brain Surgeon*, 1993, for all rows at once as in Frantar et al., *GPTQ*, ICLR 2023, eq. 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal of the Gram matrix, as in GPTQ


def inverse_factor(gram: Tensor) -> Tensor:
    """``U`` with ``H^-1 = U'U`` of the damped Gram matrix, ``[columns, columns]``.

    >>> u = inverse_factor(torch.diag(torch.tensor([4.0, 4.0], dtype=torch.float64)))
    >>> (u.T @ u @ torch.diag(torch.tensor([4.04, 4.04], dtype=torch.float64))).round(decimals=6).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(len(matrix), dtype=matrix.dtype)
    damping = DAMPING * mean
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                return upper
        damping *= 10  # rounding of the sums has made it indefinite
