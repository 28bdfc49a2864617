"""ChronoEdit: `ChronoEditTransformer3DModel` and its pipeline, which edits an image as the end of a short video."""

from lesa.models.wan import WanAdapter, WanCosts


class ChronoEditCosts(WanCosts):
    """What a ChronoEdit transformer costs."""

    usual_config = WanCosts.usual_config | {
        "_class_name": "ChronoEditTransformer3DModel",
        "in_channels": 36,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
    }
    presets = {"chronoedit-720p": (720, 1280, 5)}


class ChronoEditAdapter(WanAdapter):
    """A ChronoEdit transformer.

    With temporal reasoning, the pipeline leaves out frames in the middle of a run. The step after that is computed.
    """

    family = "chronoedit"
    costs = ChronoEditCosts
    transformer_classes = ("ChronoEditTransformer3DModel",)
