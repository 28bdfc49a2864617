"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel` and the pipelines built on it."""

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import Costs, attention_flops, feed_forward_flops, product_flops


class SD3Costs(Costs):
    """What a Stable Diffusion 3 transformer costs; the usual model is SD3 medium."""

    usual_config = {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "dual_attention_layers": (),
    }
    presets = {"sd3-1024": (1024, 1024, 1)}
    text_tokens = 333
    streams = 2

    def embedding_flops(self, image_tokens, text_tokens):
        c = self.config
        image = product_flops(image_tokens, c["in_channels"] * c["patch_size"] ** 2, self.dim)
        return image + product_flops(text_tokens, c["joint_attention_dim"], self.dim)

    def block_flops(self, image_tokens, text_tokens):
        c, dim = self.config, self.dim
        # The last block reads the text only: it does not project it back, and its modulation of it has two parts.
        unused = product_flops(text_tokens, dim, dim) + feed_forward_flops(text_tokens, dim)
        unused += product_flops(1, dim, 4 * dim)
        second = attention_flops(image_tokens, image_tokens, dim) + product_flops(1, dim, 3 * dim)
        dual = len([number for number in c["dual_attention_layers"] if number < c["num_layers"]])
        return super().block_flops(image_tokens, text_tokens) - unused + dual * second


class SD3Adapter(Adapter):
    """A Stable Diffusion 3 transformer."""

    family = "sd3"
    costs = SD3Costs
    transformer_classes = ("SD3Transformer2DModel",)
    attention_kwargs = "joint_attention_kwargs"
    control_outputs = 1
    conditioned_on = ("pooled_projections",)
    block_lists = {"transformer_blocks": "attn.to_out.0"}  # not all of these models have attn.norm_q

    def condition(self, timestep, inputs, dtype):
        return self.transformer.time_text_embed(timestep, inputs["pooled_projections"])

    def shape(self, call):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        return batch, (height // side) * (width // side)

    def arrange(self, call, velocity):
        batch, _, height, width = call["hidden_states"].shape
        side = self.transformer.config.patch_size
        patches = velocity.reshape(batch, height // side, width // side, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height // side * side, width // side * side)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)
