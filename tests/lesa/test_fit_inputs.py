"""What a fit takes where no inputs are given, and which pipelines it asks for more than prompts."""

import re

import diffusers
import pytest

import modular_pipelines
import more_pipelines
import small_pipelines
import unadapted_pipelines
from lesa.demo import digits
from lesa.fitting.amounts import Amounts
from lesa.fitting.inputs import chosen_inputs
from lesa.fitting.prompts import CLIPS, PICTURES
from lesa.fitting.samples import shares_of

CASES = {**small_pipelines.ALL, **more_pipelines.ALL, **unadapted_pipelines.ALL}
GIVEN = re.compile(
    "((cond|control|mask)_)?images?|((mask|control|pose|face)_)?video|control_mask|controls|audio|class_labels"
)

MORE_THAN_THE_CASES = {  # they run without it too, but were not made for that
    "JoyImageEditPipeline": {"image"},
    "JoyImageEditPlusPipeline": {"images"},
    "BriaFiboEditPipeline": {"image"},
    "LTXI2VLongMultiPromptPipeline": {"cond_image"},
}


def bare(kind, **components):
    """A pipeline of this class without weights: what it takes does not depend on them."""
    return object.__new__(type(kind.__name__, (kind,), {"components": components}))


def asked_for(pipe):
    """The arguments that the refusal names; empty if the prompts are enough."""
    try:
        chosen_inputs(pipe, None)
    except ValueError as error:
        assert re.match(r"`inputs` are required for this \w+: it needs ", str(error))
        names = re.search(r"needs (.*?)\. The built-in", str(error))[1]
        return {name for part in names.split(" and ") for name in part.split(", ")}
    return set()


def test_there_are_a_few_dozen_prompts_and_none_is_there_twice():
    assert len(PICTURES) == 40 and len(CLIPS) == 32
    texts = [*PICTURES, *CLIPS]
    assert len({text.lower() for text in texts}) == 72
    assert all(text == text.strip() and text.isprintable() for text in texts)
    lengths = sorted(len(text.split()) for text in PICTURES)
    assert lengths[0] <= 5 and lengths[-1] >= 30


def test_prompts_are_taken_for_pictures_and_videos():
    assert chosen_inputs(bare(diffusers.FluxPipeline), None) == [{"prompt": text} for text in PICTURES]
    clips = chosen_inputs(bare(diffusers.WanPipeline), None)
    assert clips == [{"prompt": text} for text in (*CLIPS[:16], *PICTURES, *CLIPS[16:])]
    shares = shares_of(clips, Amounts())  # what decides and what tests are clips, and so is what is trained on first
    assert [item["prompt"] for item in (*shares.validation, *shares.test)] == [*CLIPS[16:]]
    assert chosen_inputs(bare(diffusers.SanaVideoPipeline), None) == clips


def test_what_is_given_is_taken():
    pipe = bare(diffusers.FluxKontextPipeline)
    assert chosen_inputs(pipe, ["a cat"]) == [{"prompt": "a cat"}]
    with pytest.raises(ValueError, match=r"`inputs` must be a list of prompts"):
        chosen_inputs(pipe, [])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("FluxImg2ImgPipeline", {"image"}),
        ("FluxInpaintPipeline", {"image", "mask_image"}),
        ("FluxKontextPipeline", {"image"}),
        ("FluxControlNetPipeline", {"control_image"}),
        ("QwenImageEditPlusPipeline", {"image"}),
        ("QwenImageControlNetInpaintPipeline", {"control_image", "control_mask"}),
        ("HunyuanVideoImageToVideoPipeline", {"image"}),
        ("WanVideoToVideoPipeline", {"video"}),
        ("Cosmos2VideoToWorldPipeline", {"image"}),
        ("Flux2Pipeline", set()),
        ("StableDiffusion3Pipeline", set()),
        ("WanVACEPipeline", set()),
    ],
)
def test_which_pipelines_need_more_than_a_prompt(kind, names):
    assert asked_for(bare(getattr(diffusers, kind))) == names


@pytest.mark.slow
def test_every_pipeline_is_asked_for_what_its_small_runs_are_given():
    runs, found = {}, {}
    for case in CASES.values():
        if hasattr(diffusers, case.pipeline):
            runs.setdefault(case.pipeline, []).append({name for name in case.inputs() if GIVEN.fullmatch(name)})
            found[case.pipeline] = asked_for(bare(case.pipeline_class))
    assert len(found) >= 60
    assert found == {kind: MORE_THAN_THE_CASES.get(kind, set.intersection(*runs[kind])) for kind in found}


def test_a_refusal_says_how_to_give_images():
    with pytest.raises(ValueError) as refusal:
        chosen_inputs(bare(diffusers.FluxInpaintPipeline), None)
    assert str(refusal.value) == (
        "`inputs` are required for this FluxInpaintPipeline: it needs image and mask_image. The built-in prompts have "
        'none of this. Pass a .jsonl file with a line for each sample, such as {"prompt": "a red fox", "image": '
        '"image-1.png", "mask_image": "mask_image-1.png"}, or in Python a list of dicts.'
    )


def test_a_pipeline_without_text_encoders_is_asked_for_embeddings():
    with pytest.raises(ValueError) as refusal:
        chosen_inputs(digits.load_pipeline(), None)
    assert str(refusal.value) == (
        "`inputs` are required for this FluxPipeline: it has no text encoder (text_encoder, text_encoder_2), so that "
        "it needs prompt_embeds and pooled_prompt_embeds. The built-in prompts have none of this. Pass a .safetensors "
        "file that holds them for each sample, or in Python a list of dicts."
    )


def test_the_third_text_encoder_may_be_absent():
    components = {"text_encoder": 1, "text_encoder_2": 1, "text_encoder_3": None}
    assert len(chosen_inputs(bare(diffusers.StableDiffusion3Pipeline, **components), None)) == 40


def test_a_modular_pipeline_is_asked_for_what_its_blocks_require():
    pipe = modular_pipelines.CASES["flux"].build()
    assert asked_for(pipe) == {"prompt_embeds"}
