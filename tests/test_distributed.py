"""Norm decay in distributed training: what one process computes, and no weight travels for it.

The bodies of these tests run in real processes, all in the same four: to start them takes longer than the tests. They
talk through gloo. Where one fails, those after it are not run.
"""

import copy
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TABLE, fuzz, random_weight
from every_layer import DenseDecay, Network
from torch import nn

import convnorm
from convnorm.batch import Batch
from convnorm.layers import as_layer
from convnorm.plan import read_plan
from convnorm.sharded import Part, Sharded, _pieces
from convnorm.uses import observe

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no torch.distributed with gloo", allow_module_level=True)
if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("this system has no fork server", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

WORLD = 4
SECONDS = 120  # for all of it; some 20 are enough
SHAPE = [4, 3, 8, 8]
SIZES = {use.name: use.in_shape for use in observe(Network(), SHAPE)}
BODIES = {}


def on_every_rank(body):
    """Turn a function that every rank runs into a test of its outcome."""
    BODIES[body.__name__] = body

    def test(outcomes):
        failures = outcomes.get(body.__name__, ["it was not run: a test before it failed, or all took too long"])
        assert not failures, "\n".join(failures)

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


@pytest.fixture(scope="module")
def outcomes():
    """What went wrong in each body, by its name: tracebacks of ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, then forked
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the fork server finds it
        ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(WORLD)]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + SECONDS
        for rank in ranks:
            rank.join(max(end - time.monotonic(), 0.1))
            rank.kill()
        found = {}
        for report in sorted(Path(folder).glob("*.rank*"), key=lambda report: report.stat().st_mtime_ns):
            failures = found.setdefault(report.stem, [])
            if text := report.read_text():
                failures.append(f"rank {report.suffix[5:]}: {text}")
        yield found


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    for name, body in BODIES.items():
        report = Path(folder, f"{name}.rank{rank}")
        try:
            torch.manual_seed(0)
            body()
            report.write_text("")
        except BaseException:
            report.write_text(traceback.format_exc())
            os._exit(1)  # so that the others do not wait
    dist.destroy_process_group()


# --- what the bodies share -------------------------------------------------------------------------------------------


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def meshes():
    """By name: all four ranks; two pairs, each for itself; and two pairs that hold the same, as HSDP has it."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    return {"four": init_device_mesh("cpu", (4,)), "two": pairs["shard"], "hybrid": pairs}


def sharded(model, mesh, **options):
    """Each convolution on its own, the rest with the root."""
    for module in model.children():
        if not isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def share_of(mesh):
    """Of a whole batch, what this rank trains on: which part, of how many."""
    return (mesh.get_local_rank() if mesh.ndim == 1 else dist.get_rank()), mesh.size()


def train(model, decay, steps=6, share=(0, 1), by="step", clip=None, micro_batches=1, seed=1):
    """The ranks' shares of each batch make the same batch everywhere. Returns the whole weights.

    ``by`` what norm decay steps: ``step()``, an ``attach()``-ed optimizer or ``convnorm.optim``'s own.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    kind, options = (convnorm.optim.SGD, {"norm_decay": decay}) if by == "optim" else (torch.optim.SGD, {})
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.9, **options)
    if by == "attach":
        decay.attach(optimizer)
    for _ in range(steps):
        x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        own = x.unflatten(0, (micro_batches, -1)).chunk(share[1], 1)[share[0]]  # [micro batches, its samples, ...]
        optimizer.zero_grad()
        for i, one in enumerate(own):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(i == micro_batches - 1)
            model(one).square().mean().div(micro_batches).backward()
        if clip == "before":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if by == "step":
            decay.step()
        if clip == "after":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [whole(parameter) for parameter in model.parameters()]


def whole(parameter):
    with torch.no_grad():
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()


def assert_close(mine, expected, rtol=1e-9):
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def assert_same_on_all_ranks(tensors):
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    every = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(every, flat)
    assert all(torch.equal(one, flat) for one in every), "ranks disagree"


# --- DistributedDataParallel -----------------------------------------------------------------------------------------


@on_every_rank
def test_ddp_trains_as_one_process_on_the_whole_batch():
    halves, rank = [dist.new_group([0, 1]), dist.new_group([2, 3])], dist.get_rank()
    for ord in (1, math.inf):
        one = network()
        reference = convnorm.NormDecay(one, SHAPE, ord=ord, beta=0.3)
        expected = train(one, reference)
        for group, share in ((None, (rank, 4)), (halves[rank // 2], (rank % 2, 2))):
            ddp = DistributedDataParallel(network(), process_group=group)
            example = SHAPE if ord == 1 else None
            decay = convnorm.NormDecay(ddp if group is None else ddp.module, example, ord=ord, beta=0.3)
            got = train(ddp, decay, share=share)
            assert_close(got, expected)
            assert_same_on_all_ranks(got)
            assert list(decay.norms) == list(reference.norms)
            assert decay.state_dict()["layers"].keys() == reference.state_dict()["layers"].keys()


@on_every_rank
def test_ddp_with_an_attached_optimizer_and_a_state_that_is_loaded():
    share, one = (dist.get_rank(), WORLD), network()
    expected = train(one, convnorm.NormDecay(one, SHAPE, beta=0.3), clip="before")
    ddp = DistributedDataParallel(network())
    got = train(ddp, convnorm.NormDecay(ddp, SHAPE, beta=0.3), share=share, by="attach", clip="before")
    assert_close(got, expected)
    assert_same_on_all_ranks(got)
    resumed(lambda: DistributedDataParallel(network()), share)


# --- fully_shard: the same training ----------------------------------------------------------------------------------


@on_every_rank
def test_fsdp_trains_as_the_dense_algorithm():
    for ord in (1, math.inf):
        one = network()
        dense = DenseDecay(one, ord, 0.3, 0.5)
        sizes = {use.name: use.in_shape for use in dense.uses}
        expected = train(one, dense)
        other = network()
        reference = convnorm.NormDecay(other, SHAPE, ord=ord, beta=0.3)
        train(other, reference)
        for name, mesh in meshes().items():
            model = network()
            if name == "four":
                decay = convnorm.NormDecay(model, SHAPE, ord=ord, beta=0.3)  # of the plain model, as one does
            sharded(model, mesh)
            if name != "four":
                decay = convnorm.NormDecay(model, sizes if name == "two" else None, ord=ord, beta=0.3)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                got = train(model, decay, share=share_of(mesh))
            assert_close(got, expected)
            assert list(decay.norms) == list(reference.norms)
            assert_close(decay.norms.values(), reference.norms.values())
            assert_same_on_all_ranks(got)
            assert_same_on_all_ranks(decay.norms.values())


@on_every_rank
def test_fsdp_with_clipping_and_micro_batches():
    mesh = meshes()["two"]
    for options in ({"clip": "before", "by": "attach"}, {"clip": "after"}, {"micro_batches": 2}):
        one, model = network(), network()
        expected = train(one, convnorm.NormDecay(one, SHAPE, beta=0.3), **options)
        decay = convnorm.NormDecay(model, SHAPE, beta=0.3)
        sharded(model, mesh)
        assert_close(train(model, decay, share=share_of(mesh), **options), expected)


class Reused(nn.Module):
    """A layer at two sizes, two layers with one weight, a layer that is frozen, and one that only some batches use."""

    def __init__(self):
        super().__init__()
        self.twice, self.one, self.other = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 3), nn.Linear(3, 3)
        self.frozen, self.rare = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
        self.other.weight, self.calls = self.one.weight, 0

    def forward(self, x):
        x = self.twice(self.twice(x.flatten(2)[..., :2])[..., :1]).flatten(1)
        x = self.frozen(self.other(self.one(x).relu()))
        self.calls += 1
        return self.rare(x) if self.calls % 2 else x


@on_every_rank
def test_fsdp_of_layers_and_weights_used_twice_or_not_at_all():
    for ord in (1, math.inf):
        for mesh in (meshes()["four"], meshes()["two"]):
            torch.manual_seed(0)
            one = Reused().double()
            model = copy.deepcopy(one)
            decays = [convnorm.NormDecay(network_, SHAPE, ord=ord, beta=0.3) for network_ in (one, model)]
            one.calls = model.calls = 0
            fully_shard(model, mesh=mesh)
            assert_close(train(model, decays[1], share=share_of(mesh)), train(one, decays[0]))
            assert list(decays[1].norms) == ["twice [2]", "twice [1]", "one", "other", "frozen", "rare"]
            assert_close(decays[1].norms.values(), decays[0].norms.values())


@on_every_rank
def test_fsdp_in_mixed_precision_decays_the_weights_that_the_optimizer_has():
    mesh, model = meshes()["four"], network(torch.float32)
    decay = convnorm.NormDecay(model, SHAPE, beta=0.3, momentum=0)
    sharded(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    got = train(model, decay, share=share_of(mesh))
    assert {t.dtype for t in got} == {torch.float32}
    again = network(torch.float32)
    with torch.no_grad():
        for parameter, value in zip(again.parameters(), got, strict=True):
            parameter.copy_(value).grad = torch.zeros_like(value)
    expected = convnorm.NormDecay(again, SHAPE, beta=0.3, momentum=0)
    expected.step()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decay.step()
    assert_close(decay.norms.values(), expected.norms.values(), 1e-6)
    assert_close([whole(p.grad) for p in model.parameters()], [p.grad for p in again.parameters()], 1e-6)


def resumed(make, share):
    """A run that is interrupted after three steps is, bit for bit, the one that is not."""
    straight, broken = make(), make()
    first = convnorm.NormDecay(straight, dict(SIZES), beta=0.3)
    train(straight, first, 3, share)
    middle = convnorm.NormDecay(broken, dict(SIZES), beta=0.3)
    train(broken, middle, 3, share)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(middle.state_dict(), file.name)
        state = torch.load(file.name)
    second = convnorm.NormDecay(broken, None, beta=0.3)
    second.load_state_dict(state)
    for a, b in zip(train(straight, first, 3, share, seed=2), train(broken, second, 3, share, seed=2), strict=True):
        assert torch.equal(a, b)
    for label, own in first.state_dict()["layers"].items():
        for name, tensor in second.state_dict()["layers"][label].items():
            assert torch.equal(tensor, own[name]), (label, name)


@on_every_rank
def test_fsdp_resumes_bit_for_bit_each_rank_from_its_own_state():
    mesh = meshes()["four"]
    resumed(lambda: sharded(network(), mesh), share_of(mesh))


@on_every_rank
def test_the_state_of_other_rows_is_refused():
    """It may have the same shapes: in norms over rows always, in those over columns where ranks have equal parts."""
    mesh, rank = meshes()["four"], dist.get_rank()
    for ord in (1, math.inf):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 8))
        decay = convnorm.NormDecay(model, SHAPE, ord=ord, beta=0.3)
        decay.step()
        before = decay.state_dict()
        again = convnorm.NormDecay(fully_shard(model, mesh=mesh), {"0": (8, 8), "2": ()}, ord=ord, beta=0.3)
        again.step()
        states = [None] * WORLD
        dist.all_gather_object(states, again.state_dict())
        again.load_state_dict(states[rank])
        for other in [*(state for i, state in enumerate(states) if i != rank), before]:
            with pytest.raises(ValueError, match="the state"):
                again.load_state_dict(other)
        again.load_state_dict({name: value for name, value in states[rank].items() if name != "rows"})  # an older one


@on_every_rank
def test_what_takes_whole_weights_refuses_sharded_ones():
    """Also where a forward pass has left them whole: what is written then is lost."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    projections = [convnorm.Projection(model, SHAPE, ord=ord, bound=0.1) for ord in (1, 2, math.inf)]
    with tempfile.TemporaryDirectory() as folder:
        recorder = convnorm.Recorder(model, SHAPE, Path(folder, "norms.csv"))
        fully_shard(model, mesh=meshes()["four"])
        calls = [recorder.step, *(one.step for one in projections), lambda: convnorm.report(model, SHAPE)]
        calls += [lambda: convnorm.Recorder(model, SHAPE, Path(folder, "other.csv"))]
        calls += [lambda: convnorm.Projection(model, SHAPE, bound=1.0)]
        calls += [lambda: convnorm.project_batch_norms_(model, bound=1.0)]
        for call in calls:
            with torch.no_grad():
                model(torch.randn(SHAPE))
            with pytest.raises(RuntimeError, match=r"is sharded: a \w+ takes whole weights"):
                call()
        recorder.close()


# --- fully_shard: layer by layer -------------------------------------------------------------------------------------


class RawUse:
    """A raw weight in a layer's place, for what no module of PyTorch has."""

    def __init__(self, name, case, weight):
        self.name, self.case, self.module = name, case, nn.Module()
        self.module.weight = nn.Parameter(weight)

    @property
    def layer(self):
        names = dict(zip(("stride", "padding", "in_shape"), self.case.args, strict=True))
        return as_layer(self.module.weight, **names, **self.case.options)


def own_rows(tensor, mesh):
    chunks = tensor.chunk(mesh.size())
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else tensor[:0]


def cut(tensor, mesh):
    own = own_rows(tensor, mesh).clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def walk(cases, weights, ord, mesh, steps=4):
    """A few steps of layers with changing weights, each compared with those of whole weights; the last of both."""
    linf, rng = ord == math.inf, torch.Generator().manual_seed(0)
    whole_uses = [RawUse(str(i), *pair) for i, pair in enumerate(zip(cases, weights, strict=True))]
    uses = [RawUse(use.name, use.case, cut(use.module.weight.detach(), mesh)) for use in whole_uses]
    members = list(range(len(uses)))
    expected, batch = Batch(whole_uses, members, linf, 0.5), Sharded(uses, members, linf, 0.5)
    for one in (expected, batch):
        one.rates.fill_(0.3)
    for step in range(steps):
        for a, b in zip(expected.weights, batch.weights, strict=True):
            grad = torch.randn(a.shape, generator=rng, dtype=torch.float64).to(a.dtype)
            a.grad, b.grad = grad, cut(grad, mesh)
            if step == 2 and mesh.get_local_rank() == 1:
                b.grad = None
        scale = (1, 0.5, torch.tensor(2.0))[step % 3]
        for one in (expected, batch):
            one.step(one.scaled_rates(scale, ()))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[weights[0].dtype]
        torch.testing.assert_close(batch.norms, expected.norms, rtol=min(tolerance, 1e-5), atol=0, equal_nan=True)
        for i, (a, b) in enumerate(zip(expected.weights, batch.weights, strict=True)):
            assert torch.equal(expected.state.winners[i], batch.state.winners[i]), (cases[i], step)
            if b.grad is not None:
                own = own_rows(a.grad, mesh)
                close = {"rtol": tolerance, "atol": tolerance, "msg": f"{cases[i]}, step {step}"}
                torch.testing.assert_close(b.grad.to_local(), own, **close)
            factors = 1 + 0.5 * torch.randn(a.shape[1:2] + (1,) * (a.dim() - 2), generator=rng).to(a.dtype)
            with torch.no_grad():
                a.mul_(factors)
                b.to_local().mul_(factors)
    return expected, batch


@on_every_rank
def test_all_layers_of_the_table():
    rng = np.random.default_rng(0)
    convolutions = [case for case in TABLE.values() if not case.transposed]
    plain = [case for case in convolutions if case.groups == 1]
    for mesh in (meshes()["four"], meshes()["two"]):
        for ord in (1, math.inf):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                for cases in (list(TABLE.values()), convolutions, plain):
                    weights = [random_weight(rng, c.weight_shape, dtype, "normal", "contiguous") for c in cases]
                    _, batch = walk(cases, weights, ord, mesh)
                    assert batch._at_once == (cases is plain and ord == 1) or mesh.size() == 4


@on_every_rank
def test_random_layers():
    """Many of a row or two, cut through groups, and with ties; read all at once, and then a few elements at a time."""
    for mesh in (meshes()["four"], meshes()["two"]):
        convnorm.sharded.READ_AT_ONCE["cpu"] = 2**18 if mesh.size() == 4 else 40
        cases = [fuzz(0, number)[0] for number in range(60)]
        rng = np.random.default_rng(0)
        for ord in (1, math.inf):
            kinds = rng.choice(["normal", "integers", "zeros", "constant", "sparse", "negative"], len(cases))
            weights = [
                random_weight(rng, case.weight_shape, torch.float64, str(kind), "contiguous")
                for case, kind in zip(cases, kinds, strict=True)
            ]
            walk(cases, weights, ord, mesh, steps=3)
    convnorm.sharded.READ_AT_ONCE["cpu"] = 2**18


def test_what_is_read_at_once_is_whole_groups_or_lies_in_one():
    rng = np.random.default_rng(0)
    for _ in range(500):
        groups, rows, most = (int(n) for n in rng.integers(1, 9, 3))
        begin, end = sorted(int(n) for n in rng.integers(0, groups * rows + 1, 2))
        part = Part(read_plan(TABLE["linear"].plan)[0], rows, 7, begin, end, True)
        read = []
        for group, count, own in _pieces(part, most):
            piece = range(begin, end)[own]
            assert 1 <= len(piece) <= most
            assert [row // rows for row in piece] == [g for g in range(group, group + count) for _ in piece[::count]]
            read += piece
        assert read == list(range(begin, end))


@on_every_rank
def test_nan_and_inf_win_where_they_count():
    mesh, case = meshes()["four"], TABLE["conv2d"]
    for bad in ([math.nan], [math.inf], [math.inf, math.nan], [math.nan, math.inf], [math.nan, math.nan]):
        for ord in (1, math.inf):
            weight = torch.randn(case.weight_shape, dtype=torch.float64)
            for row, value in enumerate(bad, 1):
                weight[row, 2 - row, 1, 1] = value
            walk([case], [weight], ord, mesh, steps=1)


@on_every_rank
def test_weights_that_every_rank_has_whole_need_no_word_between_ranks():
    mesh, model = meshes()["four"], network()
    expected = convnorm.NormDecay(model, SHAPE, beta=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()]))
            placed.grad = distribute_tensor(torch.ones_like(parameter), mesh, [Replicate()])
            setattr(module, name, placed)
    decay = convnorm.NormDecay(copied, dict(SIZES), beta=0.3)
    with Traffic() as traffic:
        decay.step()
    assert traffic.sent == []
    expected.step()
    assert_close([whole(p.grad) for p in copied.parameters()], [p.grad for p in model.parameters()])


# --- what travels ----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """The collectives, by operator, and how many bytes each had."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.sent.append((func._opname, max(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


@on_every_rank
def test_no_weight_travels():
    mesh = meshes()["four"]
    plain = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 5, padding=2)
    model = nn.Sequential(*plain, nn.Conv2d(64, 64, 3, groups=4), nn.ConvTranspose2d(64, 32, 3))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    model(torch.randn(1, 32, 9, 9)).square().mean().backward()
    for ord, collectives in ((1, ["allreduce_", "allgather_"]), (math.inf, ["allreduce_", "allgather_"])):
        decay = convnorm.NormDecay(model, {"0": (9, 9), "1": (9, 9), "2": (9, 9), "3": (7, 7)}, ord=ord, beta=0.1)
        decay.step()
        with Traffic() as traffic:
            decay.step()
        assert [name for name, _ in traffic.sent] == collectives  # for plain layers and the transposed one
        channels = 32 + 64 + 64 if ord == 1 else 32
        assert traffic.sent[0][1] <= 8 * channels * 9, traffic.sent
        assert traffic.sent[1][1] <= 3 * 8 * 3
        least = min(layer.weight.numel() for layer in model)
        assert sum(size for _, size in traffic.sent) < least
    with Traffic() as traffic:
        whole(model[0].weight)
    assert traffic.sent, "gathering a weight would have been seen"


# --- what is refused -------------------------------------------------------------------------------------------------


@on_every_rank
def test_what_cannot_be_is_refused_by_name():
    mesh, pairs = meshes()["four"], meshes()["hybrid"]
    for placements, on in (([Shard(1)], mesh), ([Partial()], mesh), ([Shard(0), Shard(0)], pairs)):
        model = nn.Sequential(nn.Linear(8, 8))
        model[0].weight = nn.Parameter(DTensor.from_local(torch.ones(8, 8), on, placements, run_check=False))
        with pytest.raises(RuntimeError, match=r"layer '0' is placed as .*(Shard|Partial)"):
            convnorm.NormDecay(model, {"0": ()}, beta=1).step()
    weight = nn.Parameter(cut(torch.ones(8, 8), mesh))
    weight.grad = distribute_tensor(torch.ones(8, 8), mesh, [Replicate()])
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = weight
    with pytest.raises(RuntimeError, match=r"gradient of layer '0' is placed as .*Replicate.*Shard"):
        convnorm.NormDecay(model, {"0": ()}, beta=1).step()
    model = network()
    released = convnorm.NormDecay(model, SHAPE, beta=1, variant="released", include="linear")
    sharded(model, mesh)
    with pytest.raises(RuntimeError, match="'released'"):
        released.step()
    with pytest.raises(RuntimeError, match=r"layer 'reflect' is sharded.*step\(\)"):
        convnorm.NormDecay(model, dict(SIZES), beta=1).penalty()
    with pytest.raises(RuntimeError, match=r"layer 'reflect' is sharded.*example"):
        convnorm.NormDecay(model, SHAPE, beta=1)
    sizes = dict(SIZES) | {"reflect": (8, 2 if dist.get_rank() == 3 else 8)}
    with pytest.raises(RuntimeError, match="ranks see different layers or input sizes"):
        convnorm.NormDecay(model, sizes, beta=1).step()


@on_every_rank
def test_the_optimizer_that_reads_once():
    """``convnorm.optim.SGD``, which lets norm decay and ``torch.optim.SGD`` do it where weights are sharded."""
    one, mesh = network(), meshes()["four"]
    expected = train(one, convnorm.NormDecay(one, SHAPE, beta=0.3))
    for model in (DistributedDataParallel(network()), sharded(network(), mesh)):
        decay = convnorm.NormDecay(model, SIZES, beta=0.3)
        got = train(model, decay, share=(dist.get_rank(), WORLD), by="optim")
        assert_close(got, expected)
        assert_same_on_all_ranks(got)


@on_every_rank
def test_a_model_that_gets_its_values_after_it_was_sharded():
    with torch.device("meta"):
        model = Network()
    decay = convnorm.NormDecay(model, SHAPE, beta=0.3)
    sharded(model, meshes()["four"])
    with pytest.raises(RuntimeError, match="layer 'reflect' is on device meta"):
        decay.step()
    model.to_empty(device="cpu")
    one = network(torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for a, b in zip(model.parameters(), one.parameters(), strict=True):
            a.to_local().copy_(own_rows(b, a.device_mesh))
        decay.step()
    expected = convnorm.NormDecay(one, SHAPE, beta=0.3)
    expected.step()
    assert_close(decay.norms.values(), expected.norms.values(), 1e-6)


@on_every_rank
def test_a_forward_pass_between_backward_and_step_changes_nothing():
    mesh, one, model = meshes()["four"], network(), network()
    x = torch.randn(SHAPE, dtype=torch.float64)
    decays = [convnorm.NormDecay(one, SHAPE, beta=0.3), convnorm.NormDecay(sharded(model, mesh), beta=0.3)]
    for _ in range(2):
        for network_, decay in zip((one, model), decays, strict=True):
            network_(x).square().mean().backward()
            with torch.no_grad():
                network_(x)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                decay.step()
    assert_close([whole(p.grad) for p in model.parameters()], [p.grad for p in one.parameters()])


@on_every_rank
def test_a_model_that_is_sharded_late_is_followed():
    mesh, model = meshes()["four"], network()
    decay = convnorm.NormDecay(model, SHAPE, beta=0.3)
    decay.step()
    norms = list(decay.norms.values())
    sharded(model, mesh)
    with pytest.warns(UserWarning, match="was replaced"):
        decay.step()
    assert_close(decay.norms.values(), norms)
