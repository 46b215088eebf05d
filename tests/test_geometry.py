"""The promise: the windows of an axis are what its taps read, however long the axis, and at no cost however long."""

import itertools
import math
import time
import tracemalloc
from collections import Counter

import cases
import numpy as np
import oracle
import pytest
import torch

from convnorm.geometry import GeometryError, axis_windows, geometry, out_size
from convnorm.geometry import _shorten as shorten
from convnorm.plan import layer_plan, read_plan

AXIS = ("n", "taps", "stride", "before", "after", "dilation", "mode")


def read_input(position, n, mode):
    """By the padding modes' definitions, a step at a time; None for padding that is zero."""
    if mode == "zeros" and not 0 <= position < n:
        return None
    while not 0 <= position < n:
        if mode == "circular":
            position += n if position < 0 else -n
        elif mode == "replicate":
            position += 1 if position < 0 else -1
        else:
            position = -position if position < 0 else 2 * (n - 1) - position
    return position


def seen(n, taps, stride, before, after, dilation, mode, m=None):
    """{merged tap: count} of every input, and of every output."""
    by_input, by_output = [Counter() for _ in range(n)], []
    for o in range(out_size(n, taps, stride, before, after, dilation) if m is None else m):
        together = {}
        for t in range(taps):
            x = read_input(o * stride + t * dilation - before, n, mode)
            if x is not None:
                together.setdefault(x, []).append(t)
        by_output.append(Counter(map(tuple, together.values())))
        for x, merged in together.items():
            by_input[x][tuple(merged)] += 1
    return by_input, by_output


def undominated(counters):
    distinct = {frozenset(counter.items()): counter for counter in counters}.values()
    return {frozenset(one.items()) for one in distinct if not any(one < other for other in distinct)}


def named(axis, window):
    """{merged tap: count} of a window."""
    return Counter({axis.merged[a]: count for a, count in enumerate(window.counts) if count})


def sets_of_windows(axis):
    return tuple({frozenset(named(axis, w).items()) for w in side} for side in (axis.inputs, axis.outputs))


def brute_force(**case):
    return tuple(map(undominated, seen(**case)))


def random_axis(rng):
    while True:
        axis = dict(zip(AXIS, [int(rng.integers(1, 15)), *(int(rng.integers(low, high)) for low, high in
                               ((1, 6), (1, 5), (0, 5), (0, 5), (1, 4)))], strict=False))  # fmt: skip
        axis["mode"] = str(rng.choice(cases.MODES))
        most = {"reflect": axis["n"] - 1, "circular": axis["n"]}.get(axis["mode"], 99)
        fits = axis["n"] + axis["before"] + axis["after"] > axis["dilation"] * (axis["taps"] - 1)
        if fits and max(axis["before"], axis["after"]) <= most:
            return axis


def test_windows_are_those_found_by_brute_force(seed):
    rng = np.random.default_rng((seed, 4))
    for _ in range(1500):
        case = random_axis(rng)
        axis = axis_windows(**case)
        assert axis.merged[: axis.taps] == tuple((t,) for t in range(axis.taps))
        assert len(set(axis.merged)) == len(axis.merged)
        assert sets_of_windows(axis) == brute_force(**case), case


def test_cut_windows_are_those_found_by_brute_force(seed):
    """With fewer outputs than there could be, as a transposed convolution may have."""
    rng = np.random.default_rng((seed, 5))
    for _ in range(300):
        case = random_axis(rng) | {"mode": "zeros"}
        m = int(rng.integers(1, out_size(*(case[name] for name in AXIS[:-1])) + 1))
        axis = axis_windows(**case, m=m)
        assert sets_of_windows(axis) == brute_force(**case, m=m), (case, m)


def test_windows_stand_at_their_positions(seed):
    rng = np.random.default_rng((seed, 6))
    for _ in range(500):
        case = random_axis(rng)
        axis = axis_windows(**case)
        for windows, places in zip((axis.inputs, axis.outputs), seen(**case), strict=True):
            assert all(-len(places) <= window.position < len(places) for window in windows)
            first = [places.index(named(axis, window)) for window in windows]
            assert [window.position % len(places) for window in windows] == first == sorted(first), case


def test_windows_do_not_dominate_one_another(seed):
    rng = np.random.default_rng((seed, 7))
    for _ in range(500):
        axis = axis_windows(**random_axis(rng))
        for side in (axis.inputs, axis.outputs):
            assert side
            for one, other in itertools.permutations(side, 2):
                assert not all(a <= b for a, b in zip(one.counts, other.counts, strict=True))


def test_a_long_axis_has_the_windows_of_its_short_one(seed):
    """And has them where the short one says: so many places from the nearer end."""
    rng = np.random.default_rng((seed, 8))
    for _ in range(1000):
        case = random_axis(rng)
        case["n"] += int(rng.integers(0, 60))
        short = shorten(*(case[name] for name in AXIS[:-1]))
        assert short <= case["n"]
        axis = axis_windows(**case | {"n": short})
        assert sets_of_windows(axis) == sets_of_windows(axis_windows(**case)), case
        for windows, places in zip((axis.inputs, axis.outputs), seen(**case), strict=True):
            assert [places[window.position] for window in windows] == [named(axis, w) for w in windows], case


def test_zero_padding_has_one_window_for_each_residue_class():
    for taps, stride in itertools.product(range(1, 8), range(1, 9)):
        axis = axis_windows(n=40, taps=taps, stride=stride, before=taps // 2, after=taps // 2)
        classes = {tuple(int(t % stride == r) for t in range(taps)) for r in range(min(stride, taps))}
        assert {window.counts for window in axis.inputs} == classes
        assert [window.counts for window in axis.outputs] == [(1,) * taps]
        assert not axis.merges


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_huge_input_costs_nothing(mode):
    start = time.perf_counter()
    huge = geometry((2, 2, 5, 5, 5), (3,), (2,), (10**9, 10**9 + 1, 10**18), padding_mode=mode)
    assert time.perf_counter() - start < 0.5
    assert huge.out_shape == tuple((n - 1) // 3 + 1 for n in huge.in_shape)
    like = [next(k for k in range(40, 60) if (n - k) % 3 == 0) for n in huge.in_shape]
    assert huge.axes == geometry((2, 2, 5, 5, 5), (3,), (2,), tuple(like), padding_mode=mode).axes
    norms = [torch.ops.convnorm.norms(torch.ones(2, 2, 5), 3, 2, [n]) for n in (10**9, like[0])]
    assert norms[0] == norms[1]


def test_a_huge_transposed_input_costs_nothing():
    options = {"transposed": True, "output_padding": (1,), "dilation": (2,)}
    huge = geometry((2, 2, 5), (3,), (2,), (10**12,), **options)
    assert huge.out_shape == ((10**12 - 1) * 3 - 4 + 8 + 1 + 1,)
    assert huge.axes == geometry((2, 2, 5), (3,), (2,), (40,), **options).axes


def test_sizes_are_those_of_pytorch(seed):
    for number in range(500):
        case, weight = cases.fuzz(seed, number)
        outputs = oracle.matrix(weight, *case.args, **case.options).shape[0]
        out_channels = case.weight_shape[1] * case.groups if case.transposed else case.weight_shape[0]
        assert outputs == out_channels * math.prod(case.geometry.out_shape), case


def test_read_plan_inverts_the_text_of_a_plan(seed):
    rng = np.random.default_rng((seed, 9))
    plans = [layer_plan(cases.random_case(rng).geometry) for _ in range(300)]
    for plan in plans:
        assert read_plan(plan.text) == (plan,)
    assert read_plan("".join(plan.text for plan in plans)) == tuple(plans)


def test_a_plan_lists_only_what_is_unusual():
    assert layer_plan(geometry((1, 1, 3), (1,), (1,), (8,))).text == "1 0 1 3 0 0 0\n"
    assert layer_plan(geometry((1, 1, 3), (2,), (1,), (8,))).text == "1 0 1 3 0 2 1 1 2 0 2 0\n"
    (axis,) = layer_plan(geometry((1, 1, 3), (1,), (1,), (8,), padding_mode="replicate")).axes
    assert axis.merged == ((0,), (1,), (2,), (0, 1), (1, 2))


def test_tables_past_all_memory_are_refused():
    for size, stride, dilation in ((10**11, 10**10, 1), (10**11, 1, 10**10), (10**9, 10**9, 1)):
        with pytest.raises(GeometryError, match=f"in_shape {size} .*stride {stride}.*too large"):
            geometry((1, 1, 3), (stride,), (0,), (size,), dilation=(dilation,))
    with pytest.raises(GeometryError, match=r"inputs by 100000 taps .*too large"):
        geometry((1, 1, 10**5), (1,), (0,), (10**6,))


@pytest.mark.parametrize(("taps", "stride"), [(4095, 1), (2048, 512)])
def test_a_long_kernel_takes_no_table(taps, stride):
    """Of inputs by taps it would have 256 MB, and 128 MB."""
    tracemalloc.start()
    geometry((2, 2, taps), (stride,), (taps // 2,), (8192,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 25
