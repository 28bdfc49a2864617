"""What `lesa estimate` says, held to what real runs count."""

import inspect
import json
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lesa
from lesa import cli
from lesa.demo import digits
from lesa.estimation import PRESETS, transformer_flops
from lesa_kernels import FusedKANPredictor, PredictorConfig, work

sys.path.append(str(Path(__file__).parent))
import small_pipelines as small  # noqa: E402

STEPS = 12
WIDTHS = {"num_attention_heads": 2, "attention_head_dim": 32}


def flux(guidance):
    options = {"in_channels": 16, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 48}
    options |= {"pooled_projection_dim": 24, "axes_dims_rope": (8, 12, 12), "guidance_embeds": guidance, **WIDTHS}
    inputs = {"pooled_projections": torch.randn(1, 24), "txt_ids": torch.zeros(7, 3), "img_ids": torch.zeros(30, 3)}
    inputs |= {"hidden_states": torch.randn(1, 30, 16), "encoder_hidden_states": torch.randn(1, 7, 48)}
    return diffusers.FluxTransformer2DModel(**options), inputs | ({"guidance": torch.ones(1)} if guidance else {})


def qwen():
    options = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 48, **WIDTHS}
    inputs = {"hidden_states": torch.randn(1, 30, 16), "encoder_hidden_states": torch.randn(1, 7, 48)}
    inputs |= {"encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.int64), "img_shapes": [[(1, 5, 6)]]}
    model = diffusers.QwenImageTransformer2DModel(**options, axes_dims_rope=(8, 12, 12))
    return model, inputs | (
        {"txt_seq_lens": [7]} if "txt_seq_lens" in inspect.signature(model.forward).parameters else {}
    )


def hunyuan():
    options = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 2}
    options |= {"text_embed_dim": 48, "pooled_projection_dim": 24, "rope_axes_dim": (8, 12, 12), **WIDTHS}
    inputs = {"hidden_states": torch.randn(1, 4, 3, 4, 10), "encoder_hidden_states": torch.randn(1, 7, 48)}
    inputs |= {"encoder_attention_mask": torch.ones(1, 7), "pooled_projections": torch.randn(1, 24)}
    return diffusers.HunyuanVideoTransformer3DModel(**options), inputs | {"guidance": torch.ones(1)}


def sd3():
    options = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 48}
    options |= {"caption_projection_dim": 64, "pooled_projection_dim": 24, "dual_attention_layers": (0, 1), **WIDTHS}
    inputs = {"hidden_states": torch.randn(1, 4, 10, 12), "encoder_hidden_states": torch.randn(1, 7, 48)}
    return diffusers.SD3Transformer2DModel(**options), inputs | {"pooled_projections": torch.randn(1, 24)}


@pytest.mark.parametrize(
    "build",
    [lambda: flux(False), lambda: flux(True), qwen, hunyuan, sd3],
    ids=["flux", "guided", "qwen", "video", "sd3"],
)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(build):
    torch.manual_seed(0)
    transformer, inputs = build()
    # Without a backend that fuses it, attention is two products, which the counter knows on every machine.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(**inputs, timestep=torch.ones(1))
    config = {**transformer.config, "_class_name": type(transformer).__name__}
    assert transformer_flops(config, 30, 7) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("schedule", [None, 4, [0, 1, 5]])
@pytest.mark.parametrize(
    "config", [{}, {"rank": 0, "history_length": 3}, {"mixer": "dense"}], ids=["", "short", "dense"]
)
def test_steps_and_memory_are_those_of_a_run_on_the_digits(pipe, generate, schedule, config):
    computed = (0, 1, 4, 8)
    generate(pipe, STEPS)
    sigmas = [pipe.scheduler.sigmas[step].item() for step in computed]
    known = {"num_inference_steps": STEPS, "schedule": computed, "schedule_sigmas": sigmas}
    predictor = FusedKANPredictor(PredictorConfig(128, family="flux", **known, **config))
    with lesa.enable_cache(pipe, predictor, schedule) as handle:
        generate(pipe, STEPS)
    found = lesa.estimate(
        digits.PIPELINE_DIR,
        *(digits.SIDE, digits.SIDE),
        num_inference_steps=STEPS,
        schedule=schedule,
        predictor=predictor.config,
        batch=2,
        dtype="float32",
    )
    stats = handle.stats
    assert found.image_tokens == 64
    assert (found.computed_steps, found.predicted_steps) == (stats.computed_steps, stats.predicted_steps)
    (stream,) = stats.streams.values()
    assert list(found.computed) == stream.computed
    assert found.ring_bytes == stats.ring_device_bytes
    assert found.predictor_bytes == sum(p.numel() * p.element_size() for p in predictor.parameters())
    assert found.extra_bytes == found.ring_bytes + found.predictor_bytes
    assert found.step_speedup == STEPS / stats.computed_steps


@pytest.mark.parametrize("name", ["qwen cfg", "hunyuan", "sd3 cfg"])
def test_memory_is_that_of_a_run_of_other_families(name, tmp_path):
    case = small.ALL[name]
    pipe = case.build()
    pipe.transformer.save_config(tmp_path / "transformer")
    pipe.vae.save_config(tmp_path / "vae")
    predictor = FusedKANPredictor(PredictorConfig(small.DIM, rank=4, hidden=8))
    with lesa.enable_cache(pipe, predictor, [0, 2, 5, 9]) as handle:
        case.run(pipe, STEPS)
    size = {key: value for key, value in case.size.items() if key in ("height", "width")}
    frames = case.size.get("num_frames", 1)
    steps = {"num_inference_steps": STEPS, "schedule": [0, 2, 5, 9]}
    found = lesa.estimate(tmp_path, **size, frames=frames, **steps, predictor=predictor.config, dtype="float32")
    assert found.computed_steps == handle.stats.computed_steps
    # Guidance in one call has one ring of two samples, in two calls two rings of one: the same bytes.
    assert found.ring_bytes == handle.stats.ring_device_bytes


@pytest.mark.parametrize(
    ("name", "tokens", "feature_bytes"),
    [
        ("flux-1024", 4096, 25.2e6),
        ("qwen-image-1328", 6889, 42.3e6),
        ("hunyuan-video-480p", 20400, 125.3e6),
        ("hunyuan-video-720p", 118800, 730e6),
        ("sd3-1024", 4096, 12.6e6),
    ],
)
def test_presets_have_the_published_sizes(name, tokens, feature_bytes):
    found = lesa.estimate(name)
    assert found.image_tokens == tokens
    assert found.ring_bytes == pytest.approx(4 * found.streams * feature_bytes, rel=5e-3)


@pytest.mark.parametrize("name", ["flux-1024", "qwen-image-1328", "hunyuan-video-480p"])
def test_presets_are_the_defaults_of_diffusers(name):
    config = PRESETS[name][0]
    defaults = inspect.signature(getattr(diffusers, config["_class_name"])).parameters
    known = {key: value for key, value in config.items() if key not in ("_class_name", "guidance_embeds")}
    assert known == {key: defaults[key].default for key in known}


def test_seconds_are_flops_over_rate_and_bytes_over_bandwidth():
    found = lesa.estimate("flux-1024", bandwidth=2e12, flops_rate=400e12, efficiency=0.25, text_tokens=0)
    assert found.computed_seconds == found.step_flops / 100e12
    feature = 4096 * 3072 * 2
    least = work.predict_velocity(1, 4096, 3072, torch.bfloat16, 64, 4, 32)
    assert found.predicted_seconds == pytest.approx(least["bytes"] / 2e12)
    assert 4 * feature < least["bytes"] < 4.2 * feature
    expected = 9 * (found.computed_seconds + 2 * feature / 2e12) + 41 * found.predicted_seconds
    assert found.seconds == pytest.approx(expected)
    assert found.full_seconds == 50 * found.computed_seconds
    assert found.speedup == found.full_seconds / found.seconds
    assert 0.99 < found.speedup_ratio == found.speedup / (50 / 9) < 1


def test_a_measured_step_takes_the_place_of_the_rate():
    found = lesa.estimate("flux-1024", step_seconds=0.2, device="A100")
    assert (found.computed_seconds, found.full_seconds) == (0.2, 50 * 0.2)
    assert "Computed steps as given" in found.table()


def test_the_papers_predictor_is_bound_by_its_products():
    paper = lesa.estimate("flux-1024", predictor=PredictorConfig(3072, mixer="dense"))
    ours = lesa.estimate("flux-1024")
    assert paper.predicted_seconds > 5 * ours.predicted_seconds
    assert paper.extra_bytes > 5 * ours.extra_bytes
    assert paper.speedup_ratio < ours.speedup_ratio


FREE = {"bandwidth": 1e30, "flops_rate": 1e30}
"""Rates at which a predicted step, and a push into the ring, take no time."""


@pytest.mark.parametrize(
    ("batch", "schedule", "hours", "full_hours", "saved"),
    [
        # 7200 images, of which each call makes so many, at 0.2 s a computed step of 50.
        (1, [0, 2, 6, 12, 18, 25, 32, 39, 46], 7200 * 1.8 / 3600, 20.0, (20.0 - 3.6) * 3),
        (2, [0, 2, 6, 12, 18, 25, 32, 39, 46], 1.8, 10.0, 24.6),
        (4, [0, 10, 20, 30, 40], 0.5, 5.0, 13.5),
    ],
)
def test_gpu_hours_and_money_worked_out_by_hand(batch, schedule, hours, full_hours, saved):
    found = lesa.estimate(
        "flux-1024", schedule=schedule, step_seconds=0.2, batch=batch, images_per_day=7200, price=3.0, **FREE
    )
    assert found.seconds == pytest.approx(0.2 * len(schedule))
    assert found.gpu_hours == pytest.approx(hours)
    assert found.full_gpu_hours == pytest.approx(full_hours)
    assert found.saved == pytest.approx(saved)
    assert found.speedup == pytest.approx(50 / len(schedule)) and found.speedup_ratio == pytest.approx(1)
    lines = [line.split("  ") for line in found.table().splitlines()]
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}
    assert rows["GPU-hours a day"] == [f"{full_hours:.4g}", f"{hours:.4g}"]
    assert rows["cost of a day"] == [f"{full_hours * 3:.2f}", f"{hours * 3:.2f}"]
    assert rows["steps computed"] == ["50", f"{len(schedule)}"]
    assert rows["seconds"] == ["10", f"{0.2 * len(schedule):.3g}"]
    text = f"Saved a day, at 7200 images: {full_hours - hours:.4g} GPU-hours, {saved:.2f} in money."
    assert [text] in lines


def test_gpu_hours_hold_the_predicted_steps_too():
    """A bandwidth at which each of 41 predicted steps takes as long as a computed one."""
    rates = {"step_seconds": 0.2, "flops_rate": 1e60}
    moved = lesa.estimate("flux-1024", bandwidth=1.0, **rates).predicted_seconds
    found = lesa.estimate("flux-1024", bandwidth=moved / 0.2, images_per_day=36, **rates)
    pushes = 9 * 2 * 4096 * 3072 * 2 / (moved / 0.2)  # each reads and writes one feature
    assert found.predicted_seconds == pytest.approx(0.2)
    assert found.seconds == pytest.approx(10 + pushes)
    assert found.gpu_hours == pytest.approx((10 + pushes) / 100)
    assert found.full_gpu_hours == pytest.approx(0.1)


def test_without_images_there_are_no_hours_and_without_a_price_no_money():
    plain = lesa.estimate("flux-1024", price=2.0)
    assert (plain.gpu_hours, plain.full_gpu_hours, plain.saved) == (None, None, None)
    assert "a day" not in plain.table()
    found = lesa.estimate("flux-1024", step_seconds=0.2, images_per_day=3600, **FREE)
    assert found.saved is None and found.gpu_hours == pytest.approx(1.8)
    assert "Saved a day, at 3600 images: 8.2 GPU-hours." in found.table()
    assert "cost" not in found.table() and "money" not in found.table()


def test_what_a_second_stream_and_a_larger_batch_multiply():
    sizes = ({"streams": 1}, {"streams": 2}, {"streams": 1, "batch": 2})
    one, streams, batch = (lesa.estimate("sd3-1024", **size) for size in sizes)
    for more in (streams, batch):
        assert more.step_flops == 2 * one.step_flops
        assert more.computed_seconds == pytest.approx(2 * one.computed_seconds)
        assert more.ring_bytes == 2 * one.ring_bytes
        assert more.predictor_bytes == one.predictor_bytes
        assert more.image_tokens == one.image_tokens
        assert 1.9 < more.predicted_seconds / one.predicted_seconds <= 2  # samples share the weights
        assert 1.9 < more.seconds / one.seconds <= 2
    assert streams.predicted_seconds == 2 * one.predicted_seconds
    measured = [lesa.estimate("sd3-1024", step_seconds=0.3, streams=streams) for streams in (1, 2)]
    assert [found.computed_seconds for found in measured] == [0.3, 0.3]  # a measured step is one of all streams


def test_a_predicted_step_may_be_bound_by_its_flops():
    rates = {"bandwidth": 1e30, "flops_rate": 2e12, "efficiency": 0.5}
    found = lesa.estimate("flux-1024", **rates)
    least = work.predict_velocity(1, 4096, 3072, torch.bfloat16, 64, 4, 32)
    assert found.predicted_seconds == pytest.approx(least["flops"] / 1e12, rel=0.01)
    assert found.full_flops == 50 * found.step_flops
    assert found.flops - 9 * found.step_flops == pytest.approx(41 * least["flops"], rel=0.01)


def test_a_model_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PRESETS["flux-1024"][0]))
    asked = []

    def cached(model, name):
        asked.append((model, name))
        return str(file) if name == "transformer/config.json" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert lesa.estimate("some/flux").step_flops == lesa.estimate("flux-1024").step_flops
    assert asked == [("some/flux", "transformer/config.json"), ("some/flux", "vae/config.json")]


def test_the_command_prints_a_table_or_json(capsys, tmp_path):
    cli.main(["estimate", "--model", "flux-1024", "--device", "H200", "--images-per-day", "1000", "--price", "2"])
    out = capsys.readouterr().out
    assert out == lesa.estimate("flux-1024", device="H200", images_per_day=1000, price=2).table() + "\n"
    FusedKANPredictor(PredictorConfig(3072, rank=0)).save_pretrained(tmp_path)
    options = "--schedule 7 --steps 40 --bandwidth 500 --tflops 100 --batch-size 3 --height 512 --json"
    cli.main(["estimate", "--model", "flux-1024", "--predictor", str(tmp_path), *options.split()])
    found = json.loads(capsys.readouterr().out)
    steps, rates = {"schedule": 7, "num_inference_steps": 40}, {"bandwidth": 500e9, "flops_rate": 100e12}
    expected = lesa.estimate("flux-1024", 512, **steps, **rates, batch=3, predictor=PredictorConfig(3072, rank=0))
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert found["computed"] == [0, 1, 2, 9, 16, 23, 30, 37]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "nowhere"}, "`model` must be a folder with transformer/config.json, or a hub id"),
        ({"device": "TPU"}, "`device` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"efficiency": 0}, "`efficiency` must be above 0"),
        ({"efficiency": 2}, "`efficiency` must be a finite number"),
        ({"bandwidth": -1}, "`bandwidth` must be a finite number of at least 0"),
        ({"height": 8}, "`height and width` must be at least 16"),
        ({"predictor": "nowhere"}, "`predictor` must hold a config.json"),
        ({"predictor": PredictorConfig(64)}, "`predictor.config.feature_dim` must be the model's, 3072"),
        ({"predictor": PredictorConfig(3072, family="sd3")}, "`predictor.config.family` must be the model's, 'flux'"),
        ({"schedule": [1, 2]}, "`steps` must be rising step indices that start with 0"),
        ({"images_per_day": 0}, "`images_per_day` must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        lesa.estimate(**{"model": "flux-1024", **arguments})
    assert message in str(error.value)


def test_a_transformer_of_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="`config._class_name` must be of a transformer of a supported family"):
        lesa.estimate(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="`model` must have a readable"):
        lesa.estimate(tmp_path)


def test_a_schedule_for_other_steps_must_be_given():
    known = {"num_inference_steps": 50, "schedule": (0, 2, 9), "schedule_sigmas": (1.0, 0.9, 0.5)}
    predictor = PredictorConfig(3072, **known)
    assert lesa.estimate("flux-1024", predictor=predictor).computed == (0, 2, 9)
    with pytest.raises(ValueError, match="`schedule` must be given for 30 steps"):
        lesa.estimate("flux-1024", predictor=predictor, num_inference_steps=30)
