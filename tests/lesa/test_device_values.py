"""Numbers that come from a device: where they are put, and when a place is used again. A stand-in plays the GPU."""

import itertools
from collections import namedtuple

import pytest
import torch

from lesa.cache import device_values
from lesa.cache.device_values import SLOTS, DeviceValues

GPUS = [torch.device("cuda", index) for index in (0, 1)]


class Event:
    """Like CUDA's: of the GPU that it is first recorded on."""

    device = None
    done = False

    def record(self, stream):
        assert self.device in (None, stream.device), "an event is of one device"
        self.device, self.done = stream.device, False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


class Value:
    """A number on a GPU."""

    is_cuda = True

    def __init__(self, number, device=GPUS[0]):
        self.number, self.device = number, device

    def detach(self):
        return self

    def reshape(self, size):
        return torch.full((size,), float(self.number))


@pytest.fixture
def gpu(monkeypatch):
    """How often memory was pinned, and all events that were made, in their order."""
    seen = namedtuple("Seen", "pinned events")([], [])
    empty = torch.empty

    def counted(*args, pin_memory=False, **options):
        if pin_memory:
            seen.pinned.append(args)
        return empty(*args, **options).fill_(float("nan"))

    def event():
        seen.events.append(Event())
        return seen.events[-1]

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", namedtuple("Stream", "device"))
    return seen


def test_memory_is_pinned_once_however_many_values_are_asked_for(gpu):
    values, got = DeviceValues(), []
    for number in range(5 * SLOTS):
        values.ask(Value(number), got.append)
        if number % 3 == 2:  # as at a computed step
            values.read(wait=True)
    values.read(wait=True)
    assert got == list(range(5 * SLOTS))
    assert gpu.pinned == [(SLOTS,)] and len(gpu.events) == SLOTS


def test_a_place_is_not_used_again_before_it_was_read(gpu):
    values, got = DeviceValues(), []
    for number in range(SLOTS + 1):  # one more than there are places
        values.ask(Value(number), got.append)
    values.read()
    assert got == [] and len(gpu.pinned) == 2
    for event in gpu.events:
        event.done = True
    values.read()
    assert got == list(range(SLOTS + 1))


def test_a_place_whose_value_is_dropped_is_not_used_again(gpu):
    """Its copy may arrive after that of a later value."""
    values, got = DeviceValues(), []
    values.ask(Value(1), got.append)
    ((*_, dropped, _),) = values._pending
    values.clear()
    for number in range(SLOTS):
        values.ask(Value(number), got.append)
    assert not any(copy.data_ptr() == dropped.data_ptr() for *_, copy, _ in values._pending)
    values.read(wait=True)
    assert got == list(range(SLOTS))


def test_each_gpu_has_events_of_its_own(gpu):
    values, got = DeviceValues(), []
    for number, device in zip(range(40), itertools.cycle(GPUS)):
        values.ask(Value(number, device), got.append)
        values.read(wait=number % 4 == 3)
    assert got == list(range(40)) and len(gpu.pinned) == 2


def test_a_receiver_may_ask_again_and_may_drop_the_rest(gpu):
    values, got = DeviceValues(), []

    def receive(number):
        got.append(number)
        if number == 0:
            values.ask(Value(7), got.append)
        if number == 7:
            values.clear()

    values.ask(Value(0), receive)
    values.read(wait=True)
    assert got == [0, 7]
    values.ask(Value(7), receive)
    values.ask(Value(8), receive)
    values.read(wait=True)
    assert got == [0, 7, 7]


def test_a_run_that_waits_has_each_value_at_once(gpu):
    values, got = DeviceValues(waits=True), []
    for number in range(SLOTS + 2):
        values.ask(Value(number), got.append)
        assert got[-1] == number
    assert len(gpu.pinned) == 1


def test_a_value_on_the_cpu_needs_no_place(gpu):
    got = []
    DeviceValues().ask(torch.tensor([3.0]), got.append)
    assert got == [3.0] and gpu.pinned == []


def test_places_are_the_devices_own_numbers(gpu):
    """What the stand-in copies is what the event stands for."""
    copy, event = device_values.copy_to_host(Value(5), device_values.PinnedSlots())
    assert copy.tolist() == [5.0] and event.device == GPUS[0]
