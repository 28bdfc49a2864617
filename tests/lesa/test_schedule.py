import math

import pytest

import released_lesa
from lesa import Schedule
from lesa.schedule import as_schedule


def test_interval_is_three_steps_and_then_every_nth():
    seven = Schedule.interval(7, 50)
    assert seven.steps == (0, 1, 2, 9, 16, 23, 30, 37, 44)
    assert len(seven) == 9 and seven.num_inference_steps == 50
    assert Schedule.interval(10, 50).steps == (0, 1, 2, 12, 22, 32, 42)
    assert Schedule.interval(1, 5).steps == (0, 1, 2, 3, 4)
    assert Schedule.interval(99, 50).steps == (0, 1, 2)


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 7, 10, 60])
@pytest.mark.parametrize("total", [3, 4, 8, 50])
def test_interval_with_four_first_steps_is_that_of_released_lesa(interval, total):
    assert list(Schedule.interval(interval, total, first=4).steps) == released_lesa.computed_steps(interval, total)


@pytest.mark.parametrize("first", [1, 2])
def test_interval_computes_three_first_steps_at_least(first):
    with pytest.raises(ValueError, match=f"`first` must be an integer of at least 3, but got {first}"):
        Schedule.interval(7, 50, first=first)


def released_windows(window, flex, total, warm_up):
    """The steps that the released code of Spectrum computes, which counts the skipped steps in a row."""
    computed, skipped = [], 0
    for step in range(total):
        is_computed = step < warm_up or (skipped + 1) % math.floor(window) == 0
        if is_computed and step >= warm_up:
            window += flex
        skipped = 0 if is_computed else skipped + 1
        computed += [step] * is_computed
    return tuple(computed)


@pytest.mark.parametrize("window", [1, 2, 2.5, 7])
@pytest.mark.parametrize("flex", [0, 0.75, 3])
@pytest.mark.parametrize(("total", "first"), [(50, 5), (50, 1), (7, 3), (3, 5)])
def test_windows_are_those_of_released_spectrum(window, flex, total, first):
    schedule = Schedule.windows(window, flex, total, first)
    assert schedule.steps == released_windows(window, flex, total, first) and schedule.num_inference_steps == total


@pytest.mark.parametrize(
    ("change", "name"), [({"window": 0.5}, "window"), ({"flex": -1}, "flex"), ({"first": 0}, "first")]
)
def test_windows_that_cannot_be_are_refused(change, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        Schedule.windows(**{"window": 2, "flex": 0.75, "num_inference_steps": 50, **change})


@pytest.mark.parametrize("total, steps", [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (4, (0, 1, 2))])
def test_interval_of_short_runs(total, steps):
    assert Schedule.interval(5, total).steps == steps


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 25, 49, 50])
def test_spread_has_the_count_and_gaps_that_rise_and_fall(count):
    schedule = Schedule.spread(count, 50)
    assert len(schedule) == count and schedule.steps[-1] < 50
    if 3 < count < 20:
        gaps = [b - a for a, b in zip(schedule.steps, (*schedule.steps[1:], 50))]
        assert gaps[0] <= 3 and gaps[-1] <= max(gaps)
        largest = gaps.index(max(gaps))
        assert all(b - a >= -1 for a, b in zip(gaps[:largest], gaps[1:]))
        assert all(b - a <= 1 for a, b in zip(gaps[largest:], gaps[largest + 1 :]))


@pytest.mark.parametrize(
    ("count", "total", "steps"),
    [
        (1, 50, (0,)),
        (2, 50, (0, 1)),
        (3, 50, (0, 3, 33)),
        (7, 50, (0, 3, 10, 18, 27, 36, 45)),
        (9, 50, (0, 2, 6, 12, 19, 26, 33, 40, 46)),
        (12, 50, (0, 1, 4, 8, 12, 17, 22, 28, 33, 39, 44, 48)),
        (8, 28, (0, 1, 4, 8, 13, 17, 22, 26)),
        (10, 10, tuple(range(10))),
    ],
)
def test_spread_by_hand(count, total, steps):
    assert Schedule.spread(count, total).steps == steps
    assert Schedule.spread(count, total).num_inference_steps == total


def test_spread_depends_on_the_noise_levels():
    even = [1 - i / 50 for i in range(50)]
    assert Schedule.spread(9, 50, even) == Schedule.spread(9, 50)
    shifted = [3 * s / (1 + 2 * s) for s in even]
    assert Schedule.spread(9, 50, shifted).steps == (0, 3, 9, 17, 25, 33, 39, 44, 48)
    assert Schedule.spread(9, 50, [10 * s for s in shifted]) == Schedule.spread(9, 50, shifted)
    with pytest.raises(ValueError, match="`sigmas` must have the 50 noise levels of the run"):
        Schedule.spread(9, 50, [*even, 0.0])


def test_spread_of_short_runs_fits():
    for total in range(1, 12):
        for count in range(1, total + 1):
            assert len(Schedule.spread(count, total)) == count
    with pytest.raises(ValueError, match="`num_computed` must be an integer of at least 1 and at most 4, but got 5"):
        Schedule.spread(5, 4)


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 2, 2), (0, 3, 2)], ids=str)
def test_steps_must_rise_from_zero(steps):
    with pytest.raises(ValueError, match="`steps` must be rising step indices that start with 0, but got"):
        Schedule(steps)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (((0, 1.5),), TypeError, "`steps` must be an integer of at least 0, but got 1.5"),
        (((-1, 0),), ValueError, "`steps` must be an integer of at least 0, but got -1"),
        (((0, True),), TypeError, "`steps` must be an integer"),
        (((0, 50), 50), ValueError, r"`steps` must be below 50, the number of steps, but got \(0, 50\)"),
        (((0,), 0), ValueError, "`num_inference_steps` must be an integer of at least 1, but got 0"),
        (((0, 1), 50, (1.0,)), ValueError, r"`sigmas` must have one noise level for each of the 2 steps"),
        (((0,), 50, (float("nan"),)), ValueError, "`sigmas` must be a finite number, but got nan"),
        (((0,), 50, ("high",)), TypeError, "`sigmas` must be a finite number, but got 'high'"),
    ],
)
def test_errors_name_the_field(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Schedule(*arguments)


@pytest.mark.parametrize("interval", [0, -3, 2.5, "7", True, None])
def test_interval_must_be_a_positive_integer(interval):
    with pytest.raises((ValueError, TypeError), match="`interval` must be an integer of at least 1, but got"):
        Schedule.interval(interval, 50)


def falling(total, shift=1.0):
    """Noise levels of a flow-matching run; a shift above 1 spends more steps at high noise."""
    plain = [1 - i / total for i in range(total)]
    return [shift * s / (1 + (shift - 1) * s) for s in plain]


TRAINED = (0, 2, 6, 12, 18, 25, 32, 39, 46)


def trained(shift=1.0):
    sigmas = falling(50, shift)
    return Schedule(TRAINED, 50, tuple(sigmas[s] for s in TRAINED))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_trained_noise_levels_give_the_trained_steps(shift):
    run = falling(50, shift)
    assert trained(shift).computed_in(run) == frozenset(TRAINED)
    assert trained(shift).computed_in([s + 1e-6 for s in run]) == frozenset(TRAINED)  # rounding does not matter


@pytest.mark.parametrize("total", [1, 2, 4, 10, 28, 49, 51, 100, 1000])
@pytest.mark.parametrize("shift", [1.0, 0.4, 3.0])
def test_other_runs_compute_the_steps_nearest_in_sigma(total, shift):
    run = falling(total, shift)
    schedule = trained()
    computed = sorted(schedule.computed_in(run))
    assert computed[0] == 0 and computed[-1] < total
    distances = [min(abs(s - sigma) for s in run) for sigma in schedule.sigmas]
    for sigma, distance in zip(schedule.sigmas, distances):  # ties may go either way
        assert min(abs(run[i] - sigma) for i in computed) == pytest.approx(distance)
    for i in computed[1:]:
        assert any(abs(run[i] - s) == pytest.approx(d) for s, d in zip(schedule.sigmas, distances))


def test_a_run_that_starts_at_lower_noise_still_computes_its_first_step():
    run = falling(50)[30:]
    assert sorted(trained().computed_in(run)) == [0, 2, 9, 16]


def test_a_run_that_starts_at_higher_noise_computes_its_first_step_too():
    schedule = Schedule((0, 5), 20, (0.6, 0.3))
    assert schedule.computed_in(falling(50)) == {0, 20, 35}


def test_without_noise_levels_the_indices_stand():
    assert Schedule((0, 3, 9)).computed_in(falling(5)) == {0, 3}
    assert Schedule((0, 3, 9), 10).computed_in(falling(50, 3.0)) == {0, 3, 9}


def test_as_schedule():
    schedule = Schedule((0, 4))
    assert as_schedule(schedule, 50) is schedule
    assert as_schedule(7, 50) == Schedule.interval(7, 50)
    assert as_schedule([0, 1, 5]) == as_schedule(iter((0, 1, 5)), 50) == Schedule((0, 1, 5))


@pytest.mark.parametrize(
    "value, kind, message",
    [
        ("7", TypeError, "`schedule` must be an integer of at least 1, but got '7'"),
        (2.5, TypeError, "`schedule` must be an integer of at least 1, but got 2.5"),
        (True, TypeError, "`schedule` must be an integer of at least 1, but got True"),
        (0, ValueError, "`schedule` must be an integer of at least 1, but got 0"),
        (None, TypeError, "`schedule` must be an integer of at least 1, but got None"),
        ([3, 4], ValueError, r"`steps` must be rising step indices that start with 0, but got \(3, 4\)"),
        ({5: 1}, ValueError, "`steps` must be rising step indices"),
    ],
)
def test_as_schedule_errors(value, kind, message):
    with pytest.raises(kind, match=message):
        as_schedule(value, 50)


def test_an_interval_needs_the_number_of_steps():
    with pytest.raises(TypeError, match="`num_inference_steps` must be an integer of at least 1, but got None"):
        as_schedule(7)


def test_str_lists_the_steps():
    assert str(Schedule((0, 2, 9))) == "0,2,9"
