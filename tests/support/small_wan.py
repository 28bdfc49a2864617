"""Small pipelines of Wan 2.1 and 2.2: of a single transformer in `CASES`, of two experts in `EXPERTS`."""

from functools import partial

import diffusers

from small_pipelines import DIM, TEXT_DIM, Small, embeddings, image, smooth_in_time

HEIGHT, WIDTH, FRAMES = 16, 32, 5
CHANNELS = 6
SCALE = 4
"""Pixels per latent and side, and frames per latent after the first."""
IMAGE_DIM, IMAGE_TOKENS = 8, 5
_SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


def vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.5, -0.4],
        latents_std=[1.1, 0.9, 1.3, 0.7, 1.0, 1.2],
        scale_factor_temporal=SCALE,
        scale_factor_spatial=SCALE,
    ).eval()


def _options(**options):
    common = {"num_attention_heads": 2, "attention_head_dim": DIM // 2, "out_channels": CHANNELS, "num_layers": 2}
    return {"in_channels": CHANNELS, "text_dim": TEXT_DIM, "ffn_dim": DIM, **common, **options}


def transformer(**options):
    return diffusers.WanTransformer3DModel(**_options(**options))


def vace(**options):
    channels = 2 * CHANNELS + SCALE**2
    return diffusers.WanVACETransformer3DModel(**_options(vace_layers=[0, 1], vace_in_channels=channels, **options))


def animate(**options):
    sizes = {"4": 4, "8": 4, "16": 4}
    made = diffusers.WanAnimateTransformer3DModel(
        **_options(in_channels=2 * CHANNELS + 4, latent_channels=CHANNELS, image_dim=IMAGE_DIM),
        motion_encoder_channel_sizes=sizes,
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        **options,
    )
    return made


def _scheduler():
    """The scheduler of the released models."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def one_image(batch, number=1):
    return image(number, HEIGHT, WIDTH)


def video(number=10, frames=FRAMES):
    return [image(number + i, HEIGHT, WIDTH) for i in range(frames)]


def clip():
    """What embeds an image for the transformers of Wan 2.1."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    size = {"height": 16, "width": 16}
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=IMAGE_DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def _arguments(batch, negative, named):
    made = dict(embeddings(batch, pooled=False))
    made |= embeddings(batch, negative=True, pooled=False) if negative else {}
    return {**made, **{name: make(batch) for name, make in named.items()}}


def _wan(pipeline, named=None, *, negative=False, make=transformer, contexts=True, parts=None, experts=None, **rest):
    """A case; `experts` is the `boundary_ratio` between two transformers."""
    transformer_options = rest.get("transformer_options", {})
    scheduler_options = rest.pop("scheduler_options", None)

    def components():
        made = {"vae": vae(), **(parts() if parts else {})}
        if scheduler_options is None:
            made["scheduler"] = _scheduler()
        if experts is not None:
            made |= {"transformer_2": smooth_in_time(make(**transformer_options)), "boundary_ratio": experts}
        return made

    streams = ("cond", "uncond") if contexts else ("main", "main-2")
    return Small(
        pipeline,
        components,
        make,
        partial(_arguments, negative=negative, named=named or {}),
        rest.pop("size", _SIZE),
        options={"guidance_scale": 3.0 if negative else 1.0, **rest.pop("options", {})},
        scheduler_options=scheduler_options or {},
        streams=streams[: 1 + negative],
        **rest,
    )


_EULER = {"scheduler_options": {"shift": 3.0}}
_EXPAND = {"parts": lambda: {"expand_timesteps": True}}
_FIRST = {"image": one_image}
_OF_IMAGE = {"transformer_options": {"in_channels": 2 * CHANNELS + SCALE}}
_WITH_CLIP = {
    "in_channels": 2 * CHANNELS + SCALE,
    "image_dim": IMAGE_DIM,
    "added_kv_proj_dim": DIM,
}
_VIDEO = {"video": lambda batch: video()}
_VACE = {"make": vace, "most": 1}
_MASK = {"mask": lambda batch: [image(20 + i, HEIGHT, WIDTH).convert("L") for i in range(FRAMES)]}
_POSES = {
    **_FIRST,
    "pose_video": lambda batch: video(30),
    "face_video": lambda batch: video(40),
}
_TWO_SEGMENTS = {**_POSES, "pose_video": lambda batch: video(30, 9), "face_video": lambda batch: video(40, 9)}
_ANIMATE = {
    "make": animate,
    "parts": clip,
    "size": {"height": HEIGHT, "width": WIDTH},
    "options": {"segment_frame_length": FRAMES},
    "most": 1,
}

CASES = {
    "wan": _wan("WanPipeline"),
    "wan cfg": _wan("WanPipeline", negative=True),
    "wan euler cfg": _wan("WanPipeline", negative=True, **_EULER),
    "wan tokens cfg": _wan("WanPipeline", negative=True, **_EXPAND),
    "wan image": _wan("WanImageToVideoPipeline", _FIRST, **_OF_IMAGE),
    "wan image clip cfg": _wan(
        "WanImageToVideoPipeline", _FIRST, negative=True, parts=clip, transformer_options=_WITH_CLIP
    ),
    "wan image last cfg": _wan(
        "WanImageToVideoPipeline",
        {**_FIRST, "last_image": partial(one_image, number=5)},
        negative=True,
        parts=clip,
        transformer_options={**_WITH_CLIP, "pos_embed_seq_len": 2 * IMAGE_TOKENS},
        most=1,
    ),
    "wan image tokens cfg": _wan("WanImageToVideoPipeline", _FIRST, negative=True, **_EXPAND),
    "wan video cfg": _wan(
        "WanVideoToVideoPipeline",
        _VIDEO,
        negative=True,
        contexts=False,
        size={"height": HEIGHT, "width": WIDTH},
        strength=0.75,
        most=1,
    ),
    "wan vace cfg": _wan("WanVACEPipeline", {**_VIDEO, **_MASK}, negative=True, **_VACE),
    "wan vace reference": _wan("WanVACEPipeline", {"reference_images": one_image}, **_VACE),
    "wan animate cfg": _wan("WanAnimatePipeline", _POSES, negative=True, **_ANIMATE),
    "wan animate segments": _wan("WanAnimatePipeline", _TWO_SEGMENTS, runs=2, **_ANIMATE),
    "wan lucy cfg": _wan(
        "LucyEditPipeline",
        _VIDEO,
        negative=True,
        transformer_options={"in_channels": 2 * CHANNELS},
        most=1,
    ),
}

EXPERTS = {
    "wan 2.2": _wan("WanPipeline", experts=0.8),
    "wan 2.2 cfg": _wan("WanPipeline", negative=True, experts=0.8, options={"guidance_scale_2": 2.0}),
    "wan 2.2 image cfg": _wan("WanImageToVideoPipeline", _FIRST, negative=True, experts=0.8, **_OF_IMAGE),
    "wan 2.2 vace cfg": _wan("WanVACEPipeline", {**_VIDEO, **_MASK}, negative=True, experts=0.8, **_VACE),
    "wan 2.2 lucy cfg": _wan(
        "LucyEditPipeline",
        _VIDEO,
        negative=True,
        experts=0.8,
        transformer_options={"in_channels": 2 * CHANNELS},
        most=1,
    ),
}
