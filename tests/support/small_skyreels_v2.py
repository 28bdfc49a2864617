"""Small pipelines of SkyReels-V2, with and without diffusion forcing."""

import diffusers

from small_wan import (
    CLIP_OPTIONS,
    FIRST,
    HEIGHT,
    LAST,
    LAST_OPTIONS,
    WIDTH,
    clip,
    model_options,
    video,
    wan_case,
)

FORCED_FRAMES = 9


def transformer(**options):
    return diffusers.SkyReelsV2Transformer3DModel(**model_options(**options))


def _case(pipeline, named=None, **rest):
    return wan_case(pipeline, named, make=transformer, **rest)


_LONG = {"height": HEIGHT, "width": WIDTH, "num_frames": FORCED_FRAMES, "base_num_frames": FORCED_FRAMES}
_FORCED = {"size": _LONG, "most": 1, "transformer_options": {"inject_sample_info": True}}
_CONTINUED = {
    "size": {**_LONG, "num_frames": 17},
    "options": {"overlap_history": 5},
    "most": 1,
    "runs": 3,
}

CASES = {
    "skyreels": _case("SkyReelsV2Pipeline"),
    "skyreels cfg": _case("SkyReelsV2Pipeline", negative=True),
    "skyreels image cfg": _case(
        "SkyReelsV2ImageToVideoPipeline", FIRST, negative=True, parts=clip, transformer_options=CLIP_OPTIONS
    ),
    "skyreels image last cfg": _case(
        "SkyReelsV2ImageToVideoPipeline",
        {**FIRST, **LAST},
        negative=True,
        parts=clip,
        transformer_options=LAST_OPTIONS,
        most=1,
    ),
    "skyreels forced cfg": _case(
        "SkyReelsV2DiffusionForcingPipeline", {"prompt": lambda batch: None}, negative=True, **_FORCED
    ),
    "skyreels forced image cfg": _case(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline", FIRST, negative=True, **_FORCED
    ),
    "skyreels forced video cfg": _case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline", {"video": lambda batch: video()}, negative=True, **_CONTINUED
    ),
}

FAMILY, QUICK, RECORDED = "skyreels-v2", "skyreels forced image cfg", "skyreels cfg"

NOT_DECODED_ALIKE = {"skyreels forced video cfg": "the pipeline puts the given video before what it makes"}
