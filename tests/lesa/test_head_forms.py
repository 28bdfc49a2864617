"""The fused output head against the modules of diffusers' models in float64, for every form of head that they have.

Scale and shift are what the modules make of the conditioning. Weights of an affine norm are folded into them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers.models.normalization import AdaLayerNorm, AdaLayerNormContinuous
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowPreFinalBlock
from diffusers.models.transformers.transformer_cogview4 import CogView4AdaLayerNormContinuous
from diffusers.models.transformers.transformer_z_image import FinalLayer
from torch import nn

from lesa.models.final_layer import FinalLayerHead
from lesa.models.heads import folded
from lesa_kernels import OutputHead, output_head
from lesa_kernels.stream import NO_RESIDUAL, LowRank, StoredFeatures, Weights, stream_velocity, stream_velocity_is_fused
from lesa_kernels.stream.reference import stream_forecast_ref

BATCH, TOKENS, DIM, OUTPUTS, CONDITION = 2, 8, 32, 12, 16
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Form:
    """A model's head in float64: what it makes of features `[B, T, D]`, and the same as an `OutputHead`."""

    run: Callable[[torch.Tensor], torch.Tensor]
    head: OutputHead


def ready(module: nn.Module) -> nn.Module:
    """A module in float64 with random parameters, of which bfloat16 loses no digit."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        width = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.data = (torch.randn(parameter.shape, generator=generator) / width**0.5).bfloat16().double()
    return module.double().eval().requires_grad_(False)


def normal(*sizes: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adaptive(kind: type[nn.Module] = AdaLayerNormContinuous, **options) -> Form:
    """A norm that is conditioned by an embedding, and a projection: most families."""
    norm_type = options.get("norm_type", "layer_norm")
    norm, projection = ready(kind(DIM, CONDITION, eps=1e-5, **options)), ready(nn.Linear(DIM, OUTPUTS))
    conditioning = normal(BATCH, CONDITION)
    active = nn.functional.silu(conditioning) if kind is AdaLayerNormContinuous else conditioning
    scale, shift = folded(norm.norm, *norm.linear(active).chunk(2, 1))
    head = OutputHead(projection.weight, projection.bias, scale, shift, 1e-5, norm_type.removesuffix("_norm"))
    return Form(lambda features: projection(norm(features, conditioning)), head)


def cogvideox() -> Form:
    """A layer norm with weights, and then an adaptive one with weights too. The features are those between the two."""
    norm = AdaLayerNorm(CONDITION, output_dim=2 * DIM, norm_elementwise_affine=True, norm_eps=1e-5, chunk_dim=1)
    norm, projection, conditioning = ready(norm), ready(nn.Linear(DIM, OUTPUTS)), normal(BATCH, CONDITION)
    shift, scale = norm.linear(nn.functional.silu(conditioning)).chunk(2, 1)
    head = OutputHead(projection.weight, projection.bias, *folded(norm.norm, scale, shift), 1e-5)
    return Form(lambda features: projection(norm(features, temb=conditioning)), head)


def z_image(per_token: bool) -> Form:
    """A scale alone; for an edit, one for the tokens with noise and one for those without."""
    layer, conditioning = ready(FinalLayer(DIM, OUTPUTS)), normal(2, BATCH, DIM)
    noisy, clean = layer.adaLN_modulation(conditioning)
    weight, bias = layer.linear.weight, layer.linear.bias
    if not per_token:
        return Form(lambda features: layer(features, c=conditioning[0]), OutputHead(weight, bias, noisy, None))
    mask = (torch.arange(TOKENS) % 3 == 0).long().expand(BATCH, TOKENS)
    scale = torch.where(mask[..., None] == 1, noisy[:, None], clean[:, None])
    both = dict(noise_mask=mask, c_noisy=conditioning[0], c_clean=conditioning[1])
    return Form(lambda features: layer(features, **both), OutputHead(weight, bias, scale, None))


def auraflow() -> Form:
    """No norm, and a projection without bias."""
    block, projection = ready(AuraFlowPreFinalBlock(DIM, DIM)), ready(nn.Linear(DIM, OUTPUTS, bias=False))
    conditioning = normal(BATCH, DIM)
    scale, shift = block.linear(nn.functional.silu(conditioning)).chunk(2, 1)
    head = OutputHead(projection.weight, None, scale, shift, norm=None)
    return Form(lambda features: projection(block(features, conditioning)), head)


def through(model: nn.Module, arguments: dict, embedder: nn.Module) -> tuple[Callable, list]:
    """What a whole model makes of features in the place of its own, and a list that gets what its embedder returned."""
    embedded: list = []

    def run(features):
        found = []
        hooks = [
            model.norm_out.register_forward_pre_hook(lambda module, args: (features,)),
            model.proj_out.register_forward_hook(lambda module, args, output: found.append(output)),
            embedder.register_forward_hook(lambda module, args, output: embedded.append(output)),
        ]
        model(**arguments)
        for hook in hooks:
            hook.remove()
        return found[0]

    return run, embedded


def wan(per_token: bool) -> Form:
    """A table and the embedded timestep, of which each token has its own in Wan 2.2 5B; the norm is in float32."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, text_dim=8, freq_dim=8,
        ffn_dim=8, num_layers=1,
    )  # fmt: skip
    timestep = torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) * 50.0
    text = normal(BATCH, 4, 8)
    arguments = dict(
        hidden_states=normal(BATCH, 3, 2, 4, 4),
        timestep=timestep if per_token else timestep[:, 1],
        encoder_hidden_states=text,
    )
    model = ready(model)
    run, embedded = through(model, arguments, model.condition_embedder)
    run(normal(BATCH, TOKENS, DIM))
    shift, scale = (model.scale_shift_table + embedded[0][0].unsqueeze(-2)).unbind(-2)
    return Form(run, OutputHead(model.proj_out.weight, model.proj_out.bias, scale, shift))


def ltx() -> Form:
    """A table and the embedded timestep of each token."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=OUTPUTS, out_channels=OUTPUTS, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=8,
    )  # fmt: skip
    arguments = dict(
        hidden_states=normal(BATCH, TOKENS, OUTPUTS),
        encoder_hidden_states=normal(BATCH, 4, 8),
        timestep=torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) * 50.0,
        encoder_attention_mask=torch.ones(BATCH, 4, dtype=torch.float64),
        num_frames=2,
        height=2,
        width=2,
    )
    model = ready(model)
    run, embedded = through(model, arguments, model.time_embed)
    run(normal(BATCH, TOKENS, DIM))
    shift, scale = (model.scale_shift_table + embedded[0][1].view(BATCH, TOKENS, 1, DIM)).unbind(-2)
    return Form(run, OutputHead(model.proj_out.weight, model.proj_out.bias, scale, shift))


FORMS = {
    "layer": lambda: adaptive(elementwise_affine=False),
    "affine layer": lambda: adaptive(elementwise_affine=True),
    "rms": lambda: adaptive(elementwise_affine=False, norm_type="rms_norm"),
    "affine rms": lambda: adaptive(elementwise_affine=True, norm_type="rms_norm"),
    "cogview4": lambda: adaptive(CogView4AdaLayerNormContinuous, elementwise_affine=False),
    "cogvideox": cogvideox,
    "z-image": lambda: z_image(False),
    "z-image edit": lambda: z_image(True),
    "auraflow": auraflow,
    "wan": lambda: wan(False),
    "wan 5b": lambda: wan(True),
    "ltx": ltx,
}
# Their modules compute the norm, or a part of it, in float32.
IN_FLOAT32 = ("rms", "affine rms", "wan", "wan 5b")
each_form = pytest.mark.parametrize("name", FORMS)


def forecast(dtype: torch.dtype, device: torch.device, rank: int) -> tuple[StoredFeatures, Weights, LowRank]:
    """The arguments of a forecast from three features."""
    storage = (normal(3, BATCH, TOKENS, DIM) + 0.5).to(dtype)
    weights = torch.tensor([2.0, -1.5, 0.5]).expand(BATCH, 3)
    state = torch.zeros(BATCH, dtype=torch.int32), torch.full((BATCH,), 3, dtype=torch.int32)
    taps = normal(BATCH, 2, 3).float() if rank else None
    stage = state[0] if rank else None
    maps = (normal(1, rank, 2, DIM) / DIM**0.5, normal(1, DIM, rank) / 4) if rank else ()
    features = StoredFeatures(storage.to(device), None, *(part.to(device) for part in state))
    made = Weights(weights, state[1], None, taps, stage)
    low_rank = LowRank(*(part.to(device, dtype) for part in maps)) if rank else NO_RESIDUAL
    return features, Weights(*(part if part is None else part.to(device) for part in made)), low_rank


def check(name: str, dtype: torch.dtype, backend: str, device: torch.device, rank: int = 0) -> None:
    """At most twice the error of plain torch in the same dtype, but for the result's rounding."""
    form, (features, weights, low_rank) = FORMS[name](), forecast(dtype, device, rank)
    head = form.head
    parts = (None if part is None else part.to(device, dtype) for part in (head.weight, head.bias))
    modulation = (None if part is None else part.to(device, torch.float32) for part in (head.scale, head.shift))
    given = OutputHead(*parts, *modulation, head.eps, head.norm)
    wide = [LowRank(*(None if part is None else part.double().cpu() for part in low_rank))]
    wide = [features._replace(storage=features.storage.double()), weights, *wide]
    wide[:2] = (type(part)(*(None if each is None else each.cpu() for each in part)) for part in wide[:2])
    exact = form.run(stream_forecast_ref(*wide)).to(device)
    if backend == "triton":
        assert stream_velocity_is_fused(features, weights, given, low_rank)
    plain, actual = (stream_velocity(features, weights, given, low_rank, backend=b) for b in ("torch", backend))
    assert actual.dtype == dtype and actual.shape == exact.shape == (BATCH, TOKENS, exact.shape[-1])
    error, plain_error = ((each.double() - exact).abs() for each in (actual, plain))
    assert plain_error.max() < 20 * torch.finfo(dtype).eps * exact.abs().max()
    allowed = 2 * plain_error.max() + torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert (error <= allowed).all(), f"{error.max():.3g} against {plain_error.max():.3g}"


@each_form
def test_an_output_head_is_what_the_models_modules_compute(name):
    form, features = FORMS[name](), normal(BATCH, TOKENS, DIM, seed=3) + 0.5
    tolerance = 3e-6 if name in IN_FLOAT32 else 1e-12
    torch.testing.assert_close(output_head(features, form.head), form.run(features), rtol=tolerance, atol=tolerance)


@each_form
def test_the_extension_is_as_near_to_the_models_modules_as_torch(name):
    for rank in (0, 3):
        check(name, torch.float32, "extension", torch.device("cpu"), rank)


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_is_as_near_to_the_models_modules_as_torch(name, dtype, kernel_device):
    pytest.importorskip("triton")
    check(name, dtype, "triton", kernel_device)
    if FORMS[name]().head.scale.ndim == 2:  # with a residual, a modulation for each token is not fused
        check(name, dtype, "triton", kernel_device, rank=3)


@pytest.mark.parametrize("affine", [False, True])
def test_a_final_layer_is_folded_with_the_weights_of_its_norm(affine):
    transformer = nn.Module()
    transformer.last = FinalLayer(DIM, OUTPUTS)
    transformer.last.norm_final = nn.LayerNorm(DIM, eps=1e-5, elementwise_affine=affine)
    ready(transformer)
    form = FinalLayerHead(transformer, "last", "any")
    features, conditioning = normal(BATCH, TOKENS, DIM, seed=4), normal(BATCH, DIM)
    found, own = output_head(features, form.output_head(conditioning)), form.run(features, conditioning)
    torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 0.03])
@pytest.mark.parametrize("has_bias", [False, True])
def test_folded_weights_of_a_norm_in_bfloat16_are_as_near_as_torch(size, has_bias):
    """Of small weights too, which a narrow dtype rounds to few digits beside the 1 that `scale` is added to."""
    norm = ready(nn.LayerNorm(DIM, eps=1e-5, bias=has_bias))
    norm.weight.mul_(size)
    norm, projection = norm.bfloat16(), ready(nn.Linear(DIM, OUTPUTS, bias=False)).bfloat16()
    features, scale = (normal(BATCH, *sizes).bfloat16() for sizes in ((64, DIM), (DIM,)))
    shift = (normal(BATCH, DIM, seed=3) * size).bfloat16()

    def plain(dtype):
        norm_there, projection_there = (copy.deepcopy(module).to(dtype) for module in (norm, projection))
        modulated = norm_there(features.to(dtype)) * (1 + scale[:, None].to(dtype)) + shift[:, None].to(dtype)
        return projection_there(modulated).double()

    made = folded(norm, scale, shift)
    exact, head = plain(torch.float64), OutputHead(projection.weight, None, *made, 1e-5)
    error, of_torch = ((each - exact).norm() for each in (output_head(features, head).double(), plain(torch.bfloat16)))
    assert error <= 2 * of_torch
