"""A pipeline with the cache on, in several replicas behind Ray Serve.

Start it with `python examples/ray_serve.py --model MODEL --replicas 2`. Then `http://localhost:8000/?prompt=fox&seed=1`
is a picture. Other parameters, such as `height=512` and `guidance_scale=3.5`, are numbers and go to the pipeline. If a
request has no prompt, or a parameter that the pipeline does not take, the answer has the status 400 and says so. The
header `lesa` of an answer says in JSON which replica made the picture, and how many steps it computed and predicted.
"""

import argparse
import inspect
import io
import json

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

import lesa
from lesa.pipelines import load_pipeline


@serve.deployment(max_ongoing_requests=1)  # a cached transformer takes one call at a time
class Replica:
    """Loads the pipeline and enables the cache once, then serves one request after another."""

    def __init__(self, model: str, predictor: str | None):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pipe = load_pipeline(model, torch_dtype=dtype).to(device)
        self.cache = lesa.enable_cache(self.pipe, predictor)

    def draw(self, prompt: str, seed: int = 0, **options) -> tuple[bytes, dict]:
        """A picture as PNG, and what the cache did."""
        generator = torch.Generator().manual_seed(seed)
        image = self.pipe(prompt, generator=generator, **options).images[0]
        image.save(picture := io.BytesIO(), "png")
        stats = {"computed": self.cache.stats.computed_steps, "predicted": self.cache.stats.predicted_steps}
        return picture.getvalue(), {"replica": serve.get_replica_context().replica_id.unique_id, **stats}

    def __call__(self, request: Request) -> Response:
        try:
            arguments = self.arguments(dict(request.query_params))
        except ValueError as error:
            return Response(str(error), status_code=400, media_type="text/plain")
        picture, stats = self.draw(**arguments)
        return Response(picture, media_type="image/png", headers={"lesa": json.dumps(stats)})

    def arguments(self, parameters: dict[str, str]) -> dict:
        """The parameters of a request as `draw` takes them.

        Raises:
            ValueError: one of them is absent, unknown or not a number.
        """
        if "prompt" not in parameters:
            raise ValueError("The request has no `prompt`. Add one, such as `?prompt=fox`.")
        known = {"seed", *inspect.signature(self.pipe.__call__).parameters}
        arguments: dict = {}
        for name, text in parameters.items():
            if name not in known:
                raise ValueError(f"The pipeline has no parameter `{name}`. Leave it out.")
            try:
                arguments[name] = text if name == "prompt" else _number(text, may_be_a_fraction=name != "seed")
            except ValueError:
                kind = "a whole number" if name == "seed" else "a number"
                raise ValueError(f"`{name}` must be {kind}, but got {text!r}.") from None
        return arguments


def _number(text: str, may_be_a_fraction: bool) -> int | float:
    return float(text) if "." in text and may_be_a_fraction else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a pipeline")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--predictor", help="folder or hub id of a predictor (default: one that needs no training)")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    ray.init()
    serve.start(http_options={"port": options.port})
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}  # of each replica
    replicas = Replica.options(num_replicas=options.replicas, ray_actor_options=needs)
    serve.run(replicas.bind(options.model, options.predictor), blocking=True)


if __name__ == "__main__":
    main()
