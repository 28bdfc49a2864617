"""Nothing here uses what the oldest supported releases lack: torch 2.11 and Triton 3.6.

Nor does an adapter import what an older diffusers may lack.
"""

import ast
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lesa_kernels", "python/lesa", "benchmarks", "examples")

# What the modules of torch 2.13 and Triton 3.9 have beyond those of torch 2.11 and Triton 3.6, found by comparing them.
NEWER = {
    "torch.Tensor": {"const_data_ptr"},
    "torch.accelerator": {"Graph", "empty_host_cache", "graphs"},
    "torch.autograd": {"enforce_grad_layout_policy"},
    "torch.autograd.graph": {"region_activation_memory_budget", "set_override_stale_capture_stream"},
    "torch.backends": {"python_native"},
    "torch.backends.cuda": {"blas_workspace_size", "cublas_workspace_size", "cublaslt_workspace_size"},
    "torch.compiler": {"CacheInfo", "get_default_backend", "set_default_backend"},
    "torch.cuda": {"caching_allocator_disabled", "current_solver_handle", "platform"},
    "torch.cuda.CUDAGraph": {"get_graph_data"},
    "torch.distributed": {"all_gather_single", "record_comm", "reduce_scatter_single"},
    "torch.func": {"rearrange"},
    "torch.nn": {"LinearCrossEntropyLoss", "LinearCrossEntropyOptions"},
    "torch.nn.functional": {"linear_cross_entropy"},
    "torch.optim": {"swap_in_optimizer_params_and_state"},
    "torch.random": {"thread_safe_generator"},
    "triton": {"aggregate"},
    "triton.compiler": {"max_shared_mem"},
    "triton.knobs.compilation": {"fpsan_homomorphic_casts"},
    "triton.knobs.runtime": {"kernel_unload_hook"},
    "triton.language": {
        *("aggregate_replace", "atomic_load", "atomic_poll", "atomic_store", "expect_zero"),
        *("squeeze", "to_tensor", "unsqueeze"),
    },
    "triton.testing": {"cuda_graph_without_gc", "do_bench_cudagraph_proton", "do_bench_proton"},
}
# Arguments that a function has there only; of a kernel's launch, by any name.
NEWER_ARGUMENTS = {
    "torch.compile": {"name", "recompile_limit", "isolate_recompiles", "shapes_spec"},
    "torch.cuda.graph": {"enable_annotations", "check_input_liveness"},
    "torch.library.infer_schema": {"tags"},
    "triton.language.cat": {"dim"},
    "triton.language.cumprod": {"dtype"},
    "triton.language.fdiv": {"approx"},
    "triton.language.topk": {"descending"},
    "triton.tools.tensor_descriptor.TensorDescriptor": {"round_f32_to_tf32"},
}
LAUNCH_ARGUMENTS = {"clc", "fpsan_homomorphic_casts", "min_shared_mem", "sched4reg"}
METHODS = NEWER["torch.Tensor"] | NEWER["torch.cuda.CUDAGraph"]  # of objects whose class a reader of the code can't see


def dotted(node, names):
    """The full name of an expression such as `tl.load`, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def imported_names(tree):
    """What the names stand for that a file imports from torch and Triton."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                top = each.name.partition(".")[0]
                names[each.asname or top] = each.name if each.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return {name: full for name, full in names.items() if full.partition(".")[0] in ("torch", "triton")}


def too_new(source):
    """What a file uses that the oldest releases don't have."""
    tree, found = ast.parse(source), set()
    names = imported_names(tree)
    used = set(names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(dotted(node, names))
            if node.attr in METHODS:
                found.add(f".{node.attr}")
        elif isinstance(node, ast.Call):
            given = {keyword.arg for keyword in node.keywords}
            function = dotted(node.func, names)
            found |= {f"{function}({each}=)" for each in given & NEWER_ARGUMENTS.get(function, set())}
            if isinstance(node.func, ast.Subscript):  # kernel[grid](...)
                found |= {f"kernel[grid]({each}=)" for each in given & LAUNCH_ARGUMENTS}
    return found | {f"{module}.{name}" for module, names in NEWER.items() for name in names} & used


def test_nothing_newer_is_used():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    assert {str(file.relative_to(ROOT)): found for file in files if (found := too_new(file.read_text()))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.accelerator.Graph()", "torch.accelerator.Graph"),
        ("from torch.nn import functional as F\nF.linear_cross_entropy(x)", "torch.nn.functional.linear_cross_entropy"),
        ("import triton.language as tl\ny = tl.unsqueeze(x, 0)", "triton.language.unsqueeze"),
        ("from triton.language import atomic_poll", "triton.language.atomic_poll"),
        (
            "import torch.cuda as c\nwith c.graph(g, check_input_liveness=True): pass",
            "torch.cuda.graph(check_input_liveness=)",
        ),
        ("tensor.const_data_ptr()", ".const_data_ptr"),
        ("_kernel[grid](x, min_shared_mem=1)", "kernel[grid](min_shared_mem=)"),
        ("import torch\ntorch.compile(f, dynamic=False)\nx.unsqueeze(0)", None),
    ],
)
def test_it_would_be_found(source, found):
    assert too_new(source) == ({found} if found else set())


HEAVY = ("diffusers.pipelines", "diffusers.models.transformers", "diffusers.models.autoencoders")


def imported_at_once(source):
    """The modules of diffusers, and the names of its pipelines and transformers, that a file needs to be imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names if each.name.startswith(HEAVY)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{each.name}" for each in node.names}
            found |= {name for name in names if name.startswith(HEAVY)}
            if node.module == "diffusers":
                found |= {name for name in names if name.endswith(("Pipeline", "Model"))}
    return found


def test_adapters_import_no_models_and_no_pipelines():
    files = sorted((ROOT / "python/lesa/models").glob("*.py"))
    assert len(files) > 30
    assert {file.name: found for file in files if (found := imported_at_once(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from diffusers import FluxPipeline",
        "from diffusers import FluxTransformer2DModel",
        "import diffusers.models.transformers.transformer_flux",
        "from diffusers.models.transformers import transformer_flux",
        "from diffusers.pipelines.flux.pipeline_flux import FluxPipeline",
    ],
)
def test_such_an_import_would_be_found(source):
    assert imported_at_once(source)
    assert not imported_at_once(f"def f():\n    {source}")


@pytest.mark.skipif(torch.__version__ < "2.13", reason="these releases lack the names")
def test_the_names_exist_in_newer_releases():
    pytest.importorskip("triton", minversion="3.9")
    for module, names in NEWER.items():
        try:
            owner = importlib.import_module(module)
        except ImportError:
            parent, _, name = module.rpartition(".")
            owner = getattr(importlib.import_module(parent), name)
        assert names <= set(dir(owner)), module
