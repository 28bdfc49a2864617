"""`find_stages`, on worlds whose dynamics change where the test says, or nowhere."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lesa
from lesa.cli import main
from lesa.training import schedule_search, stages
from lesa.training.training_run import CHECKPOINT_NAME, Training
from lesa.training.trajectories import FORMAT_VERSION, HEAD, MANIFEST
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, TOKENS, WIDTH = 14, 16, 8
SCHEDULE = (0, 2, 5, 8, 11)
CONFIG = PredictorConfig(WIDTH, rank=WIDTH, hidden=4)
SIGMAS = torch.linspace(1, 1 / STEPS, STEPS)


def write_trajectories(folder, change=None, samples=64):
    """Computed features are a random walk; those after each lead off it by a mixture of the channels of its last step.

    One mixture from the start, and another from the step `change` on.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    early, late = (torch.linalg.qr(normal(WIDTH, WIDTH)).Q for _ in range(2))
    save_file({"weight": torch.eye(WIDTH)}, folder / HEAD)
    for number in range(samples):
        computed = normal(len(SCHEDULE), TOKENS, WIDTH).cumsum(0)
        features = torch.empty(STEPS, TOKENS, WIDTH)
        for step in range(STEPS):
            newest = sum(c <= step for c in SCHEDULE) - 1
            features[step] = computed[newest]
            if newest and step not in SCHEDULE:
                mixture = early if change is None or SCHEDULE[newest] < change else late
                at, before = (SIGMAS[SCHEDULE[n]] for n in (newest, newest - 1))
                slope = (computed[newest] - computed[newest - 1]) / (at - before)
                features[step] += (SIGMAS[step] - at) * slope @ mixture
        tensors = {
            "features": features,
            "sigmas": SIGMAS,
            "scale": torch.zeros(STEPS, WIDTH),
            "shift": torch.zeros(STEPS, WIDTH),
            "token_index": torch.arange(TOKENS),
        }
        save_file(tensors, folder / f"sample-{number:05d}.safetensors")
    facts = {"family": "flux", "feature_dim": WIDTH, "num_inference_steps": STEPS, "samples": samples, "head_eps": 1e-6}
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "seed": 0, **facts}))
    return lesa.Trajectories(folder)


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """A world that changes at step 8."""
    return write_trajectories(tmp_path_factory.mktemp("changing") / "t", change=8)


@pytest.fixture
def few(tmp_path):
    return write_trajectories(tmp_path / "t", samples=4)


class Watched(lesa.Trajectories):
    """Trajectories that note who reads them: by training, the numbers read with gradients and those read without."""

    def __init__(self, folder):
        super().__init__(folder)
        self.reads = []

    def begin(self):
        self.reads.append((set(), set()))

    def __getitem__(self, number):
        if self.reads:
            self.reads[-1][not torch.is_grad_enabled()].add(number)
        return super().__getitem__(number)


@pytest.fixture
def watch(monkeypatch):
    """Makes `Watched` trajectories of a folder, for the trainings that begin afterwards."""

    def make(folder):
        watched, begin = Watched(folder), torch.optim.AdamW.__init__

        def begin_training(self, *args, **options):
            watched.begin()
            begin(self, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "__init__", begin_training)
        return watched

    return make


def losses(monkeypatch, of):
    """Replaces brief trainings by `of(bounds, seed)`; returns the list of the calls."""
    asked = []

    def loss(trajectories, config, device, seed):
        asked.append((config.stage_bounds, seed))
        return of(config.stage_bounds, seed)

    monkeypatch.setattr(stages, "_loss_of", loss)
    return asked


@pytest.mark.slow
def test_the_bound_is_found_where_the_world_changes(changing, watch):
    watched = watch(changing.folder)
    assert lesa.find_stages(watched, SCHEDULE, CONFIG, progress=False) == (float(SIGMAS[8]),)
    assert len({frozenset(validation) for _, validation in watched.reads}) == 2  # the other seed has other samples


@pytest.mark.slow
def test_a_world_that_never_changes_has_one_stage(tmp_path):
    trajectories = write_trajectories(tmp_path / "t")
    assert lesa.find_stages(trajectories, SCHEDULE, CONFIG, progress=False) == ()


def test_bounds_are_at_computed_steps_between_predicted_ones(few, monkeypatch):
    asked = losses(monkeypatch, lambda bounds, seed: 1.0)
    assert lesa.find_stages(few, (0, 1, 2, 5, 8, 13), CONFIG, progress=False) == ()
    assert {bounds for bounds, _ in asked} == {(), *((float(SIGMAS[step]),) for step in (5, 8))}


def test_stages_are_split_until_the_gain_is_small(few, monkeypatch):
    a, b, c, d = (float(SIGMAS[step]) for step in SCHEDULE[1:])
    gains = {c: 0.5, a: 0.1, d: 0.02, b: 0.01}
    asked = losses(monkeypatch, lambda bounds, seed: 2.0 - sum(gains[bound] for bound in bounds))
    assert lesa.find_stages(few, SCHEDULE, CONFIG, progress=False) == (a, c)
    assert len(asked) == len(set(asked)) == 1 + 4 + 3 + 2 + 3  # no training twice; three with the other seed
    assert lesa.find_stages(few, SCHEDULE, CONFIG, most=2, progress=False) == (c,)
    assert lesa.find_stages(few, SCHEDULE, CONFIG, most=1, progress=False) == ()


def test_a_gain_must_show_with_another_seed_too(few, monkeypatch):
    losses(monkeypatch, lambda bounds, seed: 1.0 if seed == 6 else 1.0 - 0.1 * len(bounds))
    assert lesa.find_stages(few, SCHEDULE, CONFIG, seed=5, progress=False) == ()
    assert len(lesa.find_stages(few, SCHEDULE, CONFIG, seed=7, progress=False)) == 3


def test_training_with_stages_that_are_found(few, monkeypatch):
    bound = float(SIGMAS[5])
    asked = losses(monkeypatch, lambda bounds, seed: 1.0 if bounds == () else 0.9 if bounds == (bound,) else 0.95)
    predictor = lesa.train(few, CONFIG, SCHEDULE, find_stages=True, epochs=1, progress=False)
    assert predictor.config.stage_bounds == (bound,) and predictor.config.history_length == (4, 4)
    assert predictor.config.schedule == SCHEDULE and predictor.config.rank == WIDTH
    asked.clear()
    monkeypatch.setattr(schedule_search, "BRIEF_UPDATES", 12)
    predictor = lesa.train(few, CONFIG, budget=4, find_stages=True, epochs=1, progress=False)
    assert len(predictor.config.schedule) == 4
    chosen = {float(SIGMAS[step]) for step in predictor.config.schedule}
    assert {b for bounds, _ in asked for b in bounds} <= chosen


def test_a_stopped_training_keeps_its_stages(few, tmp_path, monkeypatch):
    bound = float(SIGMAS[5])
    losses(monkeypatch, lambda bounds, seed: 1.0 if bounds == () else 0.9 if bounds == (bound,) else 0.95)
    options = {"find_stages": True, "epochs": 3, "progress": False}
    whole = lesa.train(few, CONFIG, SCHEDULE, **options)
    save = Training._save_checkpoint

    def stop(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            lesa.train(few, CONFIG, SCHEDULE, out_dir=tmp_path / "out", **options)
    assert (tmp_path / "out" / CHECKPOINT_NAME).exists()
    losses(monkeypatch, lambda bounds, seed: pytest.fail("stages were searched again"))
    resumed = lesa.train(few, CONFIG, SCHEDULE, out_dir=tmp_path / "out", **options)
    assert resumed.config == whole.config
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize("samples, streams, trained, validated", [(8, 1, 6, 2), (6, 2, 8, 4), (130, 1, 64, 32)])
def test_brief_trainings_are_compared_on_samples_they_have_not_seen(
    tmp_path, watch, samples, streams, trained, validated
):
    """A quarter of the samples decides, up to 32 trajectories; up to 64 of the others are trained on."""
    folder = tmp_path / "t"
    write_trajectories(folder, samples=samples)
    if streams == 2:
        for file in sorted(folder.glob("sample-*")):
            file.with_stem(file.stem + "-uncond").write_bytes(file.read_bytes())
    watched, rates = watch(folder), []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        lesa.find_stages(watched, (0, 1, 8), CONFIG, most=2, seed=3, progress=False)  # one bound is possible
    finally:
        hook.remove()
    assert len(watched.reads) in (2, 4)  # with one seed, or with two
    for training, validation in watched.reads:
        assert len(training) == trained and len(validation) == validated
        assert not {watched.samples[n] for n in training} & {watched.samples[n] for n in validation}
    assert watched.reads[0] == watched.reads[1]  # of one seed: the same samples for each number of stages
    assert rates[0] == pytest.approx(1e-2) and len(rates) == len(watched.reads) * 10 * math.ceil(trained / 8)


@pytest.mark.parametrize("lengths", [(2, 3, 4), (4, 3, 3)])
def test_history_lengths_must_be_equal(few, lengths):
    config = PredictorConfig(WIDTH, history_length=lengths)
    with pytest.raises(ValueError, match=r"`config.history_length` must be equal in all stages.*Pass one int"):
        lesa.find_stages(few, SCHEDULE, config, progress=False)


def test_arguments_are_checked(few, tmp_path):
    with pytest.raises(ValueError, match="`config.mixer` must be 'newton'.*by hand"):
        lesa.find_stages(few, SCHEDULE, PredictorConfig(WIDTH, mixer="dense"), progress=False)
    with pytest.raises(ValueError, match="`most` must be an integer of at least 1, but got 0"):
        lesa.find_stages(few, SCHEDULE, CONFIG, most=0, progress=False)
    with pytest.raises(ValueError, match="`seed` must be"):
        lesa.find_stages(few, SCHEDULE, CONFIG, seed=-1, progress=False)
    with pytest.raises(ValueError, match="`config.feature_dim` must be that of the trajectories"):
        lesa.find_stages(few, SCHEDULE, PredictorConfig(4), progress=False)
    one = write_trajectories(tmp_path / "one", samples=1)
    with pytest.raises(ValueError, match="`trajectories` must be of two samples or more.*Record more"):
        lesa.find_stages(one, SCHEDULE, CONFIG, progress=False)


@pytest.mark.parametrize("gain", [0.1, 0.0])
def test_the_command_finds_stages(few, tmp_path, monkeypatch, capsys, gain):
    bound = float(SIGMAS[5])
    losses(monkeypatch, lambda bounds, seed: 1.0 - gain if bounds == (bound,) else 1.0)
    schedule, out = ",".join(map(str, SCHEDULE)), tmp_path / "out"
    arguments = ["--trajectories", few.folder, "--out", out, "--schedule", schedule, "--epochs", 1, "--rank", 2]
    main(["train", *map(str, arguments), "--stage-bounds", "auto"])
    config = FusedKANPredictor.from_pretrained(out).config
    assert config.stage_bounds == ((bound,) if gain else ()) and config.rank == 2
    said = "Found 2 noise stages, with bounds at 0.643" if gain else "Found 1 noise stage\n"
    assert said in capsys.readouterr().out
