"""First Block Cache of diffusers."""

from dataclasses import dataclass

from diffusers import FirstBlockCacheConfig

from lesa.contenders.base import diffusers_cache


@dataclass(frozen=True)
class FirstBlockCache:
    """A setting of diffusers' `FirstBlockCacheConfig`, which runs the first block in every step.

    Args:
        threshold: `threshold`, on the relative change of the first block's residual.
    """

    threshold: float

    contender = "first-block-cache"

    def __str__(self) -> str:
        return f"first-block-cache-threshold{self.threshold:.4g}"

    def describe(self) -> str:
        """The setting in words."""
        return f"threshold {self.threshold:.4g}"

    def on(self, pipe, num_inference_steps: int):
        """The context in which it is on."""
        return diffusers_cache(pipe, FirstBlockCacheConfig(threshold=self.threshold))
