"""Small modular pipelines of diffusers: the denoise blocks of every family that has them, and a block that decodes."""

import importlib
from dataclasses import dataclass, field

import pytest
import torch

import more_pipelines
import small_pipelines
from lesa.pipelines import quiet_progress


@dataclass(frozen=True)
class Modular:
    """One way to put a modular pipeline together.

    Args:
        case: the ordinary small pipeline whose components and arguments it takes.
        denoise: module and class of its denoise blocks, below `diffusers.modular_pipelines`.
        decode: likewise of the block that decodes.
        size: arguments that tell the size, where it is not that of the case.
        arguments: makes further arguments, or other ones than those of the case, from the pipeline.
        streams: names of the streams of calls with guidance; one stream if the blocks have no guider.
        options: of its own configuration.
    """

    case: str
    denoise: tuple[str, str]
    decode: tuple[str, str]
    size: dict = field(default_factory=dict)
    arguments: object = None
    streams: tuple[str, ...] = ("main",)
    options: dict = field(default_factory=dict)

    @property
    def small(self):
        """The ordinary small pipeline."""
        return {**small_pipelines.ALL, **more_pipelines.ALL}[self.case]

    def build(self, guider=None, decodes=True, plain=None):
        """A new pipeline, of the components of `plain` or of a new ordinary one.

        The guider is given to all blocks that take one; None stands for their default.
        """
        plain = self.small.build() if plain is None else plain
        parts = {"denoise": blocks(*self.denoise)} | ({"decode": blocks(*self.decode)} if decodes else {})
        modular = importlib.import_module("diffusers.modular_pipelines")
        pipe = modular.SequentialPipelineBlocks.from_blocks_dict(parts).init_pipeline()
        components = {name: part for name, part in plain.components.items() if name in pipe.components}
        if guider is not None:
            components |= {name: guider for name in pipe.components if name.startswith("guider")}
        pipe.update_components(**{name: part for name, part in components.items() if part is not None}, **self.options)
        return pipe

    def inputs(self, pipe, batch=1):
        """Arguments of a call, but for steps and generators."""
        given = self.small.inputs(batch, **self.size) | (self.arguments(pipe, batch) if self.arguments else {})
        known = {name for known in pipe._blocks.inputs for name in (known.name, known.kwargs_type) if name}
        return {name: value for name, value in given.items() if name in known}

    def latents(self, pipe, steps, batch=1, **changed):
        """What the last denoise step gives."""
        torch.manual_seed(0)  # some guiders drop features out
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        call = {**self.inputs(pipe, batch), "num_inference_steps": steps, "generator": generators, **changed}
        with quiet_progress(pipe):
            return pipe(**call, output="latents")


def blocks(module, name):
    """An instance of a class of blocks, which older versions of diffusers do not have."""
    module = pytest.importorskip(f"diffusers.modular_pipelines.{module}")
    if not hasattr(module, name):
        pytest.skip(f"this version of diffusers has no {name}")
    return getattr(module, name)()


_LARGER = {"height": 32, "width": 48}
"""A pipeline without a VAE takes 8 for its scale."""

CASES = {
    "flux": Modular("flux", ("flux.modular_blocks_flux", "FluxCoreDenoiseStep"), ("flux.decoders", "FluxDecodeStep")),
    "qwen": Modular(
        "qwen cfg",
        ("qwenimage.modular_blocks_qwenimage", "QwenImageCoreDenoiseStep"),
        ("qwenimage.modular_blocks_qwenimage", "QwenImageDecodeStep"),
        streams=("main", "main-2"),
    ),
    "sd3": Modular(
        "sd3 cfg",
        ("stable_diffusion_3.modular_blocks_stable_diffusion_3", "StableDiffusion3AutoCoreDenoiseStep"),
        ("stable_diffusion_3.decoders", "StableDiffusion3DecodeStep"),
        streams=("main", "main-2"),
    ),
}
