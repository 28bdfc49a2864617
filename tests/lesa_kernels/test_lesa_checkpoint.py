"""`from_lesa_checkpoint`, on files that an independent writer made."""

import os
import pickle

import pytest
import torch

import released_lesa
from lesa_kernels import FusedKANPredictor

BOTH = ("_cond", "_uncond")


def load(file, **options):
    return FusedKANPredictor.from_lesa_checkpoint(file, **{"feature_dim": 12, **options})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "predictor_flux_N7_E3.pt"


def test_what_the_file_says_and_what_it_does_not(file):
    released_lesa.save(file, released_lesa.state_dict(steps=30, hidden=10, depth=6))
    predictor = load(file, family="flux")
    config = predictor.config
    assert (config.mixer, config.feature_dim, config.family, config.history) == ("lesa", 12, "flux", "steps")
    assert (config.num_inference_steps, config.hidden, config.lengths) == (30, 10, (3, 6, 6))
    assert (config.stage_bounds, config.options, config.schedule) == ((0.9, 0.5), {"streams": 1}, None)
    assert {value.dtype for value in predictor.parameters()} == {torch.float32}
    assert load(file).config.family is None
    assert load(file, feature_dim=7).config.feature_dim == 7


def test_two_streams_have_other_bounds(file):
    state = released_lesa.state_dict(endings=BOTH)
    predictor = load(released_lesa.save(file, state), family="qwen-image")
    assert predictor.config.stage_bounds == (0.9, 0.4) and predictor.config.options == {"streams": 2}
    for stream, ending in enumerate(BOTH):
        for stage in range(3):
            weight = state[f"latent{ending}.{stage}.weight"][0].float()
            assert predictor.latent_weight[stream, stage, : len(weight)].tolist() == weight.flip(0).tolist()
            scaler = state[f"timestep{ending}.{stage}.layers.1.spline_scaler"].float()
            assert torch.equal(predictor.spline_scaler_1[stream, stage], scaler)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_changed(file, prefix):
    state = released_lesa.state_dict()
    plain = load(released_lesa.save(file, state)).state_dict()
    wrapped = load(released_lesa.save(file, {prefix + name: value for name, value in state.items()})).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in wrapped.items())


@pytest.mark.parametrize("missing", [("config",), ("optimizer", "scheduler"), ("config", "optimizer", "scheduler")])
def test_only_the_model_is_needed(file, missing):
    state = released_lesa.state_dict()
    plain = load(released_lesa.save(file, state)).state_dict()
    less = load(released_lesa.save(file, state, **dict.fromkeys(missing))).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in less.items())


@pytest.mark.parametrize("endings", [("",), BOTH], ids=["one stream", "two streams"])
def test_saving_and_loading_again_gives_the_same_bits(file, tmp_path, endings):
    predictor = load(released_lesa.save(file, released_lesa.state_dict(endings=endings)), family="flux")
    predictor.save_pretrained(tmp_path / "saved")
    again = FusedKANPredictor.from_pretrained(tmp_path / "saved")
    assert again.config == predictor.config and again.config.format_version == 2
    for name, value in predictor.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Harmful:
    """Would make a file if it were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("entry", ["optimizer", "config", "scheduler", "more"])
def test_a_file_that_would_execute_something_is_refused_by_name(file, tmp_path, entry):
    released_lesa.save(file, released_lesa.state_dict(), **{entry: Harmful(tmp_path / "harm")})
    with pytest.raises(
        ValueError, match=r"`file` must hold tensors.* only, but got the types posix.mkdir\. Do not load"
    ):
        load(file)
    assert not (tmp_path / "harm").exists()


def test_another_type_of_the_same_module_is_refused_by_name(file):
    class OtherConfig:
        pass

    with released_lesa.released_types(OtherConfig=OtherConfig):
        torch.save({"model": released_lesa.state_dict(), "config": OtherConfig()}, file)
    with pytest.raises(ValueError, match=r"the types predictor\.model\.config\.OtherConfig\."):
        load(file)


def test_the_stand_ins_keep_nothing_and_are_gone_afterwards(file):
    load(released_lesa.save(file, released_lesa.state_dict()))
    assert not any("predictor.model" in str(kind) for kind in torch.serialization.get_safe_globals())
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def without(key):
    return lambda state: state.pop(key)


def changed(key, change):
    def apply(state):
        state[key] = change(state[key])

    return apply


FIRST = "timestep.0.layers.0"
BROKEN = {
    "a weight is missing": (without("latent.1.weight"), r"hold 'latent\.1\.weight' in `model`, but got a file without"),
    "a bias is missing": (without("latent.2.bias"), r"hold 'latent\.2\.bias' in `model`"),
    "a grid is missing": (without(f"{FIRST}.grid"), r"hold 'timestep\.0\.layers\.0\.grid' in `model`"),
    "a scaler is missing": (
        without("timestep.2.layers.1.spline_scaler"),
        r"hold 'timestep\.2\.layers\.1\.spline_scaler'",
    ),
    "a layer is missing": (
        lambda state: [state.pop(key) for key in list(state) if ".layers.2." in key],
        r"hold 'timestep\.0\.layers\.2\.grid' in `model`",
    ),
    "the first layer is missing": (without(f"{FIRST}.base_weight"), r"hold 'timestep\.0\.layers\.0\.base_weight'"),
    "a layer too much": (
        lambda state: state.update({"timestep.0.layers.3.grid": released_lesa.knots(1)}),
        r"the key 'timestep\.0\.layers\.3\.grid' too",
    ),
    "a stage too much": (
        lambda state: state.update({"latent.3.bias": torch.ones(1)}),
        r"the key 'latent\.3\.bias' too",
    ),
    "both kinds of streams": (
        lambda state: state.update({"latent_cond.0.weight": torch.ones(1, 4)}),
        r"hold 'timestep_cond\.0\.layers\.0\.base_weight'",
    ),
    "other widths in a stage": (
        changed("timestep.1.layers.0.base_weight", lambda value: value[:, :-1]),
        r"`model\['timestep\.1\.layers\.0\.base_weight'\]` must have shape \[8, 51\]",
    ),
    "a wide latent": (
        changed("latent.0.weight", lambda value: value.repeat(2, 1)),
        r"`model\['latent\.0\.weight'\]` must have shape \[1, K\]",
    ),
    "no latent": (changed("latent.0.weight", lambda value: value[:, :0]), r"have at least one weight, but got none"),
    "another number of splines": (
        changed(f"{FIRST}.spline_weight", lambda value: value[..., :-1]),
        r"`model\['timestep\.0\.layers\.0\.spline_weight'\]` must have shape \[8, 51, 8\]",
    ),
    "no tensor": (changed("latent.0.bias", lambda value: 1.0), r"`model\['latent\.0\.bias'\]` must be a torch.Tensor"),
    "integers": (
        changed("latent.0.bias", lambda value: value.int()),
        r"`model\['latent\.0\.bias'\]` must have one of the dtypes",
    ),
    "another range": (
        changed(f"{FIRST}.grid", lambda value: released_lesa.knots(51, (-1.0, 1.0))),
        r"grid_size=5, spline_order=3, grid_range=\(-3\.0, 3\.0\) .* but got those of grid_size=5, spline_order=3",
    ),
    "another size": (
        changed("timestep.1.layers.2.grid", lambda value: released_lesa.knots(8, size=8, dtype=torch.float32)[:, :12]),
        r"`model\['timestep\.1\.layers\.2\.grid'\]` must hold the uniform knots",
    ),
    "an adapted grid": (
        changed(f"{FIRST}.grid", lambda value: value + torch.linspace(0, 1, 12) ** 2),
        r"knots that are not uniform",
    ),
    "one number for a whole weight": (
        changed(f"{FIRST}.base_weight", lambda value: torch.zeros(1).expand(8, 10**7)),
        r"0\.base_weight'\]` must have all of its elements in the file, but got 1 in the file for the shape \[8,",
    ),
    "one number for a latent weight": (
        changed("latent.1.weight", lambda value: torch.zeros(1).expand(1, 10**9)),
        r"`model\['latent\.1\.weight'\]` must have all of its elements in the file",
    ),
    "one row for a whole grid": (
        changed(f"{FIRST}.grid", lambda value: value[0].clone().expand(51, -1)),
        r"0\.grid'\]` must have all of its elements in the file, but got 12 in the file",
    ),
    "a sparse weight": (
        changed(f"{FIRST}.base_weight", lambda value: value.to_sparse()),
        r"0\.base_weight'\]` must be a dense tensor with values, but got one of layout torch.sparse_coo",
    ),
    "a weight without values": (
        changed("latent.0.bias", lambda value: value.to("meta")),
        r"bias'\]` must be a dense tensor with values, but got one of layout torch.strided on the device meta",
    ),
    "a grid without values": (
        changed(f"{FIRST}.grid", lambda value: value.to("meta")),
        r"0\.grid'\]` must be a dense tensor with values",
    ),
    "no hidden units": (
        changed(f"{FIRST}.base_weight", lambda value: value[:0]),
        r"0\.base_weight'\]` must have at least one row, and two columns .* got shape \[0, 51\]",
    ),
    "a run of no steps": (
        changed(f"{FIRST}.base_weight", lambda value: value[:, :1]),
        r"0\.base_weight'\]` must have at least one row, and two columns .* got shape \[8, 1\]",
    ),
    "rows of a grid that differ": (
        changed(f"{FIRST}.grid", lambda value: torch.cat([value[:-1], value[-1:] + 1])),
        r"knots that are not uniform, or not the same for all input features",
    ),
    "a grid of other inputs": (
        changed(f"{FIRST}.grid", lambda value: value[:-1]),
        r"`model\['timestep\.0\.layers\.0\.grid'\]` must have shape \[51, knots\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_by_name(file, name):
    change, message = BROKEN[name]
    state = released_lesa.state_dict()
    change(state)
    torch.save({"model": state}, file)
    with pytest.raises((ValueError, TypeError), match=message):
        load(file)


@pytest.mark.parametrize(
    "contents, message",
    [
        ([1], r"hold a dict with the state dict `model`, but got \[1\]"),
        ({"state_dict": {}}, r"the entries state_dict"),
        ({"model": [1]}, r"the entries model"),
        ({"model": {}}, r"hold 'timestep\.0\.layers\.0\.base_weight'"),
        ({"model": {1: torch.ones(1)}}, r"the key 1\."),
        (
            {"model": {"latent.0.bias": torch.ones(1), "module.latent.0.bias": torch.ones(1)}},
            r"'module\.latent\.0\.bias'",
        ),
    ],
)
def test_other_contents_are_refused(file, contents, message):
    torch.save(contents, file)
    with pytest.raises(ValueError, match=message):
        load(file)


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="`file` must be an existing file"):
        load(file)
    with pytest.raises(TypeError, match="`file` must be a path"):
        load(3)
    file.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(ValueError, match="`file` must be a whole file of `torch.save`"):
        load(file)
    whole = released_lesa.save(file, released_lesa.state_dict()).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="`file` must be a whole file of `torch.save`"):
        load(file)
    with pytest.raises(ValueError, match="`feature_dim`"):
        load(released_lesa.save(file, released_lesa.state_dict()), feature_dim=0)
