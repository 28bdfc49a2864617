"""Costs that torch counts on a transformer without values, held to formulas by hand and to real runs."""

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lesa
import more_pipelines as small
import small_helios
from lesa.models import ADAPTERS, adapter_for
from lesa.models.cosmos import CosmosCosts
from lesa.models.costs import CountedCosts, _FewValues, near_square, valueless
from lesa.models.flux import FluxCosts
from lesa.models.helios import HeliosCosts
from lesa.models.hunyuan_video import HunyuanVideoCosts
from lesa.models.ltx2 import LTX2Costs
from lesa.models.qwen_image import QwenImageCosts
from lesa.models.skyreels_v2 import SkyReelsV2Costs
from lesa.models.z_image import ZImageCosts


class CountedFlux(CountedCosts):
    usual_config = FluxCosts.usual_config
    packing = 2

    def call(self, image_tokens, text_tokens):
        c = self.config
        arguments = {
            "hidden_states": valueless(1, image_tokens, c["in_channels"]),
            "encoder_hidden_states": valueless(1, text_tokens, c["joint_attention_dim"]),
            "pooled_projections": valueless(1, c["pooled_projection_dim"]),
            "timestep": valueless(1),
            "img_ids": valueless(image_tokens, 3),
            "txt_ids": valueless(text_tokens, 3),
        }
        return arguments | ({"guidance": valueless(1)} if c["guidance_embeds"] else {})


class CountedQwenImage(CountedCosts):
    usual_config = QwenImageCosts.usual_config
    packing = 2

    def call(self, image_tokens, text_tokens):
        arguments = {
            "hidden_states": valueless(1, image_tokens, self.config["in_channels"]),
            "encoder_hidden_states": valueless(1, text_tokens, self.config["joint_attention_dim"]),
            "encoder_hidden_states_mask": valueless(1, text_tokens),
            "timestep": valueless(1),
            "img_shapes": [[(1, *near_square(image_tokens))]],
        }
        forward = diffusers.QwenImageTransformer2DModel.forward
        return arguments | ({"txt_seq_lens": [text_tokens]} if "txt_seq_lens" in forward.__code__.co_varnames else {})


class CountedHunyuanVideo(CountedCosts):
    usual_config = HunyuanVideoCosts.usual_config
    layers = HunyuanVideoCosts.layers

    def call(self, image_tokens, text_tokens):
        c = self.config
        side, (rows, columns) = c["patch_size"], near_square(image_tokens)
        return {
            "hidden_states": valueless(1, c["in_channels"], c["patch_size_t"], rows * side, columns * side),
            "encoder_hidden_states": valueless(1, text_tokens, c["text_embed_dim"]),
            "encoder_attention_mask": torch.ones(1, text_tokens),
            "pooled_projections": valueless(1, c["pooled_projection_dim"]),
            "timestep": valueless(1),
            "guidance": valueless(1),
        }


KINDS = {
    "flux": (CountedFlux, FluxCosts, 4096, 512),
    "qwen": (CountedQwenImage, QwenImageCosts, 6889, 128),
    "video": (CountedHunyuanVideo, HunyuanVideoCosts, 118800, 256),
}
SMALL = {"num_layers": 2, "num_single_layers": 1, "num_attention_heads": 3}


@pytest.mark.parametrize("name", KINDS)
def test_small_models_cost_what_the_formulas_say(name):
    counted, by_hand, *_ = KINDS[name]
    small = {key: value for key, value in SMALL.items() if key in by_hand.usual_config}
    found, expected = counted(small), by_hand(small)
    assert (found.dim, found.head_width) == (expected.dim, expected.head_width) == (384, 64)
    assert found.flops(35, 7) == expected.flops(35, 7)
    assert found.flops(70, 7) == expected.flops(70, 7)
    assert found.image_tokens(512, 768, 9, 8, 4) == expected.image_tokens(512, 768, 9, 8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_well_known_models_cost_what_the_formulas_say(name):
    counted, by_hand, image_tokens, text_tokens = KINDS[name]
    assert counted({}).flops(image_tokens, text_tokens) == by_hand({}).flops(image_tokens, text_tokens)


def test_a_configuration_is_counted_once(monkeypatch):
    costs = CountedFlux({**SMALL, "axes_dims_rope": [16, 56, 56], "unknown": 1})
    first = costs.flops(6, 2)
    monkeypatch.setattr(FlopCounterMode, "__enter__", None)
    assert costs.flops(6, 2) == CountedFlux(costs.config).flops(6, 2) == first
    with pytest.raises(ValueError, match="not callable"):
        costs.flops(7, 2)


class Selecting(torch.nn.Module):
    """Selects tokens by a mask, asks a number of a tensor, and makes an attention mask of the selection."""

    def forward(self, tokens, mask, flag):
        kept = tokens[:, mask]
        if (flag == 0).all():
            kept = torch.cat([kept, tokens[:, ~mask]], dim=1)
        pairs = mask.view(1, -1).repeat(4096, 1)  # large
        shown = torch.nn.functional.pad(pairs[: kept.shape[1], : kept.shape[1]], (0, 0))
        return torch.nn.functional.scaled_dot_product_attention(kept, kept, kept, attn_mask=shown)


@pytest.mark.parametrize("flag", [0, 1])
def test_masks_and_flags_with_values_decide_the_course(flag):
    model, mask = Selecting(), torch.arange(500) % 5 > 1
    inputs = {"mask": mask, "flag": torch.full((3,), flag)}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as real:
            model(torch.randn(1, 500, 8), **inputs)
        with _FewValues(), FlopCounterMode(display=False) as counted:
            result = model(valueless(1, 500, 8), **inputs)
    tokens = 500 if flag == 0 else 300
    assert result.shape == (1, tokens, 8) and result.is_meta
    assert counted.get_total_flops() == real.get_total_flops() == 4 * tokens**2 * 8


def test_near_square_grids():
    assert [near_square(n) for n in (1, 12, 13, 4096, 6889)] == [(1, 1), (3, 4), (1, 13), (64, 64), (83, 83)]


class CountedHunyuanVideoOfOddSize(CountedHunyuanVideo):
    def call(self, image_tokens, text_tokens):
        arguments = super().call(image_tokens, text_tokens)
        return {**arguments, "pooled_projections": valueless(1, 1)}


def test_a_call_that_the_transformer_refuses_is_named():
    message = "The FLOPs of a HunyuanVideoTransformer3DModel can't be counted with 6 image tokens and 2 text tokens: "
    with pytest.raises(ValueError, match=message):
        CountedHunyuanVideoOfOddSize(SMALL).flops(6, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "NoTransformer3000"}, "has no NoTransformer3000. Install a newer version of diffusers."),
        ({"num_layers": 10**6}, "`model` must have at most 1000 as num_layers in its configuration"),
        ({"num_layers": "many"}, "`model` must have a configuration with which a FluxTransformer2DModel can be built"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_built_are_refused(config, message):
    with pytest.raises(ValueError, match="diffusers|`model`") as error:
        CountedFlux(config)
    assert message in str(error.value)


SPECIAL = {
    "skyreels with a frame rate": (SkyReelsV2Costs, {"inject_sample_info": True}),
    "ltx-2 of any version": (LTX2Costs, {}),
    "ltx-2.3": (LTX2Costs, {"use_prompt_embeddings": False, "cross_attn_mod": True, "audio_cross_attn_mod": True}),
    "cosmos with images": (CosmosCosts, {"img_context_dim_in": 24, "img_context_num_tokens": 3}),
    "z-image with other patches": (ZImageCosts, {"all_patch_size": (4,), "n_layers": 1, "n_refiner_layers": 1}),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_less_usual_configurations_can_be_counted(name):
    costs, config = SPECIAL[name]
    costs = costs({"num_layers": 1, **config})
    assert 0 < costs.flops(64, 32) < costs.flops(64, 64)


def test_z_image_has_patches_of_the_size_in_its_configuration():
    costs = ZImageCosts(SPECIAL["z-image with other patches"][1])
    assert costs.image_tokens(256, 256, 1, 8, 4) == 64 and costs.head_width == 16 * 4**2


def test_older_transformers_need_no_argument_of_newer_ones():
    assert "sigma" not in LTX2Costs({"num_layers": 1}).call(64, 8)


class UnknownConfiguration(CountedFlux):
    def call(self, image_tokens, text_tokens):
        return {**super().call(image_tokens, text_tokens), "img_ids": None}


def test_a_configuration_that_cannot_be_counted_is_not_taken_for_a_size():
    with pytest.raises(ValueError, match="can't be counted with 6 .* If it takes this one, lesa can't estimate this"):
        UnknownConfiguration(SMALL).flops(6, 2)


class Seen(Exception):
    """Ends a pipeline at the first call of its transformer."""


def first_call(case):
    """The pipeline, and the arguments of the first call of its transformer."""
    pipe, calls = case.build(), []

    def see(module, args, kwargs):
        calls.append((args, kwargs))
        raise Seen

    with pipe.transformer.register_forward_pre_hook(see, with_kwargs=True), pytest.raises(Seen):
        case.latents(pipe, steps=3)
    return pipe, *calls[0]


OTHER_TOKENS = {
    "hunyuan-video-1.5": {"glyph_tokens": 3, "given_tokens": 4},
    "hunyuan-image": {"glyph_tokens": 3},
}
"""How many tokens the small pipelines have where the well-known models have a fixed number."""

TOLD_APART = {
    "chronoedit": "the small transformer gets no embeddings of an image",
    "helios": "its pipeline passes the frames before a chunk",
    "ideogram-4": "its text and its image are one sequence",
    "ltx-2": "the number of tokens of the sound follows from the video's length",
    "qwen-image-2.1": "its text and its images are one sequence",
}
"""Families whose small pipelines call the transformer in another way than `call` tells, and why."""

COUNTED = {adapter.family for adapter in ADAPTERS if issubclass(adapter.costs, CountedCosts)}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(COUNTED & small.RECORDED.keys() - TOLD_APART.keys()))
@torch.no_grad()
def test_a_call_of_each_family_costs_what_torch_counts(family, tmp_path):
    case = small.ALL[small.RECORDED[family]]
    pipe, args, kwargs = first_call(case)
    # A small pipeline may have made a part narrower than its class does.
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    adapter = adapter_for(pipe)
    config = {**pipe.transformer.config, "_class_name": type(pipe.transformer).__name__}
    costs = type("SmallCosts", (adapter.costs,), OTHER_TOKENS.get(family, {}))(config)
    call = adapter.bind(args, kwargs)
    batch, tokens = adapter.shape(call)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipe.transformer(*args, **kwargs)
    assert (costs.dim, costs.head_width) == (adapter.feature_dim, adapter.projection.out_features)
    assert batch * costs.flops(tokens, adapter.text(call).shape[1]) == counter.get_total_flops()
    pipe.transformer.save_config(tmp_path / "transformer")
    found = lesa.estimate(tmp_path, num_inference_steps=20, schedule=4, height=128, width=128)
    assert found.step_flops > 0 and found.computed_steps == 7 and found.ring_bytes > 0


@torch.no_grad()
def test_helios_costs_a_wan_transformer_and_a_second_timestep():
    transformer = small_helios.CASES["helios cfg"].build().transformer
    config = {**transformer.config, "_class_name": type(transformer).__name__}
    latents, text = (
        torch.randn(1, transformer.config.in_channels, 2, 4, 8),
        torch.randn(1, 5, transformer.config.text_dim),
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(hidden_states=latents, timestep=torch.ones(1), encoder_hidden_states=text)
    assert HeliosCosts(config).flops(16, 5) == counter.get_total_flops()
