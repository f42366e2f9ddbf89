"""Fewer points for a picture that has only so many pixels; peaks and dips stay."""

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray


def thin(most: int, *series: ArrayLike) -> NDArray[np.intp]:
    """Return the places to draw of curves that share their x, at most about `most` for each.

    Of each of equal pieces the least and the greatest value of every curve stay, and both ends:
    no extreme of any curve is lost, however narrow. NaN never counts as an extreme.

    Args:
        most: Points, at least 4; shorter curves stay as they are.
        series: Values of the curves, all of one length.
    """
    curves = [np.asarray(values, dtype=np.float64) for values in series]
    length = len(curves[0])
    if length <= most:
        return np.arange(length)
    edges = np.linspace(0, length, most // 2 + 1).astype(np.intp)
    kept = [0, length - 1]
    for values in curves:
        lows, highs = np.nan_to_num(values, nan=np.inf), np.nan_to_num(values, nan=-np.inf)
        for start, stop in pairwise(edges):
            kept += [start + lows[start:stop].argmin(), start + highs[start:stop].argmax()]
    return np.unique(kept)
