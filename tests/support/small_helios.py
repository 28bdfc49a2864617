"""Small pipelines of Helios, with one chunk or two, and with a pyramid of sizes."""

import diffusers

from small_pipelines import DIM, Small
from small_wan import HEIGHT, WIDTH, model_options, one_image, video, wan_case

STAGES = 3
"""Of a pyramid."""
CHUNK, CHUNK_FRAMES = 2, 5
"""Latent frames and frames of a chunk."""


def transformer(**options):
    return diffusers.HeliosTransformer3DModel(**model_options(rope_dim=(4, 6, DIM // 2 - 10), **options))


class SmallPyramid(Small):
    """A case whose pipeline takes the steps of each stage."""

    def inputs(self, batch: int = 1, **changed) -> dict:
        steps = changed.pop("num_inference_steps", None)
        more = {} if steps is None else {"pyramid_num_inference_steps_list": [steps] * STAGES}
        return super().inputs(batch, **changed, **more)


def _case(pipeline, named=None, *, chunks=1, stages=1, size=1, options=None, **rest):
    return wan_case(
        pipeline,
        named,
        make=transformer,
        size={"height": size * HEIGHT, "width": size * WIDTH, "num_frames": chunks * CHUNK_FRAMES},
        parts=lambda: {"scheduler": diffusers.HeliosScheduler(stages=stages, shift=3.0, gamma=0.3)},
        options={"num_latent_frames_per_chunk": CHUNK, "history_sizes": [4, 2, 1], **(options or {})},
        most=1,
        runs=chunks * stages,
        **rest,
    )


CASES = {
    "helios": _case("HeliosPipeline"),
    "helios cfg": _case("HeliosPipeline", negative=True),
    "helios chunks cfg": _case("HeliosPipeline", negative=True, chunks=2),
    "helios image cfg": _case("HeliosPipeline", {"image": one_image}, negative=True),
    "helios video cfg": _case("HeliosPipeline", {"video": lambda batch: video()}, negative=True),
    "helios pyramid cfg": SmallPyramid(
        **vars(_case("HeliosPyramidPipeline", negative=True, stages=STAGES, size=2 ** (STAGES - 1)))
    ),
}

FAMILY, QUICK, RECORDED = "helios", "helios", "helios cfg"

NOT_DECODED_ALIKE = {
    "helios chunks cfg": "the pipeline decodes each chunk on its own",
    "helios image cfg": "the latents begin with the given image",
    "helios video cfg": "the pipeline puts the given video before what it makes",
}
