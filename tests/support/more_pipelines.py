"""Small pipelines of the families beside the four of `small_pipelines`: a file for each family, collected here."""

from importlib import import_module

from small_pipelines import Small

_FILES: dict[str, str] = {
    "flux2": "small_flux2",
    "hunyuan-video-1.5": "small_hunyuan_video15",
    "hunyuan-image": "small_hunyuan_image",
    "sd3": "small_sd3_others",
    "chroma": "small_chroma",
    "bria": "small_bria",
    "bria-fibo": "small_bria_fibo",
    "ovis-image": "small_ovis_image",
    "longcat-image": "small_longcat_image",
}
"""For each family, the file beside this one that has its `CASES`."""

QUICK: set[str] = {
    "flux2 klein cfg",
    "hunyuan 1.5 cfg",
    "hunyuan image cfg",
    "chroma cfg",
    "bria cfg",
    "fibo cfg",
    "ovis cfg",
    "longcat cfg",
}
"""The cases that are no slow tests: one for each family, the cheapest."""

NOT_FUSED: dict[str, str] = {}
"""Cases whose output head runs in the model's own modules, and why."""

PROBED: dict[str, tuple[str, ...]] = {}
"""Transformers without an adapter that the probe was tried on, and the pipeline classes that were run."""

REFUSED: dict[str, str] = {}
"""Transformers that neither an adapter nor the probe can do, and why."""

FAMILIES: dict[str, dict[str, Small]] = {family: import_module(file).CASES for family, file in _FILES.items()}
"""For each family, the ways to run its pipelines."""

ALL = {name: case for cases in FAMILIES.values() for name, case in cases.items()}
