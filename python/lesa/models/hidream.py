"""HiDream: `HiDreamImageTransformer2DModel` and the pipelines built on it."""

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import Costs
from lesa.models.final_layer import FinalLayerHead


class HiDreamCosts(Costs):
    """What a HiDream transformer costs."""

    usual_config = {"_class_name": "HiDreamImageTransformer2DModel"}
    presets = {"hidream-1024": (1024, 1024, 1)}
    text_tokens = 384
    streams = 2


class HiDreamAdapter(Adapter):
    """A HiDream transformer. It pads images that are not square, and the padding is not forecast."""

    family = "hidream"
    costs = HiDreamCosts
    transformer_classes = ("HiDreamImageTransformer2DModel",)
    embedders = ("t_embedder", "p_embedder")
    timestep_argument, text_argument = "timesteps", "encoder_hidden_states_t5"
    conditioned_on = ("pooled_embeds",)
    block_lists = {"double_stream_blocks": "block.attn1.to_out", "single_stream_blocks": "block.attn1.to_out"}

    def make_head(self):
        kind = "diffusers.models.transformers.transformer_hidream_image.HiDreamImageOutEmbed"
        return FinalLayerHead(self.transformer, "final_layer", kind, conditioning=("temb",))

    def condition(self, timestep, inputs, dtype):
        return self.transformer.t_embedder(timestep, dtype) + self.transformer.p_embedder(inputs["pooled_embeds"])

    def shape(self, call):
        rows, columns = self._grid(call)
        return len(call["hidden_states"]), rows * columns

    def features(self, call, entered):
        return entered[:, : self.shape(call)[1]]

    def arrange(self, call, velocity):
        return self.transformer.unpatchify(velocity, [self._grid(call)] * len(velocity), is_training=False)

    def decode(self, pipe, latents, height=None, width=None):
        return decoded(pipe, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)

    def _grid(self, call: dict) -> tuple[int, int]:
        """Rows and columns of the tokens."""
        side = self.transformer.config.patch_size
        height, width = call["hidden_states"].shape[2:]
        return height // side, width // side
