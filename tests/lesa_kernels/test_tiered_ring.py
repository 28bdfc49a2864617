"""Rings with their oldest features in host memory: the same bytes as one that is all on the device."""

import copy
import random
import warnings

import pytest
import torch

from lesa_kernels import FeatureRing, FusedKANPredictor, OutputHead, PredictorConfig, TieredRing, dispatch, make_ring
from lesa_kernels.feature_ring import ring_nbytes, shared_budget, tiered

BATCH, TOKENS, DIM = 3, 40, 24
STORED = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
# Shares of the whole ring's bytes: they leave one, two and three of four features on the device.
SHARES = {"one": 0.45, "two": 0.65, "three": 0.9}


class LateCopies:
    """Stands for the stream of copies: each is made as late as the ring's waits allow, as on a busy GPU."""

    def __init__(self, device):
        self.pending, self.ready = [], {}

    def uses(self, *buffers):
        pass

    def begin(self):
        pass  # the work that copies wait for is done at once here

    def copy(self, target, source):
        self.pending.append((target, source))

    def end(self, place=None):
        if place is None:
            self._copy_up_to(len(self.pending))
        else:
            self.ready[place] = self.pending[-1] if self.pending else None

    def wait_for(self, place):
        last = self.ready[place]
        at = [i for i, copies in enumerate(self.pending) if copies is last]
        self._copy_up_to(at[0] + 1 if at else 0)

    def _copy_up_to(self, count):
        for target, source in self.pending[:count]:
            target.copy_(source)
        del self.pending[:count]

    def synchronise(self):
        self._copy_up_to(len(self.pending))


@pytest.fixture(params=["at once", "late"])
def copies(request, monkeypatch):
    if request.param == "late":
        monkeypatch.setattr(tiered, "_CopyStream", LateCopies)


def make_both(dtype=torch.float32, share=0.65, capacity=4, **sizes):
    sizes = {"batch": BATCH, "tokens": TOKENS, "dim": DIM} | sizes
    budget = int(ring_nbytes(capacity, *sizes.values(), dtype) * share)
    ring = make_ring(capacity, **sizes, dtype=dtype, max_device_bytes=budget)
    assert isinstance(ring, TieredRing) and ring.device_nbytes <= budget
    return ring, FeatureRing(capacity, **sizes, dtype=dtype)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype and torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(actual.isnan(), expected.isnan())


def assert_equal_rings(ring, plain):
    for actual, expected in zip(ring.newest_first(), plain.newest_first()):
        assert_same(actual, expected)
    assert_same(ring.gather(1), plain.gather(1))


def random_push(rng, rings, values=None):
    """Pushes the same into all rings: into some rows, at levels below, at or above the newest one, or NaN."""
    plain = rings[-1]
    rows = rng.choice((None, rng.sample(range(plain.batch), rng.randint(0, plain.batch))))
    listed = range(plain.batch) if rows is None else rows
    levels = []
    for row in listed:
        newest = float(plain.sigmas[int(plain.cursor[row]) - 1, row])
        levels.append(rng.choice((newest * 0.9, newest * 0.9, newest * 0.9, newest, newest + 0.5, float("nan"))))
    features = torch.randn(len(listed), plain.tokens, plain.dim)
    for ring in rings:
        ring.push(features, torch.tensor(levels), rows)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_equals_the_ring_on_the_device_after_any_pushes(copies, dtype, share):
    torch.manual_seed(0)
    rng = random.Random(0)
    ring, plain = make_both(dtype, SHARES[share])
    assert ring.resident == list(SHARES).index(share) + 1
    for step in range(30):
        random_push(rng, (ring, plain))
        if step % 9 == 8:
            rows = rng.choice((None, [1], [2, 0]))
            for each in (ring, plain):
                each.reset(rows)
        assert_equal_rings(ring, plain)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [2, 3, 8])
def test_other_capacities(copies, capacity):
    torch.manual_seed(0)
    for share in (0.75, 0.9, 0.97) if capacity > 2 else (0.9, 0.97):
        ring, plain = make_both(share=share, capacity=capacity)
        for step in range(2 * capacity + 1):
            features = torch.randn(BATCH, TOKENS, DIM)
            for each in (ring, plain):
                each.push(features, 1 - 0.01 * step)
            assert_equal_rings(ring, plain)


PREDICTORS = {
    "newton-rank0": {"mixer": "newton", "rank": 0},
    "newton-rank4": {"mixer": "newton", "rank": 4},
    "dense": {"mixer": "dense", "history_length": (2, 3, 4)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PREDICTORS)
def test_forecasts_are_those_of_the_ring_on_the_device(copies, name, dtype):
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(DIM, hidden=8, **PREDICTORS[name])).requires_grad_(False)
    for parameter in predictor.parameters():
        parameter.normal_(std=0.2)
    head = OutputHead(torch.randn(5, DIM), torch.randn(5), torch.randn(BATCH, DIM), torch.randn(BATCH, DIM))
    head = OutputHead(*(value.to(dtype) for value in (head.weight, head.bias, head.scale, head.shift)))
    capacity = predictor.config.max_history
    ring, plain = make_both(dtype, capacity=capacity)
    sigma = torch.tensor([0.8, 0.5, 0.2])  # one sample in each stage
    for step in range(capacity + 2):
        rows = [row for row in range(BATCH) if step >= 2 * row]  # histories of different lengths
        features = torch.randn(len(rows), TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, sigma[rows] + 0.1 - 0.01 * step, rows)
        for _ in range(2):  # the second read finds what the first has fetched ahead
            # Token by token nothing changes; the products of plain torch may round in another order at another size.
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            exact = name.startswith("newton")
            torch.testing.assert_close(
                predictor(ring, sigma),
                predictor(plain, sigma),
                equal_nan=True,
                **{"rtol": 0, "atol": 0} if exact else tolerance,
            )
            velocity = predictor.predict_velocity(ring, sigma, head)
            torch.testing.assert_close(
                velocity, predictor.predict_velocity(plain, sigma, head), equal_nan=True, **tolerance
            )


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["newton", "dense"])
def test_a_head_with_a_modulation_for_each_token(mixer):
    """The pieces have fewer tokens than the modulation."""
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(DIM, mixer=mixer, hidden=8))
    head = OutputHead(torch.randn(5, DIM), torch.randn(5), torch.randn(BATCH, TOKENS, DIM), None)
    ring, plain = make_both(capacity=predictor.config.max_history)
    levels = [0.9, 0.8, 0.7]
    for level in levels:
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, level)
    expected = predictor.predict_velocity(plain, 0.5, head)
    torch.testing.assert_close(predictor.predict_velocity(ring, 0.5, head), expected)
    if mixer == "newton":
        (weights,) = predictor.plan([levels[::-1]], [0.5], BATCH)
        torch.testing.assert_close(predictor.velocity_with(ring, weights, head), expected)


def test_gradients_of_the_parameters_pass_through_the_pieces():
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(DIM, rank=3, hidden=8))
    ring, plain = make_both()
    for step in range(4):
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, 0.9 - 0.1 * step)
    wanted = torch.randn(BATCH, TOKENS, DIM)
    gradients = [
        torch.autograd.grad((predictor(each, 0.5) * wanted).sum(), list(predictor.parameters()))
        for each in (ring, plain)
    ]
    for actual, expected in zip(*gradients):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_snapshots_move_between_rings_of_both_kinds(copies, dtype):
    torch.manual_seed(0)
    rng = random.Random(3)
    ring, plain = make_both(dtype)
    for _ in range(9):
        random_push(rng, (ring, plain))
    kept = copy.deepcopy(plain.newest_first())
    own, foreign = ring.snapshot(), plain.snapshot()
    for snapshot in (own, foreign):
        for _ in range(3):
            random_push(rng, (ring, plain))
        ring.restore(snapshot)
        for actual, expected in zip(ring.newest_first(), kept):
            assert_same(actual, expected)
        plain.restore(snapshot)
        for _ in range(6):  # what follows on a restored ring is right, too
            random_push(rng, (ring, plain))
            assert_equal_rings(ring, plain)
    with pytest.raises(ValueError, match=r"`snapshot.storage` must have shape \[4, 3, 40, 24\]"):
        ring.restore(FeatureRing(4, 3, 39, 24, dtype=dtype).snapshot())
    with pytest.raises(TypeError, match="`snapshot` must be a RingSnapshot"):
        ring.restore(None)


@pytest.mark.parametrize("pushes", range(8))
def test_a_restored_ring_goes_on_where_it_was(copies, pushes):
    torch.manual_seed(0)
    ring, plain = make_both(share=0.6, capacity=5)
    for step in range(pushes):
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, 1 - 0.01 * step)
    ring.restore(plain.snapshot())
    for step in range(6):
        assert_equal_rings(ring, plain)
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, 0.5 - 0.01 * step)


def storages(ring):
    """The memory of all tensors that a ring holds, each once."""
    found = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)
        elif isinstance(value, FeatureRing):
            look(list(vars(value).values()))

    look(list(vars(ring).values()))
    return found.values()


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_the_budget_holds_to_the_byte(share, dtype):
    ring, plain = make_both(dtype, share, tokens=777)
    taken = sum(storage.nbytes() for storage in storages(ring))
    assert taken == ring.nbytes == ring.device_nbytes + ring.host_nbytes
    assert ring.device_nbytes <= int(share * plain.nbytes)
    feature = 3 * 777 * (24 * dtype.itemsize + (4 if dtype.itemsize == 1 else 0))
    assert ring.host_nbytes == (4 - ring.resident) * feature
    assert 777 // 64 <= ring.piece_tokens <= 98


def test_what_fits_stays_on_the_device_and_what_cannot_fit_is_refused():
    sizes = (4, 3, 100, 24, torch.bfloat16)
    assert isinstance(make_ring(*sizes, max_device_bytes=ring_nbytes(*sizes)), FeatureRing)
    assert isinstance(make_ring(*sizes), FeatureRing)
    with pytest.raises(ValueError, match=r"`max_device_bytes` must be at least (\d+).*but got 9000") as error:
        make_ring(*sizes, max_device_bytes=9000)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    smallest = make_ring(*sizes, max_device_bytes=least)
    assert smallest.resident == 1 and smallest.device_nbytes <= least
    with pytest.raises(ValueError, match=f"must be at least {least}"):
        make_ring(*sizes, max_device_bytes=least - 1)
    with pytest.raises(ValueError, match="must be at least 28836, because for these sizes a ring with a part"):
        make_ring(1, 3, 100, 24, max_device_bytes=100)
    with pytest.raises(TypeError, match="`max_device_bytes` must be an integer"):
        make_ring(*sizes, max_device_bytes=1e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(features=torch.zeros(BATCH, TOKENS, DIM + 1)), r"`features` must have shape \[3, 40, 24\]"),
        (dict(sigma=torch.zeros(2)), r"`sigma` must have shape \[3\]"),
        (dict(sigma=float("inf")), "`sigma` must be a finite number"),
        (dict(rows=[0, 1, 3]), "`rows` must be an integer of at least 0 and at most 2"),
        (dict(rows=torch.tensor([0, 1, 1])), "`rows` must be distinct"),
    ],
)
def test_a_bad_push_is_refused_and_changes_nothing(changes, message):
    torch.manual_seed(0)
    ring, plain = make_both()
    for step in range(6):
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, 0.9 - 0.1 * step)
    with pytest.raises(ValueError, match=message):
        ring.push(**{"features": features, "sigma": 0.1} | changes)
    with pytest.raises(ValueError, match="`features` must share no memory with the ring"):
        ring.push(ring._near.storage[0], 0.1)
    assert_equal_rings(ring, plain)


def test_a_read_that_is_given_up_leaves_no_trace(copies):
    torch.manual_seed(0)
    ring, plain = make_both()
    for step in range(5):
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, 0.9 - 0.1 * step)
        for pieces in range(1, 5):
            for count, _ in enumerate(ring.pieces(), 1):
                if count == pieces:
                    break
            assert_equal_rings(ring, plain)


def changed_inside(ring):
    return {
        "push": lambda: ring.push(torch.zeros(BATCH, TOKENS, DIM), 0.1),
        "gather": lambda: ring.gather(1),
        "reset": lambda: ring.reset([0]),
        "another read": lambda: [*ring.pieces()],
    }


@pytest.mark.parametrize("change", ["push", "gather", "reset", "another read"])
def test_a_read_notices_what_happens_inside_it(copies, change):
    ring, _ = make_both()
    ring.push(torch.ones(BATCH, TOKENS, DIM), 0.5)
    read = ring.pieces()
    next(read)
    changed_inside(ring)[change]()
    with pytest.raises(RuntimeError, match="was changed, or another read began, while its pieces were being read"):
        next(read)
    assert ring.gather().isfinite().any()


def test_a_refused_push_does_not_disturb_a_read():
    ring, plain = make_both()
    for each in (ring, plain):
        each.push(torch.ones(BATCH, TOKENS, DIM), 0.5)
    for tokens, (storage, *_) in ring.pieces():
        assert_same(storage[-1], plain.storage[0, :, tokens])
        with pytest.raises(ValueError, match="`features` must have shape"):
            ring.push(torch.ones(BATCH, TOKENS, DIM + 1), 0.4)


@pytest.mark.parametrize("rows", [None, [1]])
def test_a_push_that_fails_on_the_way_empties_its_rows(copies, monkeypatch, rows):
    torch.manual_seed(0)
    ring, plain = make_both()

    def push(step):
        features = torch.randn(BATCH, TOKENS, DIM)
        for each in (ring, plain):
            each.push(features, 0.9 - 0.1 * step)

    for step in range(6):
        push(step)

    def fail(*args):
        raise torch.OutOfMemoryError("a lack of memory for the test")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(ring._near, "push", fail)
        ring.push(torch.ones(BATCH if rows is None else 1, TOKENS, DIM), 0.1, rows)
    plain.reset(rows)
    assert_equal_rings(ring, plain)
    for step in range(6, 12):
        push(step)
        assert_equal_rings(ring, plain)


class Failing:
    """Fails at the n-th step of a change and at every one after it, as where no memory is left, until it is mended."""

    def __init__(self, monkeypatch, ring):
        self.left = None
        for owner, name in ((tiered, "to_device"), (ring._near, "push"), (ring._near, "reset"), (ring._copies, "copy")):
            monkeypatch.setattr(owner, name, self.step(getattr(owner, name)))

    def step(self, function):
        def checked(*args):
            if self.left is not None:
                if self.left == 0:
                    raise torch.OutOfMemoryError("a lack of memory for the test")
                self.left -= 1
            return function(*args)

        return checked


CHANGES = {
    "push": lambda ring, features, snapshot: ring.push(features, 0.1),
    "push of a row": lambda ring, features, snapshot: ring.push(features[:1], 0.1, [1]),
    "reset of a row": lambda ring, features, snapshot: ring.reset([1]),
    "restore": lambda ring, features, snapshot: ring.restore(snapshot),
}


@pytest.mark.parametrize("copies", [pytest.param("at once", marks=pytest.mark.slow), "late"], indirect=True)
@pytest.mark.parametrize(
    "name", [*list(CHANGES)[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in list(CHANGES)[1:])]
)
def test_wherever_a_change_fails_its_rows_are_empty_or_as_they_were(copies, monkeypatch, name):
    torch.manual_seed(0)
    features = torch.randn(20, BATCH, TOKENS, DIM)
    before, old = make_both()
    for step in range(6):
        for each in (before, old):
            each.push(features[step], 0.9 - 0.1 * step)
    emptied = copy.deepcopy(old)
    emptied.reset([1] if "of a row" in name else None)
    snapshot, ways = old.snapshot(), set()
    for steps in range(1000):
        ring = copy.deepcopy(before)
        with monkeypatch.context() as patch:
            failing = Failing(patch, ring)
            uses, failing.left = ring._uses, steps
            try:
                CHANGES[name](ring, features[6], snapshot)
                break
            except torch.OutOfMemoryError:
                pass
            changed = ring._uses > uses
            if changed and ring._unfinished:
                with pytest.raises(torch.OutOfMemoryError):  # nothing is read before the rows could be emptied
                    ring.gather()
                with pytest.raises(torch.OutOfMemoryError):
                    ring.count  # noqa: B018
        plain = copy.deepcopy(emptied if changed else old)
        ways.add(changed)
        assert torch.equal(ring.count, plain.count) and (ring.sigmas[:, ring.count == 0] == 0).all()
        for step in range(7, 13):
            assert_equal_rings(ring, plain)
            for each in (ring, plain):
                each.push(features[step], 0.2 - 0.01 * step)
    assert 3 < steps < 1000 and True in ways


def test_a_backend_that_cannot_run_is_refused_before_anything_moves(monkeypatch):
    ring, plain = make_both()
    for each in (ring, plain):
        each.push(torch.ones(BATCH, TOKENS, DIM), 0.5)
    monkeypatch.setenv("LESA_BACKEND", "nothing")
    with pytest.raises(ValueError, match="`LESA_BACKEND` must be one of"):
        ring.push(torch.ones(BATCH, TOKENS, DIM), 0.4)
    monkeypatch.delenv("LESA_BACKEND")
    assert_equal_rings(ring, plain)


def test_the_least_budget_is_never_more_than_all_of_it():
    for tokens in (1, 2, 3):
        sizes = (4, 2, tokens, 8)
        needed = ring_nbytes(*sizes, torch.float32)
        with pytest.raises(ValueError, match="must be at least") as error:
            make_ring(*sizes, max_device_bytes=100)
        named = int(str(error.value).split("at least ")[1].split(",")[0])
        assert named <= needed
        make_ring(*sizes, max_device_bytes=named)


@pytest.mark.parametrize("small", [(4, 2, 1, 8), (4, 2, 130, 8), (1, 2, 130, 8)], ids=str)
def test_rings_that_share_a_budget_fit_in_it(small):
    rings = [(*sizes, torch.float32) for sizes in ((4, 2, 777, 24), small)]
    whole = [ring_nbytes(*sizes) for sizes in rings]
    assert shared_budget(sum(whole), rings) == shared_budget(10 * sum(whole), rings) == whole
    with pytest.raises(ValueError, match="must be at least .* for 2 rings that share it, but got 100") as error:
        shared_budget(100, rings)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    for budget in (least, least + 1, sum(whole) // 2, sum(whole) - 1):
        shares = shared_budget(budget, rings)
        assert sum(shares) <= budget
        made = [make_ring(*sizes, max_device_bytes=share) for sizes, share in zip(rings, shares)]
        assert all(getattr(ring, "device_nbytes", 0) <= share for ring, share in zip(made, shares))
    with pytest.raises(ValueError, match=f"must be at least {least}, for 2"):
        shared_budget(least - 1, rings)


@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 200])
def test_a_tiered_ring_names_the_least_that_it_takes(tokens):
    sizes = (4, 2, tokens, 8, torch.float32, "cpu", "auto")
    with pytest.raises(ValueError, match="must be at least") as error:
        TieredRing(*sizes, 100)
    named = int(str(error.value).split("at least ")[1].split(",")[0])
    assert TieredRing(*sizes, named).device_nbytes <= named
    with pytest.raises(ValueError, match=f"must be at least {named}"):
        TieredRing(*sizes, named - 1)


def test_without_the_extension_the_warning_names_the_users_line(monkeypatch):
    monkeypatch.setattr(dispatch, "extension_problem", lambda device: "a reason for the test")
    ring, _ = make_both()
    for use in (lambda: ring.push(torch.ones(BATCH, TOKENS, DIM), 0.5), ring.gather):
        dispatch._warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use()
        assert [warning.filename for warning in caught] == [__file__] * len(caught) and caught


def test_what_it_is_shows():
    ring, _ = make_both()
    ring.push(torch.zeros(BATCH, TOKENS, DIM), 0.5, rows=None)
    assert "TieredRing(capacity=4, batch=3, tokens=40, dim=24" in repr(ring)
    assert "in host memory, count=[1, 1, 1]" in repr(ring)


@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_on_a_gpu_whose_streams_are_busy(dtype, share):
    torch.manual_seed(0)
    predictor = FusedKANPredictor(PredictorConfig(DIM, rank=4, hidden=8)).requires_grad_(False).cuda()
    for parameter in predictor.parameters():
        parameter.normal_(std=0.2)
    sizes = (BATCH, 5000, DIM, dtype)
    plain = FeatureRing(4, *sizes, device="cuda")
    ring = make_ring(4, *sizes, device="cuda", max_device_bytes=int(SHARES[share] * plain.nbytes))
    assert isinstance(ring, TieredRing)
    results = []
    for step in range(9):
        features = torch.randn(BATCH, 5000, DIM, device="cuda")
        torch.cuda._sleep(10_000_000)  # the work that copies have to wait for is late
        for each in (plain, ring):
            each.push(features, 1 - 0.05 * step)
        features.fill_(float("nan"))
        for _ in range(2):
            results.append([predictor(each, 0.95 - 0.05 * step) for each in (plain, ring)])
            torch.cuda._sleep(1_000_000)
    for expected, actual in results:
        assert_same(actual, expected)
    assert_equal_rings(ring, plain)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_what_it_says():
    FeatureRing(1, 1, 1, 1, device="cuda").push(
        torch.ones(1, 1, 1, device="cuda"), 0.5
    )  # what comes with the first use
    for budget in (None, 2_000_000):
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        ring = make_ring(4, 2, 1000, 128, torch.bfloat16, "cuda", max_device_bytes=budget)
        assert isinstance(ring, FeatureRing if budget is None else TieredRing)
        assert torch.cuda.memory_stats()["requested_bytes.all.current"] - before == ring.device_nbytes
        del ring


@pytest.mark.gpu
def test_a_graph_is_refused():
    ring = make_ring(4, 1, 1000, 128, torch.bfloat16, "cuda", max_device_bytes=900_000)
    features, graph = torch.ones(1, 1000, 128, device="cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="A TieredRing can't be captured"), torch.cuda.graph(graph):
        ring.push(features, 0.5)
    with pytest.raises(RuntimeError, match="A TieredRing can't be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ring.reset()


@pytest.mark.gpu
def test_a_snapshot_of_the_cpu_is_restored_on_a_busy_gpu():
    torch.manual_seed(0)
    kept = FeatureRing(4, BATCH, 5000, DIM)
    ring = make_ring(4, BATCH, 5000, DIM, device="cuda", max_device_bytes=int(0.65 * kept.nbytes))
    for step in range(6):
        kept.push(torch.randn(BATCH, 5000, DIM), 0.9 - 0.1 * step)
        torch.cuda._sleep(10_000_000)
        ring.push(torch.randn(BATCH, 5000, DIM, device="cuda"), 0.9 - 0.1 * step)
    ring.restore(kept.snapshot())
    for actual, expected in zip(ring.newest_first(), kept.newest_first()):
        assert_same(actual.cpu(), expected)
