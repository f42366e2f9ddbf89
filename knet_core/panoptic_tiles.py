"""The contest of kernels for pixels, tile by tile, equal in every pixel to looking at all of them.

1. Both resizes together are one linear map, `rows @ probabilities @ columns.T`, whose values lie
   between the least and the greatest of the stride-8 logits that a tile depends on. So in most
   tiles few kernels can win, often only one, and few masks cross 0.5.
2. Only those are computed, in float64, where torch's float32 chain of resizes differs by
   roundings alone. All terms are sums of positive products, so these are relative: `ROUNDING`.
3. Where two kernels are closer than that, or a mask to 0.5, the plain chain decides.

Shapes:  K kernels · h, w the stride-8 map · R, C rows and columns of tiles · H0, W0 on disk
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from knet_core.losses import MASK_STRIDE
from knet_core.resizing import chunks, resize, resize_probabilities, running_argmax
from knet_core.structures import ImageSize

TILE = 64
"""Side of a tile in pixels of the image on disk."""
ROUNDING = 4e-6
"""Relative difference of two values under which their order is not trusted: about 17 roundings of
2^-24 each lie between a value and its float32 form, twice that between two values, doubled."""
_SLACK = 1e-3
"""The same for bounds, which come from rounded logits; a generous one costs little."""
_TINY = 1e-37
"""Below it floats are denormal and roundings no longer relative."""
_HALF = 0.5
_BROAD = 128


@dataclass(frozen=True, slots=True)
class _Span:
    """One tile along one axis: its pixels, and those that it depends on."""

    pixels: slice
    fine: slice
    """Of the stride-4 map."""
    coarse: slice
    """Of the stride-8 map."""
    weights: Tensor
    """(pixels, fine) float64."""


class TiledContest:
    """Which of K kernels owns each pixel of an image, and which hold enough of their masks.

    Args:
        masks: (K, h, w) logits at stride 8, on the CPU.
        scores: (K,) from 0 to 1.
        size: Of the image; `rounds_alike` must hold.
    """

    def __init__(self, masks: Tensor, scores: Tensor, size: ImageSize) -> None:
        self.masks = masks.float().contiguous()
        self.scores = scores
        self.size = size
        height, width = masks.shape[-2:]
        self.rows = _spans(height, size.input_size[0], size.original_size[0])
        self.columns = _spans(width, size.input_size[1], size.original_size[1])
        low, high = _extremes(self.masks, self.rows, self.columns)
        self.low, self.high = low.sigmoid(), high.sigmoid()  # (K, R, C)
        weight = scores[:, None, None]
        reach = self.high * weight * (1 + _SLACK) + _TINY >= (self.low * weight).amax(dim=0)
        self.alive = reach.flatten(1).any(dim=1).nonzero().flatten()
        """Rows that may win anywhere; the others are never resized."""
        self.place = torch.full((len(masks),), -1).scatter_(
            0, self.alive, torch.arange(len(self.alive))
        )
        self.reach = reach[self.alive]
        fine = (2 * height, 2 * width)
        self.probabilities = resize(self.masks[self.alive][None], fine).sigmoid()[0]

    def owners(self) -> Tensor:
        """Return the row of the greatest score * probability, the first of equals: (H0, W0)."""
        owners = torch.zeros(self.size.original_size, dtype=torch.int64)
        scores = self.scores[self.alive].double()[:, None, None]
        doubtful: list[Tensor] = []
        rivals: list[Tensor] = []
        with _one_thread():
            for row, column, members in self._tiles(self.reach):
                target = owners[row.pixels, column.pixels]
                if len(members) == 1:
                    target.fill_(int(self.alive[members]))
                    continue
                values = self._values(members, row, column) * scores[members]
                best, winner = values.max(dim=0)
                target.copy_(self.alive[members][winner])
                close = values >= best * (1 - ROUNDING) - _TINY
                doubt = close.sum(dim=0) > 1
                if doubt.any():
                    corner = torch.tensor([row.pixels.start, column.pixels.start])
                    doubtful.append(doubt.nonzero() + corner)
                    rivals.append(members[close[:, doubt].any(dim=1)])
        if doubtful:
            y, x = torch.cat(doubtful).T
            owners[y, x] = self._exact_owners(self.alive[torch.unique(torch.cat(rivals))], y, x)
        return owners

    def hold(self, rows: Sequence[int], owned: Sequence[int], threshold: float) -> list[bool]:
        """Return of each row whether its owned pixels (> 0) are at least this share of its mask.

        The mask is where its probability is >= 0.5; it must not be empty.
        """
        index = torch.tensor(rows, dtype=torch.int64)
        members = self.place[index]
        low, high = self.low[index], self.high[index]
        full = low >= _HALF * (1 + _SLACK)
        crossing = ~full & (high >= _HALF * (1 - _SLACK))
        heights = torch.tensor([len(span.weights) for span in self.rows])
        widths = torch.tensor([len(span.weights) for span in self.columns])
        least = (full * (heights[:, None] * widths)).sum(dim=(1, 2))
        most = least.clone()
        with _one_thread():
            for row, column, some in self._tiles(crossing):
                values = self._values(members[some], row, column)
                least[some] += (values >= _HALF + ROUNDING).sum(dim=(1, 2))
                most[some] += (values >= _HALF - ROUNDING).sum(dim=(1, 2))
        decisions = []
        for each, own, *areas in zip(rows, owned, least.tolist(), most.tolist(), strict=True):
            first, second = (area > 0 and own / area >= threshold for area in areas)
            if first != second:
                exact = resize_probabilities(self.masks[each][None], self.size)
                area = int((exact >= _HALF).sum())
                first = area > 0 and own / area >= threshold
            decisions.append(first)
        return decisions

    def _tiles(self, wanted: Tensor) -> Iterator[tuple[_Span, _Span, Tensor]]:
        """Return each tile where some of the rows of `wanted` (k, R, C) are, and which."""
        by_tile = wanted.permute(1, 2, 0).flatten(0, 1)
        members = torch.split(by_tile.nonzero()[:, 1], by_tile.sum(dim=1).tolist())
        for number, some in enumerate(members):
            if len(some):
                row, column = divmod(number, len(self.columns))
                yield self.rows[row], self.columns[column], some

    def _values(self, members: Tensor, row: _Span, column: _Span) -> Tensor:
        """Return float64 probabilities in one tile (k, height, width) of k rows of `alive`."""
        patch = self.probabilities[:, row.fine, column.fine][members].double()
        return row.weights @ (patch @ column.weights.T)

    def _exact_owners(self, kernels: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return the owner of pixels (P,), by the plain form, among kernels in ascending order."""
        winner = running_argmax(
            resize_probabilities(self.masks[kernels[part]], self.size)[:, y, x]
            * self.scores[kernels[part], None]
            for part in chunks(len(kernels))
        )
        return kernels[winner]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from splitting the many small steps of a tile, which costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spans(length: int, input_length: int, original_length: int) -> list[_Span]:
    """Cut one axis into tiles.

    The weights are read off torch's own resizes of an identity: its positions are float32, and
    positions computed anew would differ by up to 1e-4 of a pixel.
    """
    fine = 2 * length
    # Broad enough that torch takes the path of large maps.
    identity = F.pad(torch.eye(fine), (0, _BROAD))[None, None]
    identity = resize(identity, (MASK_STRIDE * length, fine + _BROAD))[:, :, :input_length]
    identity = resize(identity, (original_length, fine + _BROAD))
    weights = identity[0, 0, :, :fine].double()
    used = (weights != 0).int()
    first = used.argmax(dim=1)
    last = fine - 1 - used.flip(1).argmax(dim=1)
    spans = []
    for start in range(0, original_length, TILE):
        pixels = slice(start, min(start + TILE, original_length))
        low, high = int(first[pixels].min()), int(last[pixels].max())
        spans.append(
            _Span(
                pixels=pixels,
                fine=slice(low, high + 1),
                # Row i of twice the size lies between rows (i - 1) // 2 and (i + 1) // 2.
                coarse=slice(max((low - 1) // 2, 0), min((high + 1) // 2, length - 1) + 1),
                weights=weights[pixels, low : high + 1].contiguous(),
            )
        )
    return spans


def _extremes(
    masks: Tensor, rows: Sequence[_Span], columns: Sequence[_Span]
) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest logit that each tile depends on, (K, R, C) each."""
    low = torch.stack([masks[:, span.coarse].amin(dim=1) for span in rows], dim=1)
    high = torch.stack([masks[:, span.coarse].amax(dim=1) for span in rows], dim=1)
    low = torch.stack([low[:, :, span.coarse].amin(dim=2) for span in columns], dim=2)
    high = torch.stack([high[:, :, span.coarse].amax(dim=2) for span in columns], dim=2)
    return low, high
