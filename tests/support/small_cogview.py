"""Small CogView 4 and CogView 3 Plus pipelines of random weights."""

from functools import partial

import diffusers

from small_pipelines import DIM, LATENT_CHANNELS, TEXT_DIM, Small, _image_arguments, embeddings, image, image_vae

HEIGHT, WIDTH = 16, 32

_SMALL = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": DIM // 2,
    "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 12,
    "condition_dim": 4,
}


def cogview4_transformer(**options):
    return diffusers.CogView4Transformer2DModel(**{**_SMALL, "rope_axes_dim": (8, 8), **options})


def cogview3plus_transformer(**options):
    return diffusers.CogView3PlusTransformer2DModel(**{**_SMALL, "pos_embed_max_size": 16, **options})


def _cogview(pipeline, named=None, *, negative=False, parts=dict, **rest):
    return Small(
        pipeline,
        lambda: {"vae": image_vae(), **parts()},
        rest.pop("transformer", cogview4_transformer),
        partial(_image_arguments, named=named or {}, embed=partial(embeddings, pooled=False), negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        options={"guidance_scale": 3.0 if negative else 1.0},
        **rest,
    )


def _control(batch):
    return image(5, HEIGHT, WIDTH)


def _solver(scheduler):
    return {
        "transformer": cogview3plus_transformer,
        "parts": lambda: {"scheduler": getattr(diffusers, scheduler)()},
    }


_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75}
_DOUBLE = {"in_channels": 2 * LATENT_CHANNELS}

CASES = {
    "cogview4": _cogview("CogView4Pipeline", streams=("cond",), scheduler_options=_SHIFT),
    "cogview4 cfg": _cogview("CogView4Pipeline", negative=True, streams=("cond", "uncond"), scheduler_options=_SHIFT),
    "cogview4 control cfg": _cogview(
        "CogView4ControlPipeline",
        {"control_image": _control},
        negative=True,
        streams=("main", "main-2"),
        scheduler_options=_SHIFT,
        transformer_options=_DOUBLE,
    ),
}

CASES_OF_3_PLUS = {
    "cogview3plus": _cogview("CogView3PlusPipeline", **_solver("CogVideoXDDIMScheduler")),
    "cogview3plus cfg": _cogview("CogView3PlusPipeline", negative=True, **_solver("CogVideoXDDIMScheduler")),
}

FAMILY, QUICK, RECORDED = "cogview4", "cogview4", "cogview4 cfg"
