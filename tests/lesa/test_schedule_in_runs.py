"""`lesa.find_schedule_in_runs`: the family of schedules, the search near the best ones, and the runs that decide."""

import json
import math
import random
import shutil

import pytest
import torch

import lesa
from interrupted_fits import CASE, STEPS, inputs
from lesa.fitting import schedule_in_runs
from lesa.fitting.comparing import LatentRuns, Made
from lesa.fitting.probing import probed
from lesa.fitting.schedule_family import REACH, family, moved
from lesa.fitting.schedule_in_runs import best_schedule, drawn_schedule
from lesa.schedule import Schedule
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_wan import EXPERTS

COUNT = 3
EVEN = tuple(1 - step / STEPS for step in range(STEPS))


def levels_of(total, shift):
    """Noise levels of a run, shifted as by flow-matching schedulers."""
    return [shift * level / (1 + (shift - 1) * level) for level in (1 - step / total for step in range(total))]


def is_valid(steps, count, total):
    rises = all(a < b for a, b in zip(steps, steps[1:]))
    return len(steps) == count and steps[0] == 0 and rises and steps[-1] < total


# The family


def check_family(totals):
    for total in totals:
        for levels in (levels_of(total, 1.0), levels_of(total, 3.0), [0.1 * step for step in range(total)]):
            for count in range(2, min(16, total - 1) + 1):
                found = family(count, levels)
                assert len({*found}) == len(found) <= 41
                assert all(is_valid(steps, count, total) for steps in found), (total, count)


def test_another_schedule_has_nothing_that_belonged_to_the_old_one():
    own = {"schedule": (0, 3), "schedule_sigmas": (1.0, 0.4), "schedule_errors": (0.0, 0.1), "num_inference_steps": 6}
    config = PredictorConfig(8, **own, told_levels=(0.9, 0.4), more_step_counts=(8,))
    made = schedule_in_runs.config_for(FusedKANPredictor(config), Schedule((0, 1, 4), 6, (1.0, 0.8, 0.3)))
    assert made == PredictorConfig(
        8, schedule=(0, 1, 4), schedule_sigmas=(1.0, 0.8, 0.3), num_inference_steps=6, stage_bounds=made.stage_bounds
    )


def test_members_of_the_family_are_schedules():
    check_family((12, 13, 50))


@pytest.mark.slow
def test_members_of_the_family_are_schedules_for_all_lengths_of_runs():
    check_family(range(12, 51))


def test_the_gaps_of_a_member_have_the_lengths_that_are_stated():
    total, count, levels = 50, 4, levels_of(50, 3.0)
    found = family(count, levels)
    lengths = [x**1.2 * (1 - x) ** 0.4 for x in (0.125, 0.375, 0.625, 0.875)]
    shares = [sum(lengths[:j]) / sum(lengths) for j in (1, 2, 3)]
    passed = [(step / total + 1 - level) / 2 for step, level in enumerate(levels)]  # in steps and noise levels
    assert (0, *(min(range(total), key=lambda step: abs(passed[step] - share)) for share in shares)) in found
    assert (0, *(min(range(total), key=lambda step: abs(1 - levels[step] - share)) for share in shares)) in found
    assert found[0] == Schedule.spread(count, total, levels).steps


def test_with_levels_that_fall_evenly_both_measures_give_the_same_schedules():
    assert len(family(9, levels_of(50, 1.0))) == 21 and len(family(9, levels_of(50, 3.0))) > 30


# Schedules near others


def test_moved_schedules_are_near():
    rng, steps, found = random.Random(0), (0, 3, 6, 9), set()
    for _ in range(500):
        other = moved(steps, 11, 1, rng)
        if other is not None:
            assert is_valid(other, 4, 11) and sum(a != b for a, b in zip(steps, other)) == 1
            assert max(abs(a - b) for a, b in zip(steps, other)) <= REACH
            found.add(other)
    assert len(found) == 11  # four moves for each of three steps, but step 9 cannot become 11
    assert moved((0, 1), 2, 1, rng) is None and moved(steps, 11, 0, rng) == steps


def test_the_schedule_of_an_update_depends_on_seed_and_number_only():
    given = family(5, levels_of(50, 3.0))
    drawn = [drawn_schedule(given, 50, 7, number) for number in range(300)]
    assert drawn == [drawn_schedule(given, 50, 7, number) for number in range(300)]
    assert drawn != [drawn_schedule(given, 50, 8, number) for number in range(300)]
    assert all(is_valid(steps, 5, 50) for steps in drawn)
    assert len({*drawn} - {*given}) > 50 and len({*drawn} & {*given}) > 20  # some are moved, and some are not


# The search


def near(wanted):
    """A judge whose best schedule is known."""
    return lambda steps: -float(sum(abs(a - b) for a, b in zip(steps, wanted)))


@pytest.mark.parametrize("wanted", [(0, 3, 9, 17, 25, 36, 41, 47), (0, 1, 7, 12, 20, 28, 36, 45)])
def test_a_known_best_schedule_is_found(wanted):
    given, tried = family(8, levels_of(50, 1.0)), []
    judge = near(wanted)

    def counted(steps):
        tried.append(steps)
        return judge(steps)

    assert wanted not in given
    assert best_schedule(given, 50, counted, 200, 0) == (wanted, 0.0)
    assert len({*tried}) == len(tried) == len(given) + 200 and tried[: len(given)] == given


def test_the_best_of_all_that_were_tried_is_found_and_a_seed_gives_the_same():
    def found(seed, moves):
        tried = {}

        def judge(steps):  # without any order among neighbours
            tried[steps] = random.Random(str(steps)).choice([random.Random(str(steps)).random(), math.nan])
            return tried[steps]

        best, figure = best_schedule(family(6, levels_of(30, 2.0)), 30, judge, moves, seed)
        assert figure == tried[best] == max(each for each in tried.values() if not math.isnan(each))
        return best, [*tried]

    assert found(1, 30) == found(1, 30)
    assert found(1, 30)[1] != found(2, 30)[1]
    assert found(1, 30)[1][:-10] == found(1, 20)[1]


def test_it_ends_where_all_schedules_were_tried():
    tried = []
    best_schedule(family(2, levels_of(6, 1.0)), 6, lambda steps: tried.append(steps) or 1.0, 100, 0)
    assert sorted(tried) == [(0, step) for step in range(1, 6)]


def test_of_equal_schedules_the_first_is_the_best():
    given = family(4, levels_of(20, 1.0))
    assert best_schedule(given, 20, lambda steps: 1.0, 20, 0)[0] == given[0]
    assert best_schedule(given, 20, lambda steps: math.nan, 0, 0) == (given[0], -math.inf)


# The whole


def untrained(**changes):
    trained_for = {
        "hidden": 3,
        "rank": 1,
        "schedule": (0, 2, 4),
        "schedule_sigmas": tuple(EVEN[step] for step in (0, 2, 4)),
    }
    config = PredictorConfig(
        **{"feature_dim": 32, "family": "flux", "num_inference_steps": STEPS, **trained_for, **changes}
    )
    predictor = FusedKANPredictor(config)
    predictor.reset_parameters(torch.Generator().manual_seed(0))
    return predictor


OPTIONS = {"updates": 2, "moves": 2, "samples": 2, "batch_size": 2, "progress": False}


@pytest.fixture
def judged(monkeypatch):
    """Without trainings and runs: a list that gets what is measured, in a search whose best schedule is 0, 3, 5."""
    measured = []
    monkeypatch.setattr(schedule_in_runs, "trained_end_to_end", lambda predictor, *args, **options: predictor)
    monkeypatch.setattr(LatentRuns, "make_references", lambda self: None)

    def errors(self, predictor):
        measured.append(predictor.config.schedule)
        return Made((), 3.0, 3.0, psnr=[near((0, 3, 5))(measured[-1]) + noise for noise in (-1.0, 1.0)])

    monkeypatch.setattr(LatentRuns, "errors", errors)
    return measured


def test_the_schedule_is_found_and_all_figures_are_kept(judged, tmp_path):
    predictor, pipe = untrained(), CASE.build()
    found = lesa.find_schedule_in_runs(predictor, pipe, inputs(), COUNT, out_dir=tmp_path, **OPTIONS)
    levels = probed(pipe, inputs(), STEPS).sigmas
    assert found.steps == (0, 3, 5) and found.num_inference_steps == STEPS
    assert found.sigmas == tuple(levels[step] for step in found.steps)
    assert [path.name for path in tmp_path.iterdir()] == ["schedules.json"]
    kept = json.loads((tmp_path / "schedules.json").read_text())
    assert kept["schedule"] == [0, 3, 5] and len(kept["psnr"]) == len(judged)
    assert all(kept["psnr"][",".join(map(str, steps))] == near((0, 3, 5))(steps) for steps in judged)
    assert {*family(COUNT, levels)} <= {*judged} and max(kept["psnr"].values()) == kept["psnr"]["0,3,5"]
    assert predictor.config.schedule == (0, 2, 4)


def test_candidates_are_tried_too(judged):
    chosen = {"candidates": [(0, 4, 5), lesa.Schedule((0, 1, 2), STEPS)], **OPTIONS, "moves": 0}
    lesa.find_schedule_in_runs(untrained(), CASE.build(), inputs(), COUNT, **chosen)
    assert {(0, 4, 5), (0, 1, 2)} <= {*judged}


def test_an_interrupted_search_measures_only_what_is_missing(judged, tmp_path, monkeypatch):
    call = (untrained(), CASE.build(), inputs(), COUNT)
    whole = lesa.find_schedule_in_runs(*call, out_dir=tmp_path / "whole", **OPTIONS)
    wanted, errors = [*judged], LatentRuns.errors
    judged.clear()
    for end in (1, 4, len(wanted)):

        def interrupted(self, predictor, end=end):
            if len(judged) == end:
                raise KeyboardInterrupt
            return errors(self, predictor)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LatentRuns, "errors", interrupted)
            patch.setattr("lesa.fitting.find_schedule_in_runs.write_text", interrupted_write)
            lesa.find_schedule_in_runs(*call, out_dir=tmp_path / "other", **OPTIONS)
    assert lesa.find_schedule_in_runs(*call, out_dir=tmp_path / "other", **OPTIONS) == whole
    assert judged == wanted
    one, other = ((tmp_path / name / "schedules.json").read_bytes() for name in ("whole", "other"))
    assert one == other


def interrupted_write(path, text):
    if path.name == "schedules.json":
        raise KeyboardInterrupt
    path.write_text(text)


def test_nothing_is_found_where_no_run_has_a_figure(judged, monkeypatch):
    monkeypatch.setattr(LatentRuns, "errors", lambda self, predictor: Made((), 3.0, 3.0, psnr=[math.nan]))
    with pytest.raises(RuntimeError, match="No schedule was found: in all runs with the predictor there is NaN"):
        lesa.find_schedule_in_runs(untrained(), CASE.build(), inputs(), COUNT, **OPTIONS)


@pytest.mark.slow
def test_the_figures_are_those_of_runs_with_the_trained_predictor(tmp_path, monkeypatch):
    """No schedule that is tried is better than the one that is returned, in runs that the test makes itself."""
    learned, train = [], schedule_in_runs.trained_end_to_end
    monkeypatch.setattr(
        schedule_in_runs,
        "trained_end_to_end",
        lambda *args, **options: learned.append(train(*args, **options)) or learned[0],
    )
    pipe, chosen, first = CASE.build(), inputs(), untrained()
    found = lesa.find_schedule_in_runs(first, pipe, chosen, COUNT, seed=5, out_dir=tmp_path, **OPTIONS)
    assert not torch.equal(learned[0].state_dict()["up"], first.state_dict()["up"])
    kept = json.loads((tmp_path / "schedules.json").read_text())["psnr"]
    wanted = [latents_of(pipe, chosen[number], 5 + number) for number in range(2)]
    for name, figure in kept.items():
        with lesa.enable_cache(pipe, learned[0], [int(step) for step in name.split(",")]):
            made = [latents_of(pipe, chosen[number], 5 + number) for number in range(2)]
        psnr = [10 * (4 / (a - b).square().mean()).log10().item() for a, b in zip(made, wanted)]
        assert figure == pytest.approx(sum(psnr) / 2, abs=0.05)
    assert kept[str(found)] == max(kept.values())


def latents_of(pipe, item, seed):
    arguments = {**item, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(**arguments, generator=torch.Generator().manual_seed(seed), return_dict=False)[0]


# Refusals


def test_two_transformers_are_refused_by_name(tmp_path):
    case = EXPERTS["wan 2.2 cfg"]
    with pytest.raises(ValueError, match="`pipe` must have one transformer.* transformer and transformer_2"):
        lesa.find_schedule_in_runs(untrained(), case.build(), [case.inputs(1)], COUNT, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"count": 1}, "count"),
        ({"count": STEPS}, "count"),
        ({"candidates": [(0, 1)]}, "candidates"),
        ({"candidates": ["0,1,2"]}, "candidates"),
        ({"candidates": [(0, 2, 1)]}, "candidates"),
        ({"candidates": 3}, "candidates"),
        ({"candidates": "0,1,2"}, "candidates"),
        ({"num_inference_steps": 2}, "num_inference_steps"),
        ({"candidates": [(0, 1, STEPS)]}, "candidates"),
        ({"candidates": [lesa.Schedule((0, 1, 2), 50)]}, "candidates"),
        ({"updates": 0}, "updates"),
        ({"moves": -1}, "moves"),
        ({"samples": 0}, "samples"),
        ({"samples_per_call": 0}, "samples_per_call"),
        ({"num_inference_steps": STEPS + 1}, "predictor.config.num_inference_steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_written(judged, tmp_path, change, name):
    arguments = {"count": COUNT, **OPTIONS, "out_dir": tmp_path / "out", **change}
    with pytest.raises((ValueError, TypeError), match=f"`{name}` must"):
        lesa.find_schedule_in_runs(untrained(), CASE.build(), inputs(), **arguments)
    assert not (tmp_path / "out").exists() and judged == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"feature_dim": 4}, "feature_dim"),
        ({"family": "sd3"}, "family"),
        ({"feature_dim": None, "hidden": None, "rank": None, "mixer": "universal"}, "mixer"),
    ],
)
def test_a_predictor_that_cannot_be_trained_here_is_refused_before_anything_is_written(judged, tmp_path, change, name):
    first = untrained(**{**change, **({"schedule": None, "schedule_sigmas": None} if name == "mixer" else {})})
    with pytest.raises(ValueError, match=f"`predictor.config.{name}` must"):
        lesa.find_schedule_in_runs(first, CASE.build(), inputs(), COUNT, out_dir=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists() and judged == []


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_search_that_was_interrupted_at_its_very_end_gives_what_it_has_found(
    judged, tmp_path, monkeypatch, is_removed
):
    call, remove = (untrained(), CASE.build(), inputs(), COUNT), shutil.rmtree

    def stop(folder):
        if is_removed:
            remove(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lesa.fitting.find_schedule_in_runs.shutil.rmtree", stop)
        lesa.find_schedule_in_runs(*call, out_dir=tmp_path, **OPTIONS)
    assert (tmp_path / "work").exists() != is_removed
    judged.clear()
    found = lesa.find_schedule_in_runs(*call, out_dir=tmp_path, **OPTIONS)
    assert judged == [] and found.steps == (0, 3, 5) and found.sigmas is not None
    assert [path.name for path in tmp_path.iterdir()] == ["schedules.json"]


def test_unfinished_work_goes_on_with_the_same_arguments_only(judged, tmp_path, monkeypatch):
    pipe = CASE.build()

    def stop(self, predictor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentRuns, "errors", stop)
        lesa.find_schedule_in_runs(untrained(), pipe, inputs(), COUNT, out_dir=tmp_path, **OPTIONS)
    for change in ({"moves": 5}, {"seed": 1}, {"candidates": [(0, 1, 2)]}, {"inputs": inputs(count=2)}):
        arguments = {"inputs": inputs(), "out_dir": tmp_path, **OPTIONS, **change}
        with pytest.raises(ValueError, match=rf"`{next(iter(change))}` must .* the unfinished search in"):
            lesa.find_schedule_in_runs(untrained(), pipe, count=COUNT, **arguments)
    lesa.find_schedule_in_runs(untrained(), pipe, inputs(), COUNT, out_dir=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="`out_dir` must be empty or hold an unfinished search, but got files in"):
        lesa.find_schedule_in_runs(untrained(), pipe, inputs(), COUNT, out_dir=tmp_path, **OPTIONS)
