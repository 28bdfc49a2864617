"""A small pipeline that takes prompts as text."""

import json

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import small_pipelines as small


def sd3(folder):
    """A small SD3 with two text encoders, which know letters only, and without the third.

    Args:
        folder: where the files of the tokenizer are written.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    pipe = small.SD3["sd3"].build()
    torch.manual_seed(0)
    for suffix in ("", "_2"):
        encoder = CLIPTextModelWithProjection(config).eval()
        pipe.register_modules(**{f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer})
    return pipe
