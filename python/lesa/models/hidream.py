"""HiDream: `HiDreamImageTransformer2DModel` and the pipelines built on it."""

from lesa.models.adapter import Adapter, decoded
from lesa.models.costs import Costs, attention_flops, product_flops, timestep_flops
from lesa.models.final_layer import FinalLayerHead


class HiDreamCosts(Costs):
    """What a HiDream transformer costs. Half of the text tokens are of T5, and half of Llama.

    Its images are square. It pads others to its largest number of tokens, which is not counted.
    """

    usual_config = {
        "_class_name": "HiDreamImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": (4096, 4096),
        "text_emb_dim": 2048,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
    }
    presets = {"hidream-1024": (1024, 1024, 1)}
    text_tokens = 256
    streams = 2

    def embedding_flops(self, image_tokens, text_tokens):
        c, half = self.config, text_tokens // 2
        t5, llama = (product_flops(half, width, self.dim) for width in c["caption_channels"])
        image = product_flops(image_tokens, c["in_channels"] * c["patch_size"] ** 2, self.dim)
        return image + t5 + (c["num_layers"] + c["num_single_layers"]) * llama

    def conditioning_flops(self):
        return timestep_flops(self.dim) + product_flops(1, self.config["text_emb_dim"], self.dim, self.dim)

    def block_flops(self, image_tokens, text_tokens):
        """Each block reads the layer of Llama that is its own, in addition to the text."""
        c, dim, text = self.config, self.dim, text_tokens + text_tokens // 2
        tokens = image_tokens + text
        attention = attention_flops(tokens, tokens, dim)
        double = attention + self._experts_flops(image_tokens) + self._gated_flops(text, 4 * dim)
        single = attention + self._experts_flops(tokens)
        double, single = double + product_flops(1, dim, 12 * dim), single + product_flops(1, dim, 6 * dim)
        return c["num_layers"] * double + c["num_single_layers"] * single

    def _experts_flops(self, rows: int) -> int:
        c, dim = self.config, self.dim
        experts = c["num_activated_experts"] * self._gated_flops(rows, 4 * dim) + self._gated_flops(rows, 2 * dim)
        return experts + product_flops(rows, dim, c["num_routed_experts"])

    def _gated_flops(self, rows: int, hidden: int) -> int:
        width = -(-int(2 * hidden / 3) // 256) * 256
        return 3 * product_flops(rows, self.dim, width)


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
