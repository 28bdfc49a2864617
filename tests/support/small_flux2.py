"""Small FLUX.2 pipelines."""

from functools import partial

import diffusers

from small_pipelines import (
    DIM,
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_DIM,
    WIDTH,
    Small,
    _image_arguments,
    embeddings,
    image,
    mask_image,
)


def vae():
    made = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
    )
    made.bn.running_mean.normal_(std=0.3)
    made.bn.running_var.uniform_(0.5, 1.5)
    return made.eval()


def transformer(**options):
    return diffusers.Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 4, 4, 4),
        **options,
    )


def _small(pipeline, named=None, *, negative=False, klein=True, streams=None, **rest):
    return Small(
        pipeline,
        lambda: {"vae": vae()},
        partial(transformer, guidance_embeds=not klein),
        partial(_image_arguments, named=named or {}, embed=partial(embeddings, pooled=False), negative=negative),
        {"height": HEIGHT, "width": WIDTH},
        scheduler_options={"use_dynamic_shifting": True},
        streams=streams or ("cond", "uncond")[: 1 + negative],
        **rest,
    )


def _references(count):
    """The pipelines take no smaller images, and give all of them to each sample."""
    return {"image": lambda batch: [image(7 + number, 64, 64) for number in range(count)]}


_PAINTED = {"image": lambda batch: [image(1 + i) for i in range(batch)], "mask_image": lambda batch: mask_image()}
_ANOTHER = {"image_reference": lambda batch: image(9)}
_GUIDED = {"guidance_scale": 3.0}
_NOT_GUIDED = {"guidance_scale": 1.0}

CASES = {
    "flux2": _small("Flux2Pipeline", klein=False, streams=("main",)),
    "flux2 references": _small("Flux2Pipeline", _references(2), klein=False, streams=("main",)),
    "flux2 klein": _small("Flux2KleinPipeline", options=_NOT_GUIDED),
    "flux2 klein cfg": _small("Flux2KleinPipeline", negative=True, options=_GUIDED),
    "flux2 klein references cfg": _small("Flux2KleinPipeline", _references(1), negative=True, options=_GUIDED),
    "flux2 klein inpaint": _small("Flux2KleinInpaintPipeline", _PAINTED, options=_NOT_GUIDED, strength=0.75),
    "flux2 klein inpaint cfg": _small(
        "Flux2KleinInpaintPipeline", _PAINTED | _ANOTHER, negative=True, options=_GUIDED, strength=0.75
    ),
    "flux2 klein kv": _small("Flux2KleinKVPipeline", streams=("main",)),
    "flux2 klein kv references": _small("Flux2KleinKVPipeline", _references(2), streams=("main",)),
}

FAMILY, QUICK, RECORDED = "flux2", "flux2 klein cfg", "flux2"
