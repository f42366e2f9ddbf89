"""Renders the scenes of the synthetic set from a seed. No torch.

Every class has a colour of its own, which one object in thirty does not wear: a short training
learns much from colour, a longer one learns form. Texture says nothing. Objects hide each other,
vary in size by a factor of 1.9, and gather in crowds. What is visible of an object is its mask.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

THINGS = ("circle", "square", "triangle", "star", "ring", "cross")
STUFF = ("sky", "field", "sand", "water")

_RADIUS = (0.18, 0.32)
"""Range of an object's radius, as a fraction of the image's side; drawn uniformly in its log."""
_LEAST_VISIBLE = 0.55
"""Every object keeps at least this fraction of itself inside the image and uncovered."""
_COUNTS = (0.26, 0.3, 0.24, 0.13, 0.07)
"""Probabilities of 1, 2, ... objects."""
_ODD_COLOUR = 0.03
"""Probability that an object wears any colour instead of its class's."""
_HUE_SPREAD = 0.02
"""Standard deviation of the hue within a class, as a fraction of the colour circle."""
_TRIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One rendered image of side S with G objects, in the order they were painted."""

    image: NDArray[np.uint8]
    """(S, S, 3) RGB."""
    labels: NDArray[np.int64]
    """(G,) positions in `THINGS`."""
    masks: NDArray[np.bool_]
    """(G, S, S) what is visible; masks never overlap."""
    stuff: NDArray[np.uint8]
    """(S, S) positions in `STUFF`, also below the objects."""


def render(rng: np.random.Generator, size: int) -> Scene:
    """Render one image of `size` x `size` pixels; `rng` decides everything in it."""
    canvas, stuff = _landscape(rng, size)
    count = 1 + int(rng.choice(len(_COUNTS), p=_COUNTS))
    crowded = rng.random() < 0.4
    anchor = rng.uniform(0.3, 0.7, size=2) * size
    labels: list[int] = []
    areas: list[int] = []
    masks: list[NDArray[np.bool_]] = []
    for _ in range(count):
        for _ in range(_TRIES):
            label = int(rng.integers(len(THINGS)))
            radius = size * math.exp(rng.uniform(*np.log(_RADIUS)))
            if crowded:
                centre = anchor + rng.normal(0, 0.17 * size, size=2)
            else:
                centre = rng.uniform(0.4 * radius, size - 0.4 * radius, size=2)
            shape = _place(THINGS[label], centre, radius, rng.uniform(0, 2 * math.pi), size)
            if shape is None or not _fits(shape, masks, areas):
                continue
            _paint(canvas, shape, label, rng)
            for mask in masks:
                mask &= ~shape.mask
            masks.append(shape.mask)
            areas.append(shape.area)
            labels.append(label)
            break
    return Scene(
        image=np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8),
        labels=np.array(labels, dtype=np.int64),
        masks=np.array(masks, dtype=np.bool_).reshape(-1, size, size),
        stuff=stuff,
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """A placed object; `rows` and `columns` are its window in the image."""

    rows: slice
    columns: slice
    distance: Floats
    """Signed distance to the outline in the window, in pixels, negative inside."""
    u: Floats
    v: Floats
    """The object's own coordinates in the window; 1 is the radius."""
    mask: NDArray[np.bool_]
    """(S, S), inside the image."""
    area: int
    """Pixels inside the outline, beyond the image's border as well."""


def _place(
    name: str, centre: NDArray[np.float64], radius: float, angle: float, size: int
) -> _Shape | None:
    """Lay an object's outline over the pixels; None if it lies outside the image."""
    reach = math.ceil(radius * 1.15) + 3
    middle = np.floor(centre).astype(int)
    ys, xs = (np.arange(c - reach, c + reach + 1) for c in middle)
    y = ((ys + 0.5 - centre[0]) / radius).astype(np.float32)[:, None]
    x = ((xs + 0.5 - centre[1]) / radius).astype(np.float32)[None, :]
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    distance = _OUTLINES[name](u, v) * np.float32(radius)
    rows_in, columns_in = (ys >= 0) & (ys < size), (xs >= 0) & (xs < size)
    if not (rows_in.any() and columns_in.any()):
        return None
    window = np.ix_(rows_in, columns_in)
    rows = slice(int(ys[rows_in][0]), int(ys[rows_in][-1]) + 1)
    columns = slice(int(xs[columns_in][0]), int(xs[columns_in][-1]) + 1)
    mask = np.zeros((size, size), dtype=np.bool_)
    mask[rows, columns] = distance[window] < 0
    area = int((distance < 0).sum())
    return _Shape(rows, columns, distance[window], u[window], v[window], mask, area)


def _fits(shape: _Shape, masks: list[NDArray[np.bool_]], areas: list[int]) -> bool:
    if shape.mask.sum() < _LEAST_VISIBLE * shape.area:
        return False
    return all(
        (mask & ~shape.mask).sum() >= _LEAST_VISIBLE * area
        for mask, area in zip(masks, areas, strict=True)
    )


def _paint(canvas: Floats, shape: _Shape, label: int, rng: np.random.Generator) -> None:
    """Blend a textured object with a dark rim and a soft shadow into the canvas."""
    window = canvas[shape.rows, shape.columns]
    size = shape.distance.shape
    shadow = _unit(0.5 - shape.distance / 6)[..., None]
    window *= 1 - 0.35 * shadow
    own = label / len(THINGS) + rng.normal(0, _HUE_SPREAD)
    hue = rng.random() if rng.random() < _ODD_COLOUR else own
    main = _colour(hue, rng.uniform(0.8, 1.0), rng.uniform(0.85, 1.0))
    other = _colour(hue + rng.uniform(-0.03, 0.03), rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.7))
    share = _TEXTURES[int(rng.integers(len(_TEXTURES)))](shape.u, shape.v, rng)[..., None]
    colour = share * main + (1 - share) * other
    light = np.linspace(1.12, 0.88, size[0], dtype=np.float32)[:, None, None]
    rim = _unit(1.9 + shape.distance)[..., None]
    colour = colour * light * (1 - 0.72 * rim)
    cover = _unit(0.5 - shape.distance)[..., None]
    window *= 1 - cover
    window += cover * colour


def _colour(hue: float, saturation: float, value: float) -> Floats:
    """HSV to RGB, all in [0, 1]; the hue wraps around."""
    k = (np.array([5, 3, 1]) + hue * 6) % 6
    rgb = value - value * saturation * _unit(np.minimum(k, 4 - k))
    return rgb.astype(np.float32)


# Outlines: signed distance in units of the radius, negative inside.


def _circle(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - np.float32(0.92)


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)


def _triangle(u: Floats, v: Floats) -> Floats:
    slanted = np.float32(math.sqrt(3) / 2) * np.abs(u) + v / 2
    return np.maximum(slanted, -v) - np.float32(0.55)


def _star(u: Floats, v: Floats) -> Floats:
    outer, inner, half = 1.1, 0.5, math.pi / 5
    angle = np.abs((np.arctan2(u, v) + half) % (2 * half) - half)
    radius = np.hypot(u, v)
    # One straight edge, from the tip at angle 0 to the notch at angle `half`.
    edge = np.array([inner * math.cos(half) - outer, inner * math.sin(half)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    along, across = radius * np.cos(angle) - outer, radius * np.sin(angle)
    distance: Floats = (along * normal[0] + across * normal[1]).astype(np.float32)
    return distance


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - np.float32(0.7)) - np.float32(0.26)


def _cross(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    long, wide = np.float32(1.0), np.float32(0.36)
    return np.minimum(np.maximum(a - long, b - wide), np.maximum(b - long, a - wide))


_OUTLINES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


# Textures: share of the main colour at each place, in [0, 1].


def _plain(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return _unit(np.float32(0.75) + np.float32(0.25) * u)


def _stripes(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return _edge(np.sin(np.float32(rng.uniform(7, 11)) * u))


def _checks(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    pitch = np.float32(rng.uniform(5.5, 8))
    return _edge(np.sin(pitch * u) * np.sin(pitch * v))


def _dots(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    pitch = np.float32(rng.uniform(7, 10))
    return _edge(np.float32(0.75) - np.cos(pitch * u) - np.cos(pitch * v))


def _speckle(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    noise = rng.standard_normal(u.shape, dtype=np.float32)
    return _unit(np.float32(0.7) + np.float32(0.3) * noise)


def _unit(values: Floats) -> Floats:
    clipped: Floats = np.clip(values, 0, 1)
    return clipped


def _edge(wave: Floats) -> Floats:
    return _unit(np.float32(0.5) + 2 * wave)


_TEXTURES = (_plain, _stripes, _checks, _dots, _speckle)


# Landscapes: sky above one or two kinds of ground, muted so that objects stand out.


def _landscape(rng: np.random.Generator, size: int) -> tuple[Floats, NDArray[np.uint8]]:
    """Return the canvas (S, S, 3) in [0, 1] and what lies where (S, S)."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)
    horizon = rng.uniform(0.2, 0.6) + _wave(x, rng, 0.03)
    second = horizon + rng.uniform(0.25, 0.5) + _wave(x, rng, 0.05)
    far, near = 1 + rng.permutation(len(STUFF) - 1)[:2]
    stuff = np.where(y < horizon, 0, np.where(y < second, far, near)).astype(np.uint8)
    canvas = np.zeros((size, size, 3), dtype=np.float32)
    for label in np.unique(stuff).tolist():
        place = stuff == label
        canvas[place] = _GROUNDS[STUFF[label]](x, y, rng)[place]
    return canvas, stuff


def _wave(x: Floats, rng: np.random.Generator, height: float) -> Floats:
    phase = np.float32(rng.uniform(0, 2 * math.pi))
    wave: Floats = np.sin(np.float32(rng.uniform(3, 9)) * x + phase) * np.float32(height)
    return wave


def _mix(share: Floats, one: tuple[float, ...], two: tuple[float, ...]) -> Floats:
    a, b = np.array(one, dtype=np.float32), np.array(two, dtype=np.float32)
    mixed: Floats = share[..., None] * a + (1 - share[..., None]) * b
    return mixed


def _sky(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    clouds = _wave(x + 2 * y, rng, 0.5) + _wave(x - 3 * y, rng, 0.5)
    share = _unit(1 - 1.5 * y)
    return _mix(share, (0.50, 0.66, 0.84), (0.82, 0.89, 0.95)) + 0.05 * _unit(clouds)[..., None]


def _field(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    slope = np.float32(rng.uniform(-0.8, 0.8))
    rows = np.sin(np.float32(rng.uniform(50, 80)) * (y + slope * x))
    return _mix(0.5 + 0.5 * rows, (0.52, 0.63, 0.40), (0.43, 0.55, 0.34))


def _sand(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    return _mix(_unit(0.5 + 0.3 * noise), (0.86, 0.79, 0.64), (0.74, 0.66, 0.51))


def _water(x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    bend = _wave(x, rng, 0.25)
    ripples = np.sin(np.float32(rng.uniform(60, 80)) * (y + 0.08 * bend * np.sin(25 * x)))
    return _mix(0.5 + 0.5 * ripples, (0.40, 0.60, 0.67), (0.31, 0.50, 0.60))


_GROUNDS: dict[str, Callable[[Floats, Floats, np.random.Generator], Floats]] = {
    "sky": _sky,
    "field": _field,
    "sand": _sand,
    "water": _water,
}
