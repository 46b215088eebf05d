"""What matrices have over a bound ``c``, singular value by singular value, and how it changes with them.

    K = U S V^*    ->    excess(K) = U max(S - c, 0) V^* = K h(K^* K)    with    h(x) = max(1 - c / sqrt(x), 0)

Taken away from ``K`` it leaves the nearest matrix of norm at most ``c``. Its derivative is that of a function of a
Hermitian matrix, of eigenvalues ``x = S^2``,

    dK h(K^* K) + K V (q * V^* (dK^* K + K^* dK) V) V^*    where    q[i, j] = (h(x_i) - h(x_j)) / (x_i - x_j)

of which only the rows and columns of the singular values above the bound are not zero, often a few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .definite import is_below

CHUNK = 1 << 22  # bytes of blocks at a time
SQUARED = 1e-4  # singular values relative to the largest, of which the squares are precise to eight digits


class Excess:
    """Of ``blocks[F, groups, rows, columns]`` over a bound: not zero, at most, where the first index is in ``at``.

    There it is ``blocks[at, groups, rows, columns]``. Blocks that are proved to be within the bound are not decomposed.
    """

    def __init__(self, blocks: Tensor, bound: float) -> None:
        self._wide = blocks.shape[-2] < blocks.shape[-1]
        blocks = self._turned(blocks)
        sizes = torch.linalg.vector_norm(blocks, dim=(-2, -1)).flatten(1).amax(1)
        doubtful = (sizes > bound).nonzero().squeeze(1)
        squared = not len(doubtful) or bound > SQUARED * sizes.max().item()
        chunks = doubtful.split(max(1, CHUNK // (16 * blocks[:1].numel()))) if len(doubtful) else []
        self._parts = [_Part.of(blocks, some, bound, squared) for some in chunks]
        self.at = torch.cat([doubtful[:0], *(part.at for part in self._parts)])
        self.blocks = self._turned(torch.cat([blocks[:0], *(part.excess() * bound for part in self._parts)]))
        self._parts = [part.single() for part in self._parts]

    def derivative(self, moved: Tensor) -> Tensor:
        """How the excess at ``at`` moves with the blocks there, as complex64."""
        moved = self._turned(moved)
        pairs = zip(self._parts, moved.split([len(part.at) for part in self._parts]), strict=True)
        return self._turned(torch.cat([moved[:0], *(part.derivative(one) for part, one in pairs)]))

    def _turned(self, blocks: Tensor) -> Tensor:
        return blocks.mH if self._wide else blocks


@dataclass(frozen=True)
class _Part:
    """Blocks decomposed: those ``at``, in units of the bound, are ``image @ v.mH``, with ``image`` = U S.

    The last ``k`` singular values are those above the bound, or more of them where other blocks have more: ``h[..., 1,
    k]``, and ``quotients[..., k, n]``, halved where both are above, as there rows and columns overlap.
    """

    at: Tensor
    image: Tensor
    v: Tensor
    h: Tensor
    quotients: Tensor

    @classmethod
    def of(cls, blocks: Tensor, at: Tensor, bound: float, squared: bool) -> _Part:
        blocks = blocks[at] / bound
        if squared:
            gram = blocks.mH @ blocks
            some = (~is_below(gram, 1.0)).any(1)
            at, blocks = at[some], blocks[some]
            squares, v = torch.linalg.eigh(gram[some])
            s, image = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt(), blocks @ v
        else:
            u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
            s, image, v = s.flip(-1), (u * s[..., None, :]).flip(-1), vh.mH.flip(-1)
        k = int((s > 1).sum(-1).amax()) if len(s) else 0
        one, other = s[..., s.shape[-1] - k :, None], s[..., None, :]
        h = (1 - 1 / one).clamp_min(0)
        both = 0.5 / (one * other * (one + other))
        mixed = h / (one.square() - other.square())
        quotients = torch.where(one > 1, torch.where(other > 1, both, mixed), 0.0)
        return cls(at, image, v, h.mT, quotients)

    def excess(self) -> Tensor:
        image, v = self._above()
        return (image * self.h) @ v.mH

    def derivative(self, moved: Tensor) -> Tensor:
        image, v = self._above()
        moved_v = moved @ v
        rows = self.quotients * (moved_v.mH @ self.image + image.mH @ moved @ self.v)
        return image @ (self.v @ rows.mH).mH + (moved_v * self.h + self.image @ rows.mH) @ v.mH

    def single(self) -> _Part:
        """In single precision, which is enough for the direction of a step."""
        image, v = self.image.to(torch.complex64), self.v.to(torch.complex64)
        return replace(self, image=image, v=v, h=self.h.float(), quotients=self.quotients.float())

    def _above(self) -> tuple[Tensor, Tensor]:
        first = self.v.shape[-1] - self.h.shape[-1]
        return self.image[..., first:], self.v[..., first:]
