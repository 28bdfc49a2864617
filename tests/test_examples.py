"""The examples do what they say."""

import runpy
from pathlib import Path

import diffusers
import imageio
import pytest
import torch
from PIL import Image

import more_pipelines
import small_pipelines
import small_wan
from lesa.pipelines import load_pipeline

ROOT = Path(__file__).resolve().parents[1]


def test_continuous_batching_gives_what_each_request_gets_alone():
    path = ROOT / "examples/continuous_batching.py"
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 40
    example = runpy.run_path(str(path))
    predictor, serve, tokens, channels = (example[n] for n in ("predictor", "serve", "TOKENS", "CHANNELS"))
    for parameter in predictor.parameters():  # so that forecasts use all that there is
        torch.nn.init.normal_(parameter, std=0.1)
    calls, computed = [], []
    example["blocks"].register_forward_hook(lambda module, args, output: computed.append(len(output)))
    whole = predictor.predict_velocity
    predictor.predict_velocity = lambda ring, sigma, head: calls.append(sigma.tolist()) or whole(ring, sigma, head)
    waiting = [torch.randn(tokens, channels) for _ in range(5)]
    served = serve(waiting)
    assert sorted(served) == [*range(5)]
    assert any(len({*sigma}) == len(sigma) for sigma in calls)  # all slots at different steps, and one call
    assert sum(computed) == 5 * len(example["COMPUTED"])
    for number, latents in enumerate(waiting):
        torch.testing.assert_close(served[number], serve([latents])[0], rtol=1e-5, atol=1e-5)


CASES = {
    "flux2": ("flux2", 50),
    "z_image": ("z-image cfg", 50),
    "wan2_2": ("wan 2.2 cfg", 40),
    "hunyuan_video": ("hunyuan", 50),
}
"""For each example of a pipeline, the small pipeline that stands for the large one, and the steps that it makes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_example_makes_its_file(name, tmp_path, monkeypatch, capsys):
    """With a small pipeline from disk, whose prompts are embeddings."""
    case_name, steps = CASES[name]
    case = {**small_pipelines.ALL, **more_pipelines.ALL, **small_wan.EXPERTS}[case_name]
    example = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    cls, prompts = getattr(diffusers, case.pipeline), []
    case.build().save_pretrained(tmp_path / "model")
    draw = cls.__call__

    def load(cls, model, torch_dtype):
        assert model == example["MODEL"] and torch_dtype == torch.bfloat16
        pipe = load_pipeline(tmp_path / "model")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, prompt, **options):
        prompts.append(prompt)
        return draw(self, **{**case.inputs(1), **options})

    monkeypatch.setattr(cls, "from_pretrained", classmethod(load))
    monkeypatch.setattr(cls, "__call__", call)
    output = tmp_path / example["main"].__defaults__[0]
    example["main"](str(output), **case.size)
    assert prompts == [example["PROMPT"]]
    if output.suffix == ".mp4":
        frames = imageio.mimread(output)
        assert len(frames) == case.size["num_frames"] and frames[0].shape == (
            case.size["height"],
            case.size["width"],
            3,
        )
    else:
        assert Image.open(output).size == (case.size["width"], case.size["height"])
    assert f"and {-(-steps * 12 // 50)} of {steps} steps are computed" in capsys.readouterr().out
