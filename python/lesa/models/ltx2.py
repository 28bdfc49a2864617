"""LTX-2: `LTX2VideoTransformer3DModel` and the pipelines built on it, which make a video and its sound."""

import importlib

import torch

from lesa.models.adapter import Adapter
from lesa.models.costs import CountedCosts, VideoCosts, near_square, valueless
from lesa.models.heads import TableHead


class LTX2Costs(VideoCosts, CountedCosts):
    """What an LTX-2 transformer costs, with one audio token for each 48 video tokens. One ring is counted."""

    usual_config = {"_class_name": "LTX2VideoTransformer3DModel", "patch_size": 1, "num_layers": 48}
    presets = {"ltx-2": (512, 768, 121)}
    text_tokens = 1024
    streams = 2
    scale = 32
    frame_scale = 8

    def call(self, image_tokens, text_tokens):
        config, (rows, columns) = self.config, near_square(image_tokens)
        sound = max(1, image_tokens // 48)
        width = width_of_sound = config.get("caption_channels", 3840)
        if not config.get("use_prompt_embeddings", True):
            width = config.get("cross_attention_dim", 4096)
            width_of_sound = config.get("audio_cross_attention_dim", 2048)
        modulates_text = config.get("cross_attn_mod") or config.get("audio_cross_attn_mod")
        return {
            "hidden_states": valueless(1, image_tokens, config.get("in_channels", 128)),
            "audio_hidden_states": valueless(1, sound, config.get("audio_in_channels", 128)),
            "encoder_hidden_states": valueless(1, text_tokens, width),
            "audio_encoder_hidden_states": valueless(1, text_tokens, width_of_sound),
            "timestep": valueless(1),
            **({"sigma": valueless(1)} if modulates_text else {}),
            "num_frames": 1,
            "height": rows,
            "width": columns,
            "audio_num_frames": sound,
        }


class LTX2Adapter(Adapter):
    """An LTX-2 transformer. It has an output head for the video, and one for the sound."""

    family = "ltx-2"
    costs = LTX2Costs
    transformer_classes = ("LTX2VideoTransformer3DModel",)
    embedders: tuple[str, ...] = ("time_embed",)
    untold = "it gets a timestep for the sound too"
    block_lists = {"transformer_blocks": "attn1.norm_q"}

    def __init__(self, transformer):
        super().__init__(transformer)
        self._sound = None if isinstance(self, LTX2Sound) else LTX2Sound(transformer)

    @property
    def branches(self):
        return (self,) if self._sound is None else (self, self._sound)

    def make_head(self):
        return TableHead(self.transformer)

    def condition(self, timestep, inputs, dtype):
        return self._embedded(self.transformer.time_embed, timestep, dtype)

    def bind(self, args, kwargs):
        bound = super().bind(args, kwargs)
        if bound["audio_timestep"] is None:
            bound["audio_timestep"] = bound["timestep"]
        return bound

    def output(self, call, velocity, *sound):
        if not call["return_dict"]:
            return (velocity, *sound)
        module = importlib.import_module("diffusers.models.transformers.transformer_ltx2")
        return module.AudioVisualModelOutput(sample=velocity, audio_sample=sound[0])

    @torch.no_grad()
    def decode(self, pipe, latents, height=None, width=None):
        """See the base; without the sound. A VAE that takes a timestep gets zero, and the latents without noise."""
        vae = pipe.vae
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        video = vae.decode(latents.to(vae.dtype), timestep, return_dict=False)[0]
        return pipe.video_processor.postprocess_video(video, output_type="np")

    @staticmethod
    def _embedded(embedder, timestep, dtype):
        """The embedded timesteps `[B, D]`, or `[B, T, D]` if each token has one."""
        batch = len(timestep)
        _, embedded = embedder(timestep.flatten(), batch_size=batch, hidden_dtype=dtype)
        return embedded if len(embedded) == batch else embedded.unflatten(0, (batch, -1))


class LTX2Sound(LTX2Adapter):
    """The output head for the sound of an LTX-2 transformer."""

    embedders = ("audio_time_embed",)
    sample_argument, timestep_argument = "audio_hidden_states", "audio_timestep"

    def modulates_tokens(self, call):
        """See the base. The sound may have noise levels of its own, which the scheduler does not tell."""
        return call["audio_timestep"] is not call["timestep"] or super().modulates_tokens(call)

    def width(self):
        return self.transformer.config.audio_num_attention_heads * self.transformer.config.audio_attention_head_dim

    def make_head(self):
        return TableHead(self.transformer, "audio_norm_out", "audio_proj_out", "audio_scale_shift_table")

    def condition(self, timestep, inputs, dtype):
        return self._embedded(self.transformer.audio_time_embed, timestep, dtype)
