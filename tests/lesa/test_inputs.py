import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from lesa.artifacts import digest
from lesa.demo import digits
from lesa.inputs import can_share_a_call, collate, read_inputs, write_inputs


def assert_same(a: list[dict], b: list[dict]):
    assert len(a) == len(b)
    for first, other in zip(a, b):
        assert first.keys() == other.keys()
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype and torch.equal(value, other[name])
            else:
                assert value == other[name]


def test_jsonl_round_trip(tmp_path):
    file = tmp_path / "prompts.jsonl"
    inputs = [
        {"prompt": 'a "quoted"\nGrüße\u2028second line'},
        {"prompt": "b", "height": 16, "guidance_scale": 3.5, "sigmas": [1.0, 0.5]},
    ]
    write_inputs(file, inputs)
    assert_same(read_inputs(file), inputs)
    first = file.read_text(encoding="utf-8").split("\n")[0]
    assert json.loads(first) == inputs[0]["prompt"], "a bare prompt is a JSON string"


def test_jsonl_skips_blank_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a"\n\n{"prompt": "b", "height": 32}\n   \n')
    assert read_inputs(file) == [{"prompt": "a"}, {"prompt": "b", "height": 32}]


@pytest.mark.parametrize("line", ["a cat", '"unclosed', "3", '["a"]', "null"])
def test_jsonl_names_the_bad_line(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n\n{line}\n"fine"\n')
    with pytest.raises((ValueError, TypeError), match=r"prompts\.jsonl, line 3.*JSON string or a JSON object"):
        read_inputs(file)


def test_jsonl_in_another_encoding(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('"Grüße"\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be text in UTF-8.*prompts\.jsonl, where byte 3.*Save the file"):
        read_inputs(file)


def test_jsonl_holds_no_tensors(tmp_path):
    with pytest.raises(TypeError, match=r"inputs\[0\].*JSON.*\.safetensors"):
        write_inputs(tmp_path / "a.jsonl", digits.inputs_for([1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_round_trip(tmp_path, dtype):
    file = tmp_path / "inputs.safetensors"
    inputs = [
        {**item, "prompt_embeds": item["prompt_embeds"].to(dtype), "note": None, "sigmas": [1.0, 0.25]}
        for item in digits.inputs_for([3, 1, 4])
    ]
    write_inputs(file, inputs)
    assert_same(read_inputs(file), inputs)
    with safe_open(file, "pt") as stored:
        assert stored.get_slice("prompt_embeds").get_shape() == [3, 1, 64]
        assert json.loads(stored.metadata()["height"]) == 16


def test_safetensors_keeps_only_common_arguments(tmp_path):
    write = partial(write_inputs, tmp_path / "a.safetensors")
    tensor = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="'height'"):
        write([{"x": tensor, "height": 16}, {"x": tensor, "height": 32}])
    with pytest.raises(ValueError, match=r"inputs\[1\]\['prompt'\].*\.jsonl"):
        write([{"x": tensor, "prompt": "a"}, {"x": tensor, "prompt": "b"}])
    with pytest.raises(ValueError, match=r"tensors.*\.jsonl"):
        write([{"prompt": "a"}])
    assert not (tmp_path / "a.safetensors").exists()


def test_safetensors_that_are_no_inputs(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, file)
    with pytest.raises(ValueError, match=r"leading dimension.*'a': 2, 'b': 3"):
        read_inputs(file)
    save_file({"a": torch.zeros(2, 3)}, file, {"height": "sixteen"})
    with pytest.raises(ValueError, match=r"a\.safetensors, metadata 'height'.*JSON"):
        read_inputs(file)
    file.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="be a safetensors file"):
        read_inputs(file)


def test_foreign_format_tag_is_no_argument(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1, 3)}, file, {"format": "pt"})
    assert [*read_inputs(file)[0]] == ["x"]


def test_files_that_are_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_inputs(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"\.jsonl or \.safetensors.*prompts\.txt"):
        read_inputs(tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match=r"\.jsonl or \.safetensors"):
        write_inputs(tmp_path / "prompts.csv", [{"prompt": "a"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one input"):
        read_inputs(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="at least one input"):
        write_inputs(tmp_path / "empty.jsonl", [])


def test_collate_joins_samples():
    image = Image.new("L", (2, 2))
    steps = [1.0, 0.5]
    inputs = [
        {"prompt": f"{n}", "prompt_embeds": torch.full((1, 2), float(n)), "height": 16, "sigmas": steps, "image": image}
        for n in range(3)
    ]
    joined = collate(inputs)
    assert joined["prompt"] == ["0", "1", "2"]
    assert joined["prompt_embeds"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (joined["height"], joined["sigmas"]) == (16, steps)
    assert joined["image"] == [image] * 3
    assert collate(inputs[:1])["prompt"] == ["0"]


def test_collate_joins_captions_and_the_dimension_of_samples():
    """Z-Image takes a list with a tensor for each sample, or a list of them; HiDream has the layers first."""
    layers, caption = torch.zeros(4, 1, 5, 3), torch.zeros(7, 3)
    item = {"prompt_embeds": [caption], "negative_prompt_embeds": [[caption, caption]], "prompt_embeds_llama3": layers}
    joined = collate([item, item])
    assert len(joined["prompt_embeds"]) == len(joined["negative_prompt_embeds"]) == 2
    assert len(joined["negative_prompt_embeds"][1]) == 2 and joined["prompt_embeds_llama3"].shape == (4, 2, 5, 3)
    for name, several in (("prompt_embeds", [caption] * 2), ("prompt_embeds_llama3", torch.zeros(4, 2, 5, 3))):
        with pytest.raises(ValueError, match=f"'{name}'.* must have a leading dimension of 1"):
            collate([{name: several}])


def test_rows_of_tensors_with_another_dimension_of_samples(tmp_path):
    inputs = [{"prompt_embeds_llama3": torch.randn(4, 1, 5, 3), "pooled": torch.randn(1, 2)} for _ in range(3)]
    write_inputs(tmp_path / "in.safetensors", inputs)
    back = read_inputs(tmp_path / "in.safetensors")
    assert len(back) == 3
    for one, other in zip(back, inputs):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "first, other, name",
    [
        ({"height": 16}, {"height": 32}, "height"),
        ({"prompt": "a"}, {"prompt": "a", "negative_prompt": "b"}, "negative_prompt"),
        ({"prompt_embeds": torch.zeros(1, 3, 4)}, {"prompt_embeds": torch.zeros(1, 2, 4)}, "prompt_embeds"),
        ({"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 3).half()}, "x"),
        ({"images": [torch.zeros(1, 3)]}, {"images": [torch.zeros(1, 3)]}, "images"),
    ],
)
def test_collate_refuses_what_differs(first, other, name):
    assert not can_share_a_call(first, other)
    with pytest.raises(ValueError, match=f"'{name}'.*input 0 and.*input 2.*batch size of 1"):
        collate([first, first, other])


def test_collate_refuses_several_samples_in_one_input():
    with pytest.raises(ValueError, match=r"inputs\[0\]\['x'\].*leading dimension of 1"):
        collate([{"x": torch.zeros(2, 3)}])


def test_digest_tells_numbers_of_numpy_apart():
    values = [np.float32(3.5), np.float32(2.5), np.float64(3.5), np.int64(3), np.int64(4)]
    assert len({digest([{"x": value}]) for value in values}) == len(values)


def test_digest_tells_inputs_apart():
    base = {"prompt": "a", "height": 16, "x": torch.arange(4.0).view(1, 4), "image": Image.new("L", (2, 2))}
    variants = [
        {**base, "prompt": "b"},
        {**base, "height": 16.0},
        {**base, "x": torch.arange(4.0).view(2, 2)},
        {**base, "x": torch.arange(4.0).view(1, 4).to(torch.bfloat16)},
        {**base, "x": torch.tensor([[0.0, 1, 2, 4]])},
        {**base, "image": Image.new("L", (2, 2), 1)},
        {**base, "x": base["x"].numpy()},
        {name.replace("prompt", "prompt_2"): value for name, value in base.items()},
    ]
    digests = [digest([item]) for item in [base, *variants]] + [digest([base, base])]
    assert len(set(digests)) == len(digests)
    assert digest([{**base, "x": base["x"].clone()}]) == digests[0]
    assert digest([dict(reversed(base.items()))]) == digests[0]
    assert digest([{"f": test_collate_joins_samples}]) != digest([{"f": test_jsonl_round_trip}])
