"""Qualities and their intervals, worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from lesa.evaluation import quality


def images(height=12, width=10, seed=0):
    """Two images of little contrast, so that a range that is guessed from them is not 1."""
    random = np.random.default_rng(seed)
    image = 0.4 + 0.2 * random.random((height, width, 3))
    return image, np.clip(image + 0.03 * random.standard_normal(image.shape), 0, 1)


def ssim_by_hand(image, wanted, window=7):
    """Wang et al. 2004, with a flat window and sample covariances, over the windows that fit."""
    c1, c2 = 0.01**2, 0.03**2  # for values in [0, 1]
    channels = []
    for x, y in zip(np.moveaxis(image, -1, 0), np.moveaxis(wanted, -1, 0)):
        x, y = (sliding_window_view(values, (window, window)).reshape(-1, window**2) for values in (x, y))
        mean_x, mean_y = x.mean(1), y.mean(1)
        covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).sum(1) / (window**2 - 1)
        variances = x.var(1, ddof=1) + y.var(1, ddof=1)
        like = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        channels.append((like / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())
    return np.mean(channels)


def test_ssim_is_that_of_its_formula():
    image, wanted = images()
    expected = ssim_by_hand(image, wanted)
    assert 0.5 < expected < 0.99
    assert quality.ssim(image, wanted) == pytest.approx(expected, rel=1e-9)
    assert quality.ssim(image, image) == 1.0


def test_ssim_of_flat_images_depends_on_the_range_alone():
    """Without structure it is (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2 for a range of 1."""
    image, wanted = np.full((8, 8, 3), 0.5), np.full((8, 8, 3), 0.25)
    assert quality.ssim(image, wanted) == pytest.approx((2 * 0.125 + 1e-4) / (0.3125 + 1e-4), rel=1e-9)
    dark = np.full((8, 8, 3), 0.02)
    assert quality.ssim(dark, dark / 2) == pytest.approx((2 * 0.0002 + 1e-4) / (0.0005 + 1e-4), rel=1e-9)


@pytest.mark.parametrize(("height", "width", "window"), [(7, 9, 7), (6, 9, 5), (12, 5, 5), (4, 4, 3)])
def test_the_window_is_odd_and_fits(height, width, window):
    image, wanted = images(height, width)
    assert quality.ssim(image, wanted) == pytest.approx(ssim_by_hand(image, wanted, window), rel=1e-9)


def test_the_colours_are_the_last_axis():
    """An error in one of three colours counts a third."""
    image, wanted = images(9, 8)
    wanted[..., 1:] = image[..., 1:]
    channel = ssim_by_hand(image[..., :1], wanted[..., :1])
    assert quality.ssim(image, wanted) == pytest.approx((channel + 2) / 3, rel=1e-9)


def test_ssim_of_a_video_is_the_mean_of_its_frames():
    image, wanted = images(9, 8)
    video, full = np.stack([image, wanted, wanted]), np.stack([wanted, wanted, image])
    assert quality.ssim(video, full) == pytest.approx((2 * ssim_by_hand(image, wanted) + 1) / 3, rel=1e-9)


@pytest.mark.parametrize(
    ("error", "peak", "expected"),
    [(0.1, 1.0, 20.0), (0.01, 1.0, 40.0), (0.1, 2.0, 20 + 20 * math.log10(2)), (0.5, 1.0, 20 * math.log10(2))],
)
def test_psnr_of_a_known_error(error, peak, expected):
    wanted = np.linspace(0, 0.4, 4 * 4 * 3).reshape(4, 4, 3)
    sign = np.where(np.arange(wanted.size).reshape(wanted.shape) % 2, 1, -1)
    assert quality.psnr(wanted + error * sign, wanted, peak) == pytest.approx(expected, abs=1e-9)
    assert quality.psnr(wanted, wanted + error * sign, peak) == pytest.approx(expected, abs=1e-9)


def test_psnr_is_of_the_mean_of_the_squares():
    """One value of four is off by 0.2: the mean square is 0.01, whatever the mean of the errors is."""
    assert quality.psnr(np.array([0.0, 0.2, 0.0, 0.0]), np.zeros(4), 1.0) == pytest.approx(20.0, abs=1e-9)
    assert quality.psnr(np.ones(3), np.ones(3), 1.0) == math.inf


def test_the_error_is_relative_to_the_reference():
    wanted = np.array([[0.0, 3.0], [4.0, 0.0]])
    assert quality.relative_error(wanted * 3, wanted) == pytest.approx(2.0)
    assert quality.relative_error(wanted, wanted * 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("differences", "interval"),
    [
        # A mean of three draws is 0, 3, 6 or 9; three of the rare value in a row come up in 1 of 27, 3.7 %.
        ([0.0, 0.0, 9.0], (0.0, 9.0)),
        ([0.0, 9.0, 9.0], (0.0, 9.0)),
        # Four draws: at most two of the rare value in 94.9 %, at most three in 99.6 %.
        ([0.0, 0.0, 0.0, 8.0], (0.0, 6.0)),
        ([-8.0, 0.0, 0.0, 0.0], (-6.0, 0.0)),
        # Two draws: both of one value in a quarter.
        ([-10.0, 10.0], (-10.0, 10.0)),
    ],
)
def test_intervals_worked_out_by_hand(differences, interval):
    assert quality.bootstrap_interval(differences) == interval


def test_an_interval_does_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch):
    differences = np.random.default_rng(0).standard_normal(150)
    generator = np.random.default_rng(3)
    means = [differences[generator.integers(150, size=150)].mean() for _ in range(quality.RESAMPLES)]
    expected = tuple(np.percentile(means, (2.5, 97.5)))
    for most in (quality.LARGEST_DRAW, 1000, 1):
        monkeypatch.setattr(quality, "LARGEST_DRAW", most)
        assert quality.bootstrap_interval(differences, seed=3) == expected


def test_an_interval_is_that_of_all_resamples():
    """Against all 5^5 of them."""
    differences = np.array([0.3, -0.2, 0.9, 1.7, 0.4])
    means = [np.mean(drawn) for drawn in itertools.product(differences, repeat=5)]
    expected = np.percentile(means, (2.5, 97.5))
    assert quality.bootstrap_interval(differences) == pytest.approx(expected, abs=0.03)
    assert quality.bootstrap_interval(differences, seed=1) == pytest.approx(expected, abs=0.03)
    assert quality.bootstrap_interval(differences[::-1]) == pytest.approx(expected, abs=0.03)
