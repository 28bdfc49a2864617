"""Sana: `SanaTransformer2DModel`, `SanaVideoTransformer3DModel` and the pipelines built on them."""

import torch

from lesa.models.adapter import Adapter
from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.heads import TableHead, folded


class SanaCosts(CountedCosts):
    """What a Sana transformer costs; the usual model is that of 1.6 billion parameters."""

    usual_config = {
        "_class_name": "SanaTransformer2DModel",
        "patch_size": 1,
        "in_channels": 32,
        "caption_channels": 2304,
        "num_layers": 20,
    }
    presets = {"sana-1024": (1024, 1024, 1)}
    text_tokens = 300
    streams = 2
    scale = 32

    def call(self, image_tokens, text_tokens):
        config, (duration, side) = self.config, self.patch
        rows, columns = near_square(image_tokens)
        frames = () if isinstance(config["patch_size"], int) else (duration,)
        return {
            "hidden_states": valueless(1, config["in_channels"], *frames, rows * side, columns * side),
            "encoder_hidden_states": valueless(1, text_tokens, config["caption_channels"]),
            "timestep": valueless(1),
            "guidance": valueless(1) if config.get("guidance_embeds") else None,
        }


class SanaVideoCosts(VideoCosts, SanaCosts):
    """What a Sana transformer of videos costs."""

    usual_config = {
        **SanaCosts.usual_config,
        "_class_name": "SanaVideoTransformer3DModel",
        "patch_size": (1, 2, 2),
        "in_channels": 16,
    }
    presets = {"sana-video-480p": (480, 832, 81)}
    scale = 8


class SanaHead(TableHead):
    """A module `norm_out` that gets the conditioning and the table too."""

    @property
    def eps(self):
        return self.entry.norm.eps

    def entered(self, args, kwargs):
        return args[0], args[1]

    def run(self, features, conditioning):
        return self.projection(self.entry(features, conditioning, self.transformer.scale_shift_table))

    def modulation(self, conditioning):
        return folded(self.entry.norm, *self._rows(conditioning))

    def parts(self):
        norm, path = self.entry, self.norm_path
        return {
            path: (norm, f"{type(self.transformer).__module__}.SanaModulatedNorm"),
            f"{path}.norm": (norm.norm, torch.nn.LayerNorm),
            self.projection_path: (self.projection, torch.nn.Linear),
        }


class SanaVideoHead(SanaHead):
    """Its conditioning is that of each token, or of one for all."""

    def entered(self, args, kwargs):
        return args[0], args[1].squeeze(1)

    def run(self, features, conditioning):
        return super().run(features, conditioning if conditioning.ndim == 3 else conditioning[:, None])


class SanaAdapter(Adapter):
    """A Sana transformer. The timesteps of Sana Sprint's scheduler are angles between sample and noise."""

    family = "sana"
    costs = SanaCosts
    transformer_classes: tuple[str, ...] = ("SanaTransformer2DModel",)
    embedders = ("time_embed",)
    control_outputs = 1
    control_is_converted = True
    conditioned_on = ("guidance",)
    block_lists = {"transformer_blocks": "attn1.to_out.0"}

    def make_head(self):
        return SanaHead(self.transformer)

    def pass_timesteps(self, timesteps, scheduler):
        if scheduler.config.get("prediction_type") == "trigflow":
            return torch.sin(timesteps) / (torch.cos(timesteps) + torch.sin(timesteps))
        return timesteps * self.transformer.config.get("timestep_scale", 1.0)

    def condition(self, timestep, inputs, dtype):
        guidance = {} if inputs["guidance"] is None else {"guidance": inputs["guidance"]}
        return self.transformer.time_embed(timestep, hidden_dtype=dtype, **guidance)[1]

    def shape(self, call):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, (height // side) * (width // side)

    def arrange(self, call, velocity):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        patches = velocity.reshape(batch, height // side, width // side, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height // side * side, width // side * side)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base. A sample that was made in a size nearer to the trained ones is scaled to the requested one."""
        images = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
        images = _resized(pipe.image_processor, images, height, width)
        return pipe.image_processor.postprocess(images, output_type="np")


class SanaVideoAdapter(SanaAdapter):
    """A Sana transformer of videos. Where an image is given, each token has its own timestep."""

    family = "sana-video"
    costs = SanaVideoCosts
    transformer_classes = ("SanaVideoTransformer3DModel",)

    def make_head(self):
        return SanaVideoHead(self.transformer)

    def condition(self, timestep, inputs, dtype):
        conditioning = super().condition(timestep.flatten(), inputs, dtype)
        return conditioning if timestep.ndim == 1 else conditioning.unflatten(0, (len(timestep), -1))

    def shape(self, call):
        batch, frames, rows, columns = self._token_grid(call)
        return batch, frames * rows * columns

    def arrange(self, call, velocity):
        patches = velocity.reshape(*self._token_grid(call), *self.transformer.config.patch_size, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base."""
        vae, latents = pipe.vae, latents.to(pipe.vae.dtype)
        told = {**vae.config, **dict(vae.named_buffers())}
        if told.get("latents_mean") is not None:
            mean, deviation = (torch.as_tensor(told[name]) for name in ("latents_mean", "latents_std"))
            mean, deviation = (part.to(latents)[:, None, None, None] for part in (mean, deviation))
            latents = latents / (1.0 / deviation) + mean
        video = _resized(pipe.video_processor, vae.decode(latents, return_dict=False)[0], height, width)
        return pipe.video_processor.postprocess_video(video, output_type="np")

    def _token_grid(self, call) -> tuple[int, ...]:
        """Batch, and frames, rows and columns of the tokens."""
        batch, _, *size = call["hidden_states"].shape
        return batch, *(length // patch for length, patch in zip(size, self.transformer.config.patch_size))


def _resized(processor, images, height, width):
    if height is None or width is None or images.shape[-2:] == (height, width):
        return images
    return processor.resize_and_crop_tensor(images, width, height)
