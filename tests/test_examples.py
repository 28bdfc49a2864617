"""The examples do what they say."""

import runpy
from pathlib import Path

import torch

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
