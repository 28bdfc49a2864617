"""Writes the table in `docs/models.md` from the installed diffusers: `python docs/models_table.py`.

With another version of diffusers than that of the table, it names the classes that the table lacks, and writes nothing
unless it gets `--write`.
"""

import contextlib
import inspect
import re
import sys
from pathlib import Path

import diffusers

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

NO_DENOISERS = {
    "DreamLiteTransformer2DModel": "a part of U-Nets",
    "MiniMaxMusic3RVQDepthDecoder": "it predicts tokens",
    "PriorTransformer": "it predicts embeddings, in a few steps",
    "T5FilmDecoder": "it predicts spectrograms",
    "Transformer2DModel": "a part of U-Nets",
    "TransformerTemporalModel": "a part of U-Nets",
}
"""Classes that no cache of denoising steps is for, and why."""


def classes_of(base: type, where: str = "") -> dict[str, type]:
    """The public classes of diffusers that inherit from `base`, by name."""
    found = {}
    for name in dir(diffusers):
        with contextlib.suppress(Exception):  # a class whose optional packages are absent
            kind = getattr(diffusers, name)
            if inspect.isclass(kind) and issubclass(kind, base) and kind.__module__.startswith(where):
                found[name] = kind
    return found


def transformers() -> dict[str, type]:
    """The classes of transformers."""
    return classes_of(diffusers.ModelMixin, "diffusers.models.transformers.")


def pipelines_of(kinds: dict[str, type]) -> dict[str, list[str]]:
    """For each class of transformers, the classes of pipelines that take it."""
    taken: dict[str, list[str]] = {name: [] for name in kinds}
    for name, pipeline in classes_of(diffusers.DiffusionPipeline).items():
        parameter = inspect.signature(pipeline.__init__).parameters.get("transformer")
        for kind in set(re.findall(r"\w+", "" if parameter is None else str(parameter.annotation))) & {*kinds}:
            taken[kind].append(name)
    return taken


def table() -> str:
    """The table as Markdown."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import more_pipelines
    import small_pipelines
    from lesa.models import ADAPTERS

    families = {name: adapter for adapter in ADAPTERS for name in adapter.transformer_classes}
    cases = [*small_pipelines.ALL.items(), *more_pipelines.ALL.items()]
    tested = {case.pipeline for _, case in cases}
    kinds = transformers()
    lines = [
        f"Made with diffusers {diffusers.__version__}.",
        "",
        "| transformer | support | output head | pipelines that the tests run | others |",
        "|---|---|---|---|---|",
    ]
    for name, pipelines in pipelines_of(kinds).items():
        if name in families:
            family = families[name].family
            modules = [
                more_pipelines.NOT_FUSED[n]
                for n in more_pipelines.FAMILIES.get(family, ())
                if n in more_pipelines.NOT_FUSED
            ]
            support, head = (
                f"adapter `{family}`",
                "fused" if not modules else f"fused, but: {'; '.join(dict.fromkeys(modules))}",
            )
        elif name in NO_DENOISERS:
            support, head = f"none: {NO_DENOISERS[name]}", ""
        elif name in more_pipelines.PROBED:
            support, head = "probe", "the model's own modules"
        else:
            untested = "probe, not tested" if pipelines else "probe, not tested; only modular pipelines take it"
            refused = more_pipelines.REFUSED.get(name)
            support, head = (untested if refused is None else f"none: {refused}", "")
        run = [
            pipeline for pipeline in pipelines if pipeline in tested or pipeline in more_pipelines.PROBED.get(name, ())
        ]
        others = [pipeline for pipeline in pipelines if pipeline not in run]
        lines.append(f"| {name} | {support} | {head} | {_listed(run)} | {_listed(others)} |")
    count = len({case.pipeline for _, case in cases} | {p for run in more_pipelines.PROBED.values() for p in run})
    lines += ["", f"{len(ADAPTERS)} adapters; {count} classes of pipelines are run by the tests."]
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(name.removesuffix("Pipeline") for name in names)


def version(page: str) -> str:
    """The version of diffusers that the page names."""
    return re.findall(r"^Made with diffusers (\S+)\.$", page, re.MULTILINE)[0]


def with_table(page: str, made: str) -> str:
    """The page with another table."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + made + END + rest.split(END)[1]


def missing(page: str) -> list[str]:
    """The installed transformers that the page does not have."""
    return [name for name in transformers() if not re.search(rf"^\| {name} \|", page, re.MULTILINE)]


def main() -> None:
    """The command."""
    page = PAGE.read_text(encoding="utf-8")
    if version(page) != diffusers.__version__ and "--write" not in sys.argv:
        print(f"The table is of diffusers {version(page)}, installed is {diffusers.__version__}.")
        print("It lacks:", ", ".join(missing(page)) or "nothing")
        return
    PAGE.write_text(with_table(page, table()), encoding="utf-8")


if __name__ == "__main__":
    main()
