"""What is said of a pipeline that differs from the one that its predictors were made for."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lesa.cache.reasons import MADE_FOR_OTHER
from lesa.cache.sites import Site, adapters_on
from lesa.provenance import differences, knows_adapters
from lesa_kernels import FusedKANPredictor


class MadeFor:
    """Compares a pipeline with what its predictors were made for.

    Args:
        pipe: the pipeline.
        sites: its transformers.
        predictors: by the names of the transformers.
    """

    def __init__(self, pipe: Any, sites: Sequence[Site], predictors: Mapping[str, FusedKANPredictor]):
        self._pipe, self._sites, self._predictors = pipe, sites, predictors
        self._differences: list[str] = []  # one line, or none
        self._known_adapters: Collection[str] = ()  # those that the predictors know, or that a difference names

    def compare(self) -> list[str]:
        """Says how the pipeline as it is now differs. A predictor that does not know what it is for is left out."""
        said: dict[str, None] = {}
        for predictor in {id(each): each for each in self._predictors.values()}.values():
            if predictor.provenance is not None:
                sites = [site for site in self._sites if self._predictors[site.name] is predictor]
                models = {site.name: site.adapter.transformer for site in sites}
                said |= dict.fromkeys(differences(predictor.provenance, self._pipe, models))
        self._differences = [f"{MADE_FOR_OTHER}: {'; '.join(said)}"] if said else []
        if all(knows_adapters(each.provenance) for each in self._predictors.values()):
            self._known_adapters = adapters_on(self._pipe, self._sites)
        return self._differences

    def remarks(self) -> list[str]:
        """What to say when a run begins: what `compare` found, and which adapters were turned on since then."""
        said = [*self._differences]
        if names := [name for name in adapters_on(self._pipe, self._sites) if name not in self._known_adapters]:
            said.append(
                f"the adapters {', '.join(names)} are on: unless the predictor was trained with them, its forecasts "
                "are less close"
            )
        return said
