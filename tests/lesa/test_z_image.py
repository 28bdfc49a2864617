"""Z-Image: what its pipelines have and others do not."""

import pytest
import torch

import lesa
from lesa.models import adapter_for
from lesa_kernels import FusedKANPredictor, PredictorConfig
from small_pipelines import LATENT_CHANNELS, TEXT_DIM, smooth_in_time
from small_z_image import CASES, transformer

STEPS = 12
SOME = [0, 1, 2, 5, 9]


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def test_a_controlnet_runs_in_computed_steps_only():
    case, calls = CASES["z-image controlnet"], []
    pipe = case.build()
    with pipe.controlnet.register_forward_hook(lambda *_: calls.append(1)):
        with lesa.enable_cache(pipe, line(), SOME):
            case.latents(pipe, steps=STEPS)
        assert len(calls) == len(SOME)
        case.latents(pipe, steps=STEPS)
    assert len(calls) == len(SOME) + STEPS and "_compiled_call_impl" not in vars(pipe.controlnet)


@pytest.mark.parametrize("omni", [False, True])
@torch.no_grad()
def test_images_and_captions_of_different_sizes(omni):
    """No pipeline draws images of several sizes in one call, but the transformer does."""
    torch.manual_seed(0)
    model = smooth_in_time(transformer())
    adapter = adapter_for(type("Pipe", (), {"transformer": model})())
    images = [torch.randn(LATENT_CHANNELS, 1, 8, 12), torch.randn(LATENT_CHANNELS, 1, 4, 6)]
    captions = [torch.randn(n, TEXT_DIM) for n in (40, 5)]
    call = {"x": images, "cap_feats": captions, "t": torch.tensor([0.2, 0.4]), "return_dict": False}
    if omni:
        given = torch.randn(LATENT_CHANNELS, 1, 16, 10)
        call["x"] = [[images[0]], [given, images[1]]]
        call["cap_feats"] = [[captions[0]], [captions[1], captions[0], captions[1]]]
        call |= {"siglip_feats": [None, None], "image_noise_mask": [[1], [0, 1]]}
    entered = []
    hook = adapter.head_entry.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0]), with_kwargs=True
    )
    with hook:
        wanted = model(**call)
    bound = adapter.bind((), call)
    features = adapter.features(bound, entered[0])
    assert adapter.shape(bound) == features.shape[:2] == (2, 24)
    ours = adapter.output(bound, adapter.run_head(features, adapter.conditioning(bound, torch.float32), bound))
    assert type(ours) is tuple and len(ours[0]) == 2
    for one, other in zip(ours[0], wanted[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_latents_lie_as_the_projected_tokens_do():
    adapter = adapter_for(CASES["z-image"].build())
    images = [torch.randn(LATENT_CHANNELS, 2, 4, 6) for _ in range(2)]
    call = adapter.bind((), {"x": images, "cap_feats": [torch.randn(5, TEXT_DIM)] * 2, "t": torch.ones(2)})
    back = adapter.output(call, adapter.latents(call)).sample
    assert all(torch.equal(one, other) for one, other in zip(back, images, strict=True))


@pytest.mark.parametrize("name", ["z-image cfg", "z-image omni edit cfg"])
def test_guidance_that_ends_early(name):
    """Without guidance, a call has half the samples. The first such step is computed in addition."""
    case = CASES[name]
    pipe = case.build()
    options = {"cfg_truncation": 0.5}  # 1 - sigma is above it from step 7 on
    wanted = case.latents(pipe, steps=STEPS, **options)
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="the shape changed"):
        cached = case.latents(pipe, steps=STEPS, **options)
    (stream,) = handle.stats.streams.values()
    assert stream.predicted == [3, 4, 6, 8, 10, 11] and stream.computed == [0, 1, 2, 5, 7, 9]
    assert stream.reasons[7] == "the shape changed" and stream.reasons[9] == "scheduled"
    assert 0 < (cached - wanted).norm() < 0.05 * wanted.norm()
