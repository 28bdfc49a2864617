"""Small pipelines of ChronoEdit."""

import diffusers

from small_wan import CLIP_OPTIONS, FIRST, clip, model_options, wan_case


def transformer(**options):
    return diffusers.ChronoEditTransformer3DModel(**model_options(**options))


def _case(negative):
    return wan_case(
        "ChronoEditPipeline",
        FIRST,
        negative=negative,
        make=transformer,
        contexts=False,
        parts=clip,
        transformer_options=CLIP_OPTIONS,
    )


CASES = {"chronoedit": _case(False), "chronoedit cfg": _case(True)}

FAMILY, QUICK, RECORDED = "chronoedit", "chronoedit", "chronoedit cfg"
