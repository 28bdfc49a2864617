"""How long each operation would take on a GPU: `python benchmarks/static_model.py --out docs/roofline.md`.

Nothing is measured. The kernels are compiled for the GPU, which need not be there, and a model runs what was compiled;
see `gpu_model`. Its times are called "predicted". Beside them are floors: an operation can't be faster than its bytes
over the memory's bandwidth, nor than its FLOPs over the rate of products. Both amounts are those of
`lesa_kernels/work.py`, which the benchmarks use too, and both rates are a datasheet's.
"""

import argparse
import json
import os
from pathlib import Path

from gpu_model.devices import PRESETS
from gpu_model.page import BEFORE, draw, page, predicted_table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="H200", help="the GPU (default: H200)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--figures", type=Path, help="file that --json wrote before, instead of compiling anything")
    parser.add_argument("--out", type=Path, help="page to write; its chart goes beside it")
    options = parser.parse_args(argv)
    device = PRESETS[options.preset]
    if options.figures is not None:
        figures = json.loads(options.figures.read_text())
    else:
        if os.environ.get("TRITON_INTERPRET"):
            parser.error("unset TRITON_INTERPRET: interpreted kernels can't be compiled")
        from gpu_model.kernels import figures as compiled_figures

        figures = compiled_figures(device)
    print("\n".join(predicted_table(figures, BEFORE if options.preset == "H200" else None)))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.out is not None:
        chart = options.out.with_suffix(".png")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(options.preset, figures, chart.name))
        draw(device, figures, chart)
        print(f"wrote {options.out} and {chart}")


if __name__ == "__main__":
    main()
