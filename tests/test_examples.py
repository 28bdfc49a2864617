"""The examples do what they say."""

import contextlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import diffusers
import imageio
import numpy as np
import pytest
import torch
from PIL import Image

import lesa
import more_pipelines
import prompted_pipelines
import small_pipelines
import small_wan
from lesa.pipelines import load_pipeline
from lesa_kernels import FusedKANPredictor, PredictorConfig

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


@contextlib.contextmanager
def serving(log, example, *arguments):
    """Runs an example that serves until it is interrupted; gives the address of the server when it answers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / example), *arguments, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python")))}
    end = time.monotonic() + 120
    with log.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as server:
        try:
            routes = {}
            while not routes:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.2)
                with contextlib.suppress(OSError), urlopen(f"http://localhost:{port}/-/routes", timeout=5) as answer:
                    routes = json.load(answer)
            yield f"http://localhost:{port}/"
            server.send_signal(signal.SIGINT)
            assert server.wait(60) in (0, -signal.SIGINT), log.read_text()[-3000:]
        finally:
            server.kill()


WRONG_REQUESTS = {
    "seed=1": "The request has no `prompt`. Add one, such as `?prompt=fox`.",
    "prompt=fox&widht=8": "The pipeline has no parameter `widht`. Leave it out.",
    "prompt=fox&guidance_scale=much": "`guidance_scale` must be a number, but got 'much'.",
    "prompt=fox&seed=1.5": "`seed` must be a whole number, but got '1.5'.",
}


@pytest.mark.slow
def test_ray_serves_what_each_request_gets_alone(tmp_path):
    """Two replicas share six requests that come at the same time."""
    pytest.importorskip("ray.serve", reason="the example needs Ray Serve")
    size = {"height": small_pipelines.HEIGHT, "width": small_pipelines.WIDTH, "num_inference_steps": 10}
    size["guidance_scale"] = 3.5
    pipe = prompted_pipelines.sd3(tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    known = {"num_inference_steps": 10, "schedule": (0, 2, 5, 8), "schedule_sigmas": (1.0, 0.8, 0.5, 0.2)}
    config = PredictorConfig(small_pipelines.DIM, rank=2, hidden=4, history_length=2, **known)
    FusedKANPredictor(config).save_pretrained(tmp_path / "predictor")

    def answer(seed):
        query = urlencode({"prompt": "a fox", "seed": seed, **size})
        with urlopen(f"{url}?{query}", timeout=120) as got:
            return got.read(), json.loads(got.headers["lesa"])

    options = ("--model", tmp_path / "model", "--replicas", "2", "--predictor", tmp_path / "predictor")
    with serving(tmp_path / "log", "ray_serve.py", *map(str, options)) as url, ThreadPoolExecutor(6) as clients:
        replicas, end = set(), time.monotonic() + 60
        while len(replicas) < 2 and time.monotonic() < end:  # the second one may be ready later than the first
            answers = list(clients.map(answer, range(6)))
            replicas |= {said["replica"] for _, said in answers}
        for query, sentence in WRONG_REQUESTS.items():
            with pytest.raises(HTTPError) as refused:
                urlopen(f"{url}?{query}", timeout=120)
            assert (refused.value.code, refused.value.read().decode()) == (400, sentence)
    assert len(replicas) == 2
    with lesa.enable_cache(pipe, tmp_path / "predictor"):
        for seed, (picture, said) in enumerate(answers):
            image = pipe("a fox", generator=torch.Generator().manual_seed(seed), **size).images[0]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), np.asarray(image))
            assert (said["computed"], said["predicted"]) == (4, 6)
