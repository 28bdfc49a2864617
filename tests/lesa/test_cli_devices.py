"""Which devices a command takes, where there are several GPUs or processes."""

import pytest
import torch

from lesa import cli
from lesa.cli.loading import device_of

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Options:
    device = None


@pytest.fixture
def environment(monkeypatch):
    """`environment(gpus, RANK="1", …)` sets what a process finds."""

    def begin(gpus, **values):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} if values else {}
        for name, value in {**place, **values}.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return begin


@pytest.mark.parametrize(
    "gpus, variables, wanted",
    [
        (0, {"RANK": "1", "WORLD_SIZE": "2"}, "cpu"),
        (4, {}, "cuda"),
        (4, {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}, "cuda:2"),
        (2, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "cuda:1"),
        (1, {"RANK": "1", "WORLD_SIZE": "2"}, "cuda:0"),
        (4, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": None}, "cuda"),  # of a cluster: it works by itself
        (4, {"RANK": "1", "WORLD_SIZE": ""}, "cuda"),
    ],
)
def test_each_process_takes_a_gpu(environment, gpus, variables, wanted):
    environment(gpus, **variables)
    assert device_of(Options) == wanted


def test_a_process_that_does_not_know_its_gpu_takes_none(environment):
    """As `mpirun` starts it."""
    environment(4, RANK="1", WORLD_SIZE="2")
    with pytest.raises(cli.UsageError, match="--device: .* RANK but no LOCAL_RANK, .* which of 4 GPUs .* `torchrun`"):
        device_of(Options)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Of a command that divides a model. The model is not loaded."""
    monkeypatch.setattr("lesa.cli.loading.load_divided", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "model").mkdir()
    options = {"--model": "model", "--inputs": "inputs.jsonl", "--out": "trajectories"}
    return [
        "record",
        *sum(([name, f"{tmp_path}/{path}"] for name, path in options.items()), []),
        "--device-map",
        "auto",
    ]


def test_one_of_several_processes_does_not_take_all_gpus(words, capsys, environment):
    environment(0, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert refused(words, capsys) == (
        "argument --device-map: it is for one process, which takes all GPUs, but several processes were started. "
        "Start the command without `torchrun` and `accelerate launch`, or leave --device-map out."
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_is_not_named_where_all_are_taken(words, capsys, environment, device):
    environment(2)
    message = f"argument --device-map: it takes all GPUs, so it cannot be used with --device {device}. Leave out one"
    assert refused([*words, "--device", device], capsys).startswith(message)


def refused(words, capsys):
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code
    return capsys.readouterr().err.strip().rpartition("error: ")[2]
