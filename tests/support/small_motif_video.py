"""Small Motif-Video pipelines."""

from functools import partial

import diffusers

from small_hunyuan_video15 import guider
from small_pipelines import DIM, TEXT_DIM, Small, _image_arguments, embeddings
from small_wan import CHANNELS, FRAMES, HEIGHT, WIDTH, one_image, vae


def transformer(**options):
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        num_layers=2,
        num_single_layers=2,
        text_embed_dim=TEXT_DIM,
        rope_axes_dim=(4, 6, 6),
        **options,
    )


def _small(pipeline, negative, named=None, **rest):
    embed = partial(embeddings, pooled=False, mask="prompt_attention_mask")
    return Small(
        pipeline,
        lambda: {"vae": vae(), "guider": guider(3.0 if negative else 1.0)},
        transformer,
        partial(_image_arguments, named=named or {}, embed=embed, negative=negative),
        {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES},
        scheduler_options={"use_dynamic_shifting": True},
        streams=("pred_cond", "pred_uncond")[: 1 + negative],
        **rest,
    )


_FIRST = {"image": one_image, "prompt": lambda batch: None}
_DECODER = {
    "num_decoder_layers": 1,
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}

CASES = {
    "motif": _small("MotifVideoPipeline", False),
    "motif cfg": _small("MotifVideoPipeline", True, transformer_options=_DECODER),
    "motif image cfg": _small("MotifVideoImage2VideoPipeline", True, _FIRST),
}

FAMILY, QUICK, RECORDED = "motif-video", "motif", "motif cfg"
