"""What `lesa estimate` says, held to what real runs count."""

import inspect
import json

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lesa
import small_pipelines as small
from lesa import cli
from lesa.demo import digits
from lesa.estimation import PRESETS, transformer_flops
from lesa.models import ADAPTERS
from lesa_kernels import FusedKANPredictor, PredictorConfig, work

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


TRANSFORMERS = {
    "flux": lambda: flux(False),
    "guided": lambda: flux(True),
    "qwen": qwen,
    "video": hunyuan,
    "sd3": sd3,
}


def test_none_of_the_first_families_is_left_out():
    kinds = {type(build()[0]).__name__ for build in TRANSFORMERS.values()}
    first = [adapter for adapter in ADAPTERS if adapter.family in small.FAMILIES]
    assert len(first) == len(small.FAMILIES)
    for adapter in first:
        assert not kinds.isdisjoint(adapter.transformer_classes), adapter.family


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(name):
    torch.manual_seed(0)
    transformer, inputs = TRANSFORMERS[name]()
    # Without a backend that fuses it, attention is two products, which the counter knows on every machine.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(**inputs, timestep=torch.ones(1))
    config = {**transformer.config, "_class_name": type(transformer).__name__}
    assert transformer_flops(config, 30, 7) == counter.get_total_flops()


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


def block(rows, dim):
    """Multiplications of a block: four maps, the two products of attention, and two of four times the width."""
    return 12 * rows * dim**2 + 2 * rows**2 * dim


# Multiplications of one call of the transformer for one sample, layer by layer as diffusers has them.
FLUX = (
    4096 * 64 * 3072  # x_embedder
    + 512 * 4096 * 3072  # context_embedder
    + 2 * (256 * 3072 + 3072**2)  # of the timestep and of the guidance
    + (768 * 3072 + 3072**2)  # of the pooled text
    + 19 * (block(4096 + 512, 3072) + 2 * 6 * 3072**2)
    + 38 * (block(4096 + 512, 3072) + 3 * 3072**2)
    + (2 * 3072**2 + 4096 * 3072 * 64)  # norm_out and proj_out
)
QWEN_IMAGE = (
    6889 * 64 * 3072
    + 128 * 3584 * 3072
    + (256 * 3072 + 3072**2)
    + 60 * (block(6889 + 128, 3072) + 2 * 6 * 3072**2)
    + (2 * 3072**2 + 6889 * 3072 * 64)
)
HUNYUAN_VIDEO = (
    20400 * 64 * 3072
    + 256 * 4096 * 3072  # the refiner of the text: its input, its conditioning and two blocks
    + (256 * 3072 + 3072**2 + 4096 * 3072 + 3072**2)
    + 2 * (block(256, 3072) + 2 * 3072**2)
    + 2 * (256 * 3072 + 3072**2)
    + (768 * 3072 + 3072**2)
    + 20 * (block(20400 + 256, 3072) + 2 * 6 * 3072**2)
    + 40 * (block(20400 + 256, 3072) + 3 * 3072**2)
    + (2 * 3072**2 + 20400 * 3072 * 64)
)
SD3 = (
    4096 * 64 * 1536
    + 333 * 4096 * 1536
    + (256 * 1536 + 1536**2)
    + (2048 * 1536 + 1536**2)
    + 24 * (block(4096 + 333, 1536) + 2 * 6 * 1536**2)
    - (333 * 1536**2 + 2 * 333 * 4 * 1536**2 + 4 * 1536**2)  # what the last block does not do to the text
    + (2 * 1536**2 + 4096 * 1536 * 64)
)
BY_HAND = {  # multiplications, calls a step, width, image tokens, text tokens
    "flux-1024": (FLUX, 1, 3072, 4096, 512),
    "qwen-image-1328": (QWEN_IMAGE, 2, 3072, 6889, 128),
    "hunyuan-video-480p": (HUNYUAN_VIDEO, 1, 3072, 20400, 256),
    "sd3-1024": (SD3, 2, 1536, 4096, 333),
}


def ring_by_hand(batch, tokens, dim, anchors=4, element=2):
    """Slots of features and a noise level for each sample, and two integers for each sample."""
    return anchors * batch * (tokens * dim * element + 4) + 2 * 4 * batch


def predictor_by_hand(dim, stages=3):
    """In float32: 64 spline units of 5 inputs with 11 coefficients, 3 taps of them, and a residual of rank 32."""
    units = 64 * 5 + 64 + 64 * 11 + 3 * dim * 64 + 3 * dim
    return 4 * stages * (units + 32 * 3 * dim + 32 * dim + dim)


def predicted_by_hand(batch, tokens, dim, element=2):
    """Bytes and FLOPs of a forecast through a head of 64 outputs: 4 anchors in, one velocity out."""
    parameters = 3 * dim * 65 + 32 * 4 * dim + dim
    features, velocity = 4 * batch * tokens * dim, batch * tokens * 64
    moved = (features + velocity + (64 + 2 * batch) * dim) * element + 4 * parameters
    return moved, 2 * batch * tokens * dim * (4 + 32 * 4 + 64)


def close(value):
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_figure_of_a_preset_by_hand(name):
    products, streams, dim, tokens, text = BY_HAND[name]
    found = lesa.estimate(name, device="A100")
    assert (found.model, found.device, found.dtype) == (name, "A100 80 GB SXM", "bfloat16")
    assert (found.image_tokens, found.text_tokens, found.streams, found.batch) == (tokens, text, streams, 1)
    assert (found.num_inference_steps, found.computed_steps, found.predicted_steps) == (50, 9, 41)
    moved, flops = predicted_by_hand(1, tokens, dim)
    assert found.step_flops == 2 * products * streams
    assert found.full_flops == 50 * found.step_flops
    assert found.flops == 9 * found.step_flops + 41 * streams * flops
    assert found.computed_seconds == close(found.step_flops / (312e12 / 2))
    assert moved / 2.039e12 > flops / (312e12 / 2), "the bytes decide"
    assert found.predicted_seconds == close(streams * moved / 2.039e12)
    assert found.full_seconds == close(50 * found.computed_seconds)
    push = streams * 2 * tokens * dim * 2 / 2.039e12
    assert found.seconds == close(9 * (found.computed_seconds + push) + 41 * found.predicted_seconds)
    assert found.ring_bytes == streams * ring_by_hand(1, tokens, dim)
    assert found.predictor_bytes == predictor_by_hand(dim)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3},
        {"streams": 2},
        {"streams": 2, "batch": 3},
        {"dtype": "float32"},
        {"efficiency": 0.25},
        {"efficiency": 0.001},
        {"step_seconds": 0.2},
        {"step_seconds": 0.2, "streams": 2, "batch": 3, "efficiency": 0.1},
        {"bandwidth": 1e12},
        {"flops_rate": 4e14},
        {"num_inference_steps": 28, "schedule": [0, 3, 9]},
    ],
    ids=str,
)
def test_how_the_figures_follow_the_options(options):
    batch, streams = options.get("batch", 1), options.get("streams", 1)
    element = 4 if options.get("dtype") == "float32" else 2
    total, computed = options.get("num_inference_steps", 50), len(options.get("schedule", range(9)))
    bandwidth, rate = options.get("bandwidth", 3.35e12), options.get("flops_rate", 989e12)
    rate *= options.get("efficiency", 0.5)
    found = lesa.estimate("flux-1024", **options)
    moved, flops = predicted_by_hand(batch, 4096, 3072, element)
    assert (found.batch, found.streams, found.num_inference_steps) == (batch, streams, total)
    assert (found.computed_steps, found.predicted_steps) == (computed, total - computed)
    assert found.step_flops == 2 * FLUX * streams * batch
    assert found.full_flops == total * found.step_flops
    assert found.flops == computed * found.step_flops + (total - computed) * streams * flops
    assert found.computed_seconds == close(options.get("step_seconds", found.step_flops / rate))
    assert found.predicted_seconds == close(streams * max(moved / bandwidth, flops / rate))
    assert (flops / rate > moved / bandwidth) == (rate < 1e14), "with little efficiency the products decide"
    push = streams * 2 * batch * 4096 * 3072 * element / bandwidth
    expected = computed * (found.computed_seconds + push) + (total - computed) * found.predicted_seconds
    assert found.seconds == close(expected)
    assert found.full_seconds == close(total * found.computed_seconds)
    assert found.speedup == close(found.full_seconds / expected)
    assert found.step_speedup == close(total / computed)
    assert found.speedup_ratio == close(found.speedup / found.step_speedup)
    assert found.ring_bytes == streams * ring_by_hand(batch, 4096, 3072, element=element)
    assert found.predictor_bytes == predictor_by_hand(3072)
    assert found.extra_bytes == found.ring_bytes + found.predictor_bytes
    assert (found.device == "H100 SXM") == (not {"bandwidth", "flops_rate"} & {*options})


def test_the_dense_predictor_by_hand():
    """It has 4, 6 or 8 maps by stage, writes its forecast, reads it again for the head, and keeps it."""
    tokens, dim, feature = 4096, 3072, 4096 * 3072 * 2
    found = lesa.estimate("flux-1024", predictor=PredictorConfig(dim, mixer="dense"))
    head = (64 + 2) * dim * 2 + tokens * 64 * 2
    moved = [(maps + 1) * feature + maps * dim**2 * 4 + feature + head + 2 * feature for maps in (4, 6, 8)]
    flops = [2 * tokens * dim * (maps * dim + 64) for maps in (4, 6, 8)]
    assert found.flops == 9 * found.step_flops + 41 * sum(flops) // 3
    assert found.predicted_seconds == close(max(sum(moved) / 3 / 3.35e12, sum(flops) / 3 / (989e12 / 2)))
    assert found.ring_bytes == ring_by_hand(1, tokens, dim, anchors=8)
    units = 256 * (8 + 1 + 11 + 1) + 1  # of 8 inputs, the longest history's, with 11 coefficients and one weight each
    assert found.predictor_bytes == 4 * ((4 + 6 + 8) * dim**2 + 3 * dim + 3 * units)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("flux-1024", {"height": 512}, 32 * 64),
        ("flux-1024", {"width": 512 + 15}, 64 * 32),
        ("qwen-image-1328", {"height": 1024, "width": 768}, 64 * 48),
        ("hunyuan-video-480p", {"frames": 1}, 30 * 40),
        ("hunyuan-video-480p", {"frames": 4}, 30 * 40),
        ("hunyuan-video-480p", {"frames": 5}, 2 * 30 * 40),
        ("hunyuan-video-720p", {}, 33 * 45 * 80),
        ("sd3-1024", {"height": 512, "width": 768}, 32 * 48),
    ],
)
def test_tokens_of_other_sizes(name, size, tokens):
    assert lesa.estimate(name, **size).image_tokens == tokens


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


def test_the_dense_variant_is_bound_by_its_products():
    dense = lesa.estimate("flux-1024", predictor=PredictorConfig(3072, mixer="dense"))
    ours = lesa.estimate("flux-1024")
    assert dense.predicted_seconds > 5 * ours.predicted_seconds
    assert dense.extra_bytes > 5 * ours.extra_bytes
    assert dense.speedup_ratio < ours.speedup_ratio


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


OPEN = PredictorConfig(3072, schedule=(0, 40), schedule_sigmas=(1.0, 0.2))
AT_60 = PredictorConfig(3072, schedule=(0, 40), schedule_sigmas=(1.0, 0.2), num_inference_steps=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "nowhere"}, "`model` must be a folder with transformer/config.json, or a hub id"),
        ({"device": "TPU"}, "`device` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"efficiency": 0}, "`efficiency` must be above 0"),
        ({"efficiency": 2}, "`efficiency` must be a finite number"),
        ({"bandwidth": -1}, "`bandwidth` must be a finite number of at least 0"),
        ({"height": 8}, "`height` and `width` must be at least 16, but got 8 and 1024"),
        ({"predictor": "nowhere"}, "`predictor` must hold a config.json"),
        ({"predictor": PredictorConfig(64)}, "`predictor.config.feature_dim` must be the model's, 3072"),
        ({"predictor": PredictorConfig(3072, family="sd3")}, "`predictor.config.family` must be the model's, 'flux'"),
        ({"schedule": [1, 2]}, "`steps` must be rising step indices that start with 0"),
        ({"schedule": [0, 1, 99]}, "`schedule` must hold steps below 50, the number of steps, but got (0, 1, 99)"),
        ({"schedule": [0, 50]}, "`schedule` must hold steps below 50"),
        ({"schedule": [0, 12], "num_inference_steps": 12}, "`schedule` must hold steps below 12"),
        ({"schedule": range(60)}, "`schedule` must hold steps below 50"),
        ({"schedule": lesa.Schedule((0, 59), 60)}, "`schedule` must hold steps below 50"),
        (
            {"schedule": lesa.Schedule((0, 9), 60, (1.0, 0.5))},
            "`schedule` must be for a run of 50 steps, but got noise levels of a run of 60 steps",
        ),
        ({"schedule": [0, 1, 1]}, "`steps` must be rising step indices"),
        ({"schedule": [0, -1]}, "`steps` must be an integer of at least 0"),
        ({"schedule": []}, "`steps` must be rising step indices"),
        ({"schedule": 0}, "`schedule` must be an integer of at least 1"),
        ({"predictor": AT_60}, "`schedule` is required for 50 steps: the predictor was trained for 60 steps"),
        (
            {"predictor": OPEN, "num_inference_steps": 12},
            "`predictor.config.schedule` must hold steps below 12, the number of steps, but got (0, 40)",
        ),
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
    with pytest.raises(ValueError, match="`schedule` is required for 30 steps"):
        lesa.estimate("flux-1024", predictor=predictor, num_inference_steps=30)
    several = PredictorConfig(3072, **known, more_step_counts=(28,))
    assert lesa.estimate("flux-1024", predictor=several).computed == (0, 2, 9)
    with pytest.raises(ValueError, match="`schedule` is required for 28 steps: .* depend on their noise levels"):
        lesa.estimate("flux-1024", predictor=several, num_inference_steps=28)


@pytest.mark.parametrize(
    ("arguments", "computed"),
    [
        ({"schedule": [0, 49]}, (0, 49)),
        ({"schedule": 99}, (0, 1, 2)),  # as in a run: the interval begins at step 2
        ({"schedule": lesa.Schedule((0, 9), 60)}, (0, 9)),  # as in a run: without noise levels, the numbers are used
        ({"schedule": lesa.Schedule((0, 9), 50, (1.0, 0.5))}, (0, 9)),
        ({"predictor": OPEN}, (0, 40)),
        ({"predictor": OPEN, "num_inference_steps": 9}, tuple(range(9))),  # as in a run: too few to predict any
    ],
)
def test_schedules_that_fit_the_run_are_used(arguments, computed):
    assert lesa.estimate("flux-1024", **arguments).computed == computed
