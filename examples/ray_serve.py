"""A pipeline with the cache on, in several replicas behind Ray Serve.

Start it with `python examples/ray_serve.py --model MODEL --replicas 2`. Then `http://localhost:8000/?prompt=fox&seed=1`
is a picture. Other parameters, such as `height=512`, are numbers and go to the pipeline. The header `lesa` of an answer
says in JSON which replica made the picture, and how many steps it computed and predicted.
"""

import argparse
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
        parameters = dict(request.query_params)
        picture, stats = self.draw(parameters.pop("prompt"), **{name: int(value) for name, value in parameters.items()})
        return Response(picture, media_type="image/png", headers={"lesa": json.dumps(stats)})


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
