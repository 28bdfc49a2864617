"""Random files and option values: whatever they hold, they are read, or refused by one line that names them."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from diffusers import FluxInpaintPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lesa import cli
from lesa.cli import UsageError, arguments
from lesa.cli.matching import matched
from lesa.contenders import budget_of
from lesa.inputs import SUFFIXES, check_inputs, read_inputs, read_samples, write_inputs
from lesa.messages import is_message

TRIES = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXT = st.text(st.characters(), max_size=8)  # half surrogate pairs too
NUMBER = st.floats() | st.integers(-(2**70), 2**70)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(TEXT, value, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["prompt", "height", "guidance_scale", "sigmas", "image", "strength", "prompt_embeds", "x", ""])


def named(error: Exception) -> str:
    """The message of an error that is meant for the user; any other error is a fault."""
    if not is_message(error):
        raise error
    return str(error)


def read_and_fit(file):
    samples = read_samples(file)
    check_inputs([sample.arguments for sample in samples], [sample.place for sample in samples])
    return matched(samples, "FluxInpaintPipeline", FluxInpaintPipeline.__call__, file.parent)


def tried(contents: bytes, suffix=".jsonl"):
    """The samples of a file with these contents, or the message."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"inputs{suffix}"
        file.write_bytes(contents)
        try:
            return read_and_fit(file)
        except Exception as error:
            assert re.search(r"inputs\.(jsonl|safetensors)", message := named(error)), message
            return message


@pytest.mark.slow
@TRIES
@given(st.binary(max_size=40))
def test_bytes(contents):
    """No file of tensors is so short. Lines are samples or are named."""
    for suffix in SUFFIXES:
        found = tried(contents, suffix)
        assert isinstance(found, str) or (suffix == ".jsonl" and found)


@pytest.mark.slow
@TRIES
@given(st.lists(JSON, min_size=1, max_size=3), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_lines_of_any_values(values, end, ascii_only):
    text = end.join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    found = tried(text.encode("utf-8", "surrogatepass"))
    if isinstance(found, list):
        assert all(isinstance(value, (str, dict)) for value in values) and len(found) == len(values)
    elif "is not UTF-8" not in found:
        assert re.search(rf"line [1-{2 * len(values)}]", found), found


@pytest.mark.slow
@TRIES
@given(st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_objects_of_known_and_unknown_arguments(value):
    found = tried(json.dumps(value).encode())
    if isinstance(found, str):
        assert "line 1" in found and any(repr(key) in found or f"argument {key}." in found for key in value), found
    else:
        assert found[0].arguments.keys() == value.keys()


@pytest.mark.slow
@TRIES
@given(st.lists(st.text(min_size=0, max_size=9), min_size=1, max_size=4))
def test_what_is_written_is_read(prompts):
    inputs = [{"prompt": prompt} for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.JSONL"
        write_inputs(file, inputs)
        assert read_inputs(file) == inputs


OPTION = st.text(st.sampled_from("0123456789,.-+einfa _²٣µ\ud800"), max_size=9) | TEXT
TYPES = (
    *(arguments.positive, arguments.natural, arguments.seed, arguments.above_zero),
    *(arguments.schedule, arguments.lengths, arguments.stage_bounds),
)


@pytest.mark.slow
@TRIES
@given(OPTION)
def test_values_of_options(text):
    for kind in TYPES:
        try:
            value = kind(text)
        except arguments.argparse.ArgumentTypeError as error:
            assert repr(text) in str(error)
            continue
        for number in value if isinstance(value, (list, tuple)) else [value]:
            assert number == "auto" or abs(number) < float("inf")
    for name in text.split(","):
        try:
            kind, budget = budget_of(name)
            assert budget is None or budget >= 1
        except ValueError as error:
            assert repr(name)[:20] in named(error)


@pytest.mark.slow
@TRIES
@given(st.lists(st.sampled_from(["estimate", "--model", "flux-1024", "--steps", "--schedule", "--json"]) | OPTION))
def test_command_lines(words):
    try:
        cli.parse(["estimate", "--model", "flux-1024", *words])
    except UsageError as error:
        assert "see `lesa" in str(error)
    except SystemExit as exit:
        assert exit.code == 0 and {"-h", "--help"} & {*words}
