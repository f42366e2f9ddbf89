"""Long curves keep their extremes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from knet_platform.report.thinning import thin


def test_short_curves_stay_as_they_are() -> None:
    assert thin(8, [3.0] * 8).tolist() == list(range(8))
    assert thin(8, []).tolist() == []


def test_a_spike_of_one_point_among_ten_thousand_stays() -> None:
    values = np.sin(np.linspace(0, 9, 10_000))
    values[6_123], values[40] = 50.0, -50.0
    places = thin(500, values)
    assert {6_123, 40, 0, 9_999} <= set(places.tolist())
    assert len(places) <= 502


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=5, max_size=400),
    st.integers(4, 60),
)
def test_no_extreme_of_any_curve_is_lost(values: list[float], most: int) -> None:
    other = [-2 * value for value in reversed(values)]
    places = thin(most, values, other)
    assert np.all(np.diff(places) > 0)
    assert (places[0], places[-1]) == (0, len(values) - 1)
    for curve in (np.asarray(values), np.asarray(other)):
        if not np.isnan(curve).all():
            assert np.nanmax(curve[places]) == np.nanmax(curve)
            assert np.nanmin(curve[places]) == np.nanmin(curve)
