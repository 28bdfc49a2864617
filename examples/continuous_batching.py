"""Continuous batching with lesa_kernels alone: requests at different steps share one call of the predictor."""

import torch

from lesa_kernels import FusedKANPredictor, OutputHead, PredictorConfig, output_head

SLOTS, TOKENS, CHANNELS, WIDTH, STEPS, COMPUTED = 3, 16, 4, 32, 20, {0, 2, 6, 11, 16}
torch.manual_seed(0)
blocks = torch.nn.Sequential(torch.nn.Linear(CHANNELS + 1, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH))
project, modulate = torch.nn.Linear(WIDTH, CHANNELS), torch.nn.Linear(1, 2 * WIDTH)  # with `blocks`, a transformer
predictor = FusedKANPredictor(PredictorConfig(feature_dim=WIDTH))  # in earnest: FusedKANPredictor.from_pretrained(...)


def head_at(sigma: torch.Tensor) -> OutputHead:
    scale, shift = modulate(sigma[:, None]).chunk(2, dim=1)
    return OutputHead(project.weight, project.bias, scale, shift)


@torch.no_grad()
def serve(waiting: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Denoises latents `[T, C]`, one more of them in each step as long as there is a free slot."""
    ring = predictor.make_ring(SLOTS, TOKENS)
    latents, step = torch.zeros(SLOTS, TOKENS, CHANNELS), torch.full((SLOTS,), STEPS)
    request, queue, finished = [None] * SLOTS, list(enumerate(waiting)), {}
    while queue or len(finished) < len(waiting):
        free = [slot for slot in range(SLOTS) if step[slot] == STEPS]
        if free and queue:
            ring.reset(free[:1])  # what the request before left is no history
            step[free[0]], (request[free[0]], latents[free[0]]) = 0, queue.pop(0)
        sigma = 1 - step / STEPS  # [SLOTS], each at its own noise level
        velocity = predictor.predict_velocity(ring, sigma, head_at(sigma))
        rows = [slot for slot in range(SLOTS) if int(step[slot]) in COMPUTED]
        if rows:
            levels = sigma[rows, None, None].expand(-1, TOKENS, 1)
            features = blocks(torch.cat([latents[rows], levels], dim=2))
            ring.push(features, sigma[rows], rows=rows)
            velocity[rows] = output_head(features, head_at(sigma[rows]))
        busy = step < STEPS
        latents[busy] -= velocity[busy] / STEPS
        step[busy] += 1
        done = (busy & (step == STEPS)).nonzero().flatten().tolist()
        finished |= {request[slot]: latents[slot].clone() for slot in done}
    return finished


if __name__ == "__main__":
    for number, image in sorted(serve([torch.randn(TOKENS, CHANNELS) for _ in range(5)]).items()):
        print(f"request {number}: mean {image.mean():+.3f}")
