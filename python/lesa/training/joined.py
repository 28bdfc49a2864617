"""Several recordings that continue one another, as one."""

from collections.abc import Sequence

from lesa.artifacts import check_same_settings, digest
from lesa.training.batches import RollOut
from lesa.training.refinement import RollOuts
from lesa.training.trajectories import Recorded, Trajectories
from lesa_kernels.checks import Said, argument_error

_OF_A_PART = ("samples", "seed", "inputs_digest", "arguments")
"""The entries of a manifest that differ between the parts of one recording."""


class JoinedTrajectories(Trajectories):
    """Trajectories of several recordings, in their order. `train` and `refine` take them like those of one recording.

    The manifest is that of one recording of all samples. The attribute `folder` is that of the first part.

    Args:
        parts: the recordings. Each begins with the seed that follows the last one of the part before.
        inputs: those of all parts, in order: dicts of pipeline arguments.

    Attributes:
        parts: the recordings.

    Raises:
        ValueError: a part was made under other conditions than the first, does not continue the one before, or there
            are more or fewer inputs than samples.
    """

    def __init__(self, parts: Sequence[Trajectories], inputs: Sequence[dict]):
        first = parts[0]
        of_all = {name: value for name, value in first.manifest.items() if name not in _OF_A_PART}
        samples = 0
        for part in parts:
            check_same_settings(
                f"the recording in {first.folder}", of_all, {name: part.manifest[name] for name in of_all}
            )
            wanted = first.manifest["seed"] + samples
            if part.manifest["seed"] != wanted:
                must, remedy = (
                    f"continue one another: the next seed is {wanted}",
                    "Pass them in the order of their seeds.",
                )
                raise argument_error("parts", must, Said(f"{part.folder} with {part.manifest['seed']}"), remedy)
            samples += part.manifest["samples"]
        if len(inputs) != samples:
            remedy = "Pass the inputs of all parts."
            raise argument_error("inputs", f"be one for each of the {samples} samples", Said(f"{len(inputs)}"), remedy)
        names = sorted({name for item in inputs for name in item})
        self.parts, self.folder = tuple(parts), first.folder
        self.manifest = {
            **first.manifest,
            "samples": samples,
            "inputs_digest": digest(list(inputs)),
            "arguments": {name: digest([item.get(name) for item in inputs]) for name in names},
        }
        self.family, self.feature_dim = first.family, first.feature_dim
        self.num_inference_steps, self.projections = first.num_inference_steps, first.projections
        self.head_eps, self.head_norm = first.head_eps, first.head_norm
        self.head_weight, self.head_bias = first.head_weight, first.head_bias
        self._files = [file for part in parts for file in part._files]
        self._verified, self._sigmas = set().union(*(part._verified for part in parts)), {}
        self.names, self.samples, before = [], [], 0
        for part in parts:
            for stream, sample in zip(part.streams, part.samples):
                self.samples.append(before + sample)
                self.names.append(f"sample-{before + sample:05d}{'' if stream is None else f'-{stream}'}")
            before += part.manifest["samples"]
        self.recorded = Recorded(tuple(range(samples)), (), ())


class JoinedRollOuts:
    """Roll-outs of one predictor on the parts of joined trajectories.

    Args:
        parts: the roll-outs on each part, in the order of the parts.

    Attributes:
        predictor: see `RollOuts`.
    """

    def __init__(self, parts: Sequence[RollOuts]):
        self.predictor = parts[0].predictor
        self._places = [(part, number) for part in parts for number in range(len(part.recorded))]

    def of(self, number: int) -> RollOut:
        """The roll-out beside the trajectory of this number."""
        part, within = self._places[number]
        return part.of(within)
