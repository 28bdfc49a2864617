"""The weight that a KAN layer keeps for its Triton kernels: when it is made, and when it is made anew."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lesa_kernels.bspline_kan import BSplineKAN, packing

pytest.importorskip("lesa_kernels.bspline_kan.kernels")


@pytest.fixture
def made(monkeypatch):
    """The dtypes in which a weight was packed, in order."""
    dtypes, pack = [], packing.pack_weight

    def watched(*args):
        dtypes.append(args[-1])
        return pack(*args)

    monkeypatch.setattr(packing, "pack_weight", watched)
    return dtypes


@pytest.fixture
def layer(kernel_device):
    torch.manual_seed(0)
    return BSplineKAN(3, 2, backend="triton").to(kernel_device).eval().requires_grad_(False)


@pytest.fixture
def x(kernel_device):
    return torch.linspace(-1.5, 1.5, 12).view(4, 3).to(kernel_device)


def check(layer, x):
    """One call, compared with plain torch on the present parameters."""
    y = layer(x)
    plain = copy.deepcopy(layer)
    plain.backend = "torch"
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
    return y


def test_is_made_once(layer, x, made):
    assert torch.equal(check(layer, x), check(layer, 1 * x))
    assert made == [torch.float32]


@pytest.mark.parametrize("name", ["base_weight", "spline_weight", "spline_scaler"])
def test_follows_a_change_in_place(layer, x, made, name):
    before = check(layer, x)
    with torch.no_grad():
        getattr(layer, name).mul_(2)
    assert not torch.equal(check(layer, x), before)
    assert len(made) == 2


def test_follows_other_parameters(layer, x, made):
    check(layer, x)
    layer.base_weight = nn.Parameter(layer.base_weight + 1, requires_grad=False)
    check(layer, x)
    for number in range(3):  # memory that is freed and taken again
        layer.spline_weight.data = torch.full_like(layer.spline_weight, number)
        check(layer, x)
    assert len(made) == 5


@pytest.mark.parametrize("assign", [False, True])
def test_follows_a_loaded_state_dict(layer, x, made, assign):
    check(layer, x)
    other = BSplineKAN(3, 2).to(x.device)
    layer.load_state_dict(other.state_dict(), assign=assign)
    check(layer, x)
    assert len(made) == 2


def test_follows_the_dtype(layer, x, made):
    check(layer, x)
    layer.to(torch.float16)
    layer(x.half())
    layer.float()
    check(layer, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    check(layer, x)
    assert made == [torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float32]


def test_follows_the_layer_to_another_device(layer, x):
    layer(x)
    layer.to("meta").to_empty(device=x.device)
    nn.init.zeros_(layer.base_weight), nn.init.zeros_(layer.spline_weight), nn.init.ones_(layer.spline_scaler)
    assert (layer(x) == 0).all()


def test_training_mode_keeps_nothing(layer, x, made):
    check(layer, x)
    layer.train()
    layer.base_weight.data.mul_(2)  # which autograd does not count
    check(layer, x)
    check(layer, x)
    layer.eval()
    check(layer, x)
    assert len(made) == 2  # the calls in training mode pack by another name


def test_gradients_of_the_parameters_are_never_cut_off(layer, x, made):
    layer.requires_grad_()
    for _ in range(2):
        (grad,) = torch.autograd.grad(layer(x).sum(), layer.spline_scaler)
        assert grad.abs().sum() > 0
    assert len(made) == 2
    with torch.no_grad():
        layer(x), layer(x)
    assert len(made) == 3
    torch.autograd.grad(layer(x).sum(), layer.spline_scaler)


def test_gradients_of_the_input_after_inference_mode(layer, x, made):
    with torch.inference_mode():
        layer(x)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    assert grad.abs().sum() > 0 and len(made) == 1


def test_inference_tensors_are_packed_in_each_call(x, made):
    with torch.inference_mode():
        layer = BSplineKAN(3, 2, backend="triton", device=x.device).eval()
        check(layer, x)
        layer.base_weight.mul_(2)
        check(layer, x)
    assert len(made) == 2


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_follow_their_own_parameters(layer, x, copied):
    y = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), y)
    other.base_weight = nn.Parameter(other.base_weight + 1, requires_grad=False)
    assert not torch.equal(check(other, x), y)
    assert torch.equal(check(layer, x), y)


def test_is_not_saved(layer, x):
    def size():
        file = io.BytesIO()
        torch.save(layer, file)
        return file.tell()

    before = size()
    layer(x)
    assert abs(size() - before) < 64 and set(layer.state_dict()) == set(BSplineKAN(3, 2).state_dict())
    state = layer.__getstate__()
    del state["_packed_weight"]  # as in a layer that was pickled before
    old = BSplineKAN.__new__(BSplineKAN)
    old.__setstate__(state)
    assert torch.equal(old(x), layer(x))


def test_a_compiled_layer_follows_its_parameters(layer, x, made):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer(x)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        layer.spline_weight.mul_(2)
    torch.testing.assert_close(compiled(x), check(layer, x))


def test_functional_calls_use_what_they_are_given(layer, x, made):
    y = layer(x)
    doubled = {name: 2 * value for name, value in layer.named_parameters()}
    expected = torch.func.functional_call(layer, doubled | {"spline_scaler": layer.spline_scaler}, (x,))
    torch.testing.assert_close(expected, 2 * y)
    assert torch.equal(layer(x), y)


def test_a_graph_that_is_captured_packs_its_own(layer, x, made, monkeypatch):
    check(layer, x)
    weights = layer.base_weight, layer.spline_weight, layer.spline_scaler
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept = layer._packed_weight.get(*weights, torch.float32)
    assert x.is_cuda or len(made) == 1  # a CPU has no graphs

    class OnGpu(torch.Tensor):
        is_cuda = True

    fakes = [weight.as_subclass(OnGpu) for weight in weights]
    assert layer._packed_weight.get(*fakes, torch.float32) is not kept
    assert len(made) == 2


@pytest.mark.gpu
def test_a_replayed_graph_follows_the_parameters(layer, x):
    layer(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    with torch.no_grad():
        layer.spline_weight.mul_(2)
    graph.replay()
    assert torch.equal(y, check(layer, x))
