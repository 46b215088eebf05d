"""The promise: what is recorded in training are the norms of each step, and recording changes nothing."""

import csv
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import convnorm
from convnorm.recorder import Recorder

SHAPE = [1, 3, 8, 8]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def train(model, steps, after=lambda step: None):
    """Returns the norms of each step, found by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        each = [convnorm.norms(model[0], [8, 8]), convnorm.norms(model[3])]
        expected.append([value.item() for norms in each for value in (norms.l1, norms.linf)])
        after(step)
    return expected


def read(path):
    with path.open() as file:
        heads, *lines = csv.reader(file)
    assert heads == ["step", "l1/0", "linf/0", "l1/3", "linf/3"]
    return {int(step): [float(value) for value in values] for step, *values in lines}


@pytest.mark.parametrize("flush_every", [1, 3, 100])
def test_every_step_is_recorded(tmp_path, flush_every):
    model = network()
    with Recorder(model, SHAPE, tmp_path / "norms.csv", flush_every=flush_every) as recorder:
        expected = train(model, 7, lambda step: recorder.step())
        assert len(read(tmp_path / "norms.csv")) == 7 // flush_every * flush_every
    assert read(tmp_path / "norms.csv") == dict(enumerate(expected))


def test_another_default_device_changes_nothing(tmp_path):
    model = network()
    with torch.device("meta"), Recorder(model, SHAPE, tmp_path / "norms.csv") as recorder:
        recorder.step()
    norms = convnorm.norms(model[0], [8, 8]), convnorm.norms(model[3])
    assert read(tmp_path / "norms.csv") == {0: [value.item() for both in norms for value in (both.l1, both.linf)]}


def test_some_steps_are_recorded(tmp_path):
    model = network()
    with Recorder(model, SHAPE, tmp_path / "norms.csv", every=3) as recorder:
        expected = train(model, 8, lambda step: recorder.step())
    assert read(tmp_path / "norms.csv") == {step: expected[step] for step in (0, 3, 6)}


def test_training_is_the_same(tmp_path):
    plain, watched = network(), network()
    with Recorder(watched, SHAPE, tmp_path / "norms.csv") as recorder:
        assert train(plain, 4) == train(watched, 4, lambda step: recorder.step())
    assert not [hook for module in watched.modules() for hook in module._forward_hooks]


def test_what_was_measured_is_written_when_training_fails(tmp_path):
    def fail(step):
        recorder.step()
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Recorder(network(), SHAPE, tmp_path / "norms.csv") as recorder:
        train(network(), 5, fail)
    assert list(read(tmp_path / "norms.csv")) == [0, 1, 2]


def test_a_file_is_continued(tmp_path):
    path, model = tmp_path / "norms.csv", network()
    for _ in range(2):
        with Recorder(model, SHAPE, path) as recorder:
            train(model, 3, lambda step, recorder=recorder: recorder.step())
    assert list(read(path)) == list(range(6))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_a_training_that_resumes_drops_what_it_does_again(tmp_path, start):
    path, model = tmp_path / "norms.csv", network()
    with Recorder(model, SHAPE, path) as recorder:
        first = train(model, 4, lambda step: recorder.step())
    with Recorder(model, SHAPE, path, start=start) as recorder:
        second = train(model, 2, lambda step: recorder.step())
    assert read(path) == dict(enumerate([*first[:start], *second]))


@pytest.mark.parametrize("lost", [b"", bytes(5)], ids=["killed", "power failed"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, lost):
    path, model = tmp_path / "norms.csv", network()
    with Recorder(model, SHAPE, path) as recorder:
        expected = train(model, 3, lambda step: recorder.step())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + (lost or lines[-1][:-5]))
    with Recorder(model, SHAPE, path) as recorder:
        expected = [*expected[:2], *train(model, 1, lambda step: recorder.step())]
    assert read(path) == dict(enumerate(expected))


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "norms.csv"
    Recorder(nn.Conv2d(3, 4, 3), SHAPE, path).close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other columns"):
        Recorder(network(), SHAPE, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("options", [{"every": 0}, {"flush_every": 0}])
def test_settings_that_record_nothing_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        Recorder(network(), SHAPE, tmp_path / "norms.csv", **options)
    with pytest.raises(ValueError, match="uses no"):
        Recorder(nn.ReLU(), SHAPE, tmp_path / "norms.csv")
    assert not (tmp_path / "norms.csv").exists()


def test_layers_in_several_precisions_and_sizes(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.high, self.low = nn.Conv2d(3, 3, 3).double(), nn.Conv2d(3, 3, 3).half()

        def forward(self, x):
            return self.low(self.high(self.high(self.low(x).double())).half())

    model = Mixed()
    with Recorder(model, torch.randn(1, 3, 12, 12).half(), tmp_path / "norms.csv") as recorder:
        recorder.step()
    heads, values = csv.reader((tmp_path / "norms.csv").open())
    assert heads[1::2] == ["l1/low@12x12", "l1/high@10x10", "l1/high@8x8", "l1/low@6x6"]
    layers = [(model.low, [12, 12]), (model.high, [10, 10]), (model.high, [8, 8]), (model.low, [6, 6])]
    expected = [
        value.item() for layer in layers for value in vars(convnorm.norms(*layer)).values() if torch.is_tensor(value)
    ]
    assert [float(value) for value in values[1:]] == expected


def test_a_computed_weight_is_read_without_changing_it(tmp_path):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Recorder(model, SHAPE, tmp_path / "norms.csv") as recorder:
        recorder.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    _, values = csv.reader((tmp_path / "norms.csv").open())
    assert float(values[1]) == convnorm.norms(model.eval()[0].weight, [8, 8]).l1.item()


def test_what_is_not_finite_is_recorded(tmp_path):
    model = network()
    with Recorder(model, SHAPE, tmp_path / "norms.csv") as recorder:
        nn.init.constant_(model[3].weight, math.nan)
        recorder.step()
    (values,) = read(tmp_path / "norms.csv").values()
    assert [math.isnan(value) for value in values] == [False, False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_waits_for_nothing(tmp_path):
    model = network().cuda()
    with Recorder(model, SHAPE, tmp_path / "norms.csv", flush_every=10) as recorder:
        recorder.step()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                recorder.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert len(read(tmp_path / "norms.csv")) == 6


def test_tensorboard_shows_the_same(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = network()
    with Recorder(model, SHAPE, tmp_path / "run", flush_every=2) as recorder:
        expected = train(model, 3, lambda step: recorder.step())
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for i, tag in enumerate(["l1/0", "linf/0", "l1/3", "linf/3"]):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(step, pytest.approx(values[i], rel=1e-6)) for step, values in enumerate(expected)]


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="package tensorboard is not installed: pip install tensorboard"):
        Recorder(network(), SHAPE, tmp_path / "run")


def test_a_layer_that_is_cast_on_the_way_is_recorded(tmp_path):
    model, path = network(), tmp_path / "norms.csv"
    with Recorder(model, SHAPE, path) as recorder:
        recorder.step()
        model[0].double()
        recorder.step()
    recorded = read(path)
    assert recorded[1] == pytest.approx(recorded[0])


HOOKS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("hook", HOOKS)
def test_a_weight_that_a_hook_computes_is_that_of_now(tmp_path, hook):
    """The module holds that of the last forward pass."""
    layer = HOOKS[hook](nn.Linear(6, 4))
    model, path = nn.Sequential(layer), tmp_path / "norms.csv"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Recorder(model, [1, 6], path) as recorder:
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
        recorder.step()
    _, values = csv.reader(path.open())
    model.eval()
    with torch.no_grad():
        matrix = (model(torch.eye(6)) - model(torch.zeros(6))).T
    assert float(values[1]) == pytest.approx(matrix.abs().sum(0).max().item(), rel=1e-5)
    assert float(values[2]) == pytest.approx(matrix.abs().sum(1).max().item(), rel=1e-5)


def test_one_layer_that_makes_several_output_sizes_of_one_input_size(tmp_path):
    class Upsampling(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(x, output_size=[5, 5]).sum() + self.up(x, output_size=[6, 6]).sum()

    model = Upsampling()
    with Recorder(model, [1, 3, 3, 3], tmp_path / "norms.csv") as recorder:
        recorder.step()
    heads, _ = csv.reader((tmp_path / "norms.csv").open())
    assert heads[1::2] == ["l1/up@3x3-5x5", "l1/up@3x3-6x6"]
    first, second = (convnorm.NormDecay(model, [1, 3, 3, 3], beta=1.0) for _ in range(2))
    for _ in range(3):
        first.step()
    assert list(first.norms) == ["up [3, 3] -> [5, 5]", "up [3, 3] -> [6, 6]"]
    second.load_state_dict(first.state_dict())
    grads = []
    for decay in (first, second):
        model.up.weight.grad = torch.zeros_like(model.up.weight)
        decay.step()
        grads.append(model.up.weight.grad)
    assert torch.equal(*grads)


def test_a_weight_that_is_computed_by_now_is_recorded_without_changing_it(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    with Recorder(model, [1, 4], tmp_path / "norms.csv") as recorder:
        parametrizations.spectral_norm(model[0])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        recorder.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _, values = csv.reader((tmp_path / "norms.csv").open())
    assert float(values[1]) == pytest.approx(convnorm.norms(model.eval()[0]).l1.item())
