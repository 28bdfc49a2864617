"""A ControlNet's deferred residuals, and when its calls are deferred."""

import pytest
import torch

from lesa.cache.controlnet import DeferredControl, Residuals, ResidualsByBlock, computed


class ControlNet(torch.nn.Module):
    """Gives two lists, the second of which may be None."""

    def __init__(self, singles=True):
        super().__init__()
        self.calls, self.singles = [], singles

    def forward(self, x, return_dict=True):
        self.calls.append(x)
        lists = [x, x + 1], [x + 2] if self.singles else None
        return dict(zip(("blocks", "singles"), lists)) if return_dict else lists


@pytest.fixture
def awaited():
    """What the cached pipeline says: whether its transformer waits for a call."""
    return [True]


@pytest.fixture(params=[True, False])
def net(request, awaited):
    net = ControlNet(request.param)
    control, is_awaited = DeferredControl.of(net, 2), lambda: awaited[0]
    control.join(is_awaited)
    yield net
    control.leave(is_awaited)
    assert {"_compiled_call_impl", "compile"}.isdisjoint(vars(net))


def test_residuals_are_a_list_that_is_computed_once_and_when_it_is_looked_at(net):
    net(torch.zeros(1), return_dict=False)  # the first call shows which of the lists are None
    blocks, singles = net(torch.ones(1), return_dict=False)
    assert len(net.calls) == 1 and isinstance(blocks, Residuals)
    assert len(blocks) == 2 and blocks[1].item() == 2 and [r.item() for r in blocks] == [1, 2]
    assert (singles is None) == (not net.singles)
    assert computed({"blocks": blocks, "singles": singles, "other": 3}) == {
        "blocks": [net.calls[1], net.calls[1] + 1],
        "singles": [net.calls[1] + 2] if net.singles else None,
        "other": 3,
    }
    assert len(net.calls) == 2


def test_residuals_go_where_a_list_of_tensors_goes(net):
    net(torch.zeros(1), return_dict=False)
    blocks, _ = net(torch.ones(1), return_dict=False)
    assert len(net.calls) == 1
    assert torch.stack(list(blocks)).tolist() == [[1], [2]] and [0.5 * each for each in blocks] == [0.5, 1]


@pytest.mark.parametrize("kind", [list, tuple])
def test_residuals_that_the_pipeline_converts_are_deferred_each(kind, control):
    """Like Sana's pipeline, whose ControlNet gives one list."""

    class One(ControlNet):
        def forward(self, x, return_dict=True):
            self.calls.append(x)
            return ([x, x + 1],)

    net = One()
    control(net, 1, lambda: True, converts=True)
    net(torch.zeros(1), return_dict=False)
    (blocks,) = net(torch.ones(1), return_dict=False)
    converted = kind(each.to(dtype=torch.float64) for each in blocks)
    assert len(net.calls) == 1 and len(blocks) == 2
    made = computed({"blocks": converted, "both": kind([blocks])})
    assert type(made["blocks"]) is kind and [*made["blocks"]] == [1, 2] and made["both"] == kind([[1, 2]])
    assert {each.dtype for each in made["blocks"]} == {torch.float64} and blocks[1] == 2 and len(net.calls) == 2


def test_calls_that_nobody_waits_for_are_made_at_once(net, awaited):
    net(torch.zeros(1), return_dict=False)
    awaited[0] = False
    blocks, _ = net(torch.ones(1), return_dict=False)
    assert type(blocks) is list and len(net.calls) == 2
    awaited[0] = True
    assert type(net(torch.ones(1))) is dict and len(net.calls) == 3  # an output object


def test_a_call_that_fails_fails_when_it_is_looked_at(net):
    net(torch.zeros(1), return_dict=False)
    blocks, _ = net(None, return_dict=False)
    for _ in range(2):
        with pytest.raises(TypeError):
            blocks[0]


@pytest.fixture
def control():
    """`control(net, outputs, *awaited)` puts a gate on a ControlNet until the test ends."""
    joined = []

    def join(net, outputs, *awaited, **options):
        for waits in awaited:
            joined.append((DeferredControl.of(net, outputs, **options), waits))
            joined[-1][0].join(waits)
        return joined[-len(awaited) :]

    yield join
    for gate, waits in joined:
        gate.leave(waits)


@pytest.mark.parametrize("is_none", [False, True])
def test_a_list_that_is_in_no_tuple(control, is_none):
    """Like Qwen-Image's ControlNets."""

    class Bare(torch.nn.Module):
        calls = 0

        def forward(self, x, return_dict=True):
            self.calls += 1
            return None if is_none else [x, x + 1]

    net = Bare()
    control(net, 0, lambda: True)
    first, second = net(torch.zeros(1), return_dict=False), net(torch.ones(1), return_dict=False)
    assert net.calls == 1
    if is_none:
        assert first is second is None
    else:
        assert type(first) is list and isinstance(second, Residuals)
        assert [r.item() for r in second] == [1, 2] and len(second) == 2
        assert net.calls == 2


def test_a_dict_of_a_controlnet_that_gives_nothing_else(control):
    """Like Z-Image's ControlNets."""

    class ByBlock(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return {0: x, 4: x + 1}

    net = ByBlock()
    control(net, 0, lambda: True)
    first, second = net(torch.zeros(1)), net(torch.ones(1))
    assert net.calls == 1 and type(first) is dict and isinstance(second, ResidualsByBlock)
    assert 4 in second and 3 not in second and second[4].item() == 2 and [*second] == [0, 4] and len(second) == 2
    assert computed({"blocks": second}) == {"blocks": {0: second[0], 4: second[4]}} and net.calls == 2


@pytest.mark.parametrize("waiting", [(True, False), (False, True), (True, True), (False, False)])
def test_a_controlnet_of_two_waits_while_either_does(control, waiting):
    net = ControlNet()
    gates = control(net, 2, *(lambda waits=waits: waits for waits in waiting))
    assert gates[0][0] is gates[1][0]
    net(torch.zeros(1), return_dict=False)
    blocks, singles = net(torch.ones(1), return_dict=False)
    assert isinstance(blocks, Residuals) == isinstance(singles, Residuals) == any(waiting)
    assert len(net.calls) == 2 - any(waiting)
    assert [r.item() for r in singles] == [3] and [r.item() for r in blocks] == [1, 2]


def test_what_was_compiled_before_is_there_again(control):
    net, waits = ControlNet(), lambda: True
    called = []
    net._compiled_call_impl = lambda *args, **kwargs: (called.append(args), net._call_impl(*args, **kwargs))[1]
    own = net._compiled_call_impl
    gate = DeferredControl.of(net, 2)
    gate.join(waits)
    net(torch.zeros(1), return_dict=False)
    assert len(called) == 1
    gate.leave(waits)
    gate.leave(waits)  # as where a cache cannot be put on: there is nothing to undo
    assert net._compiled_call_impl is own and "compile" not in vars(net)
