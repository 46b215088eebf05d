"""The promise: ``python -m convnorm report`` and ``compare`` take what a model is kept in, or refuse it in one line."""

import csv
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from reported import SHAPE, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

import convnorm
from convnorm import __main__ as command
from convnorm import loading
from convnorm.comparison import compare
from convnorm.report import Report, report

NETWORKS = """
import torch
from torch import nn

def network(width=8):
    torch.manual_seed(0)
    return unseeded(width)

def unseeded(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(36 * width, 2))

def wide():
    return network(9)

def reads_values():
    for rate in torch.linspace(0, 1, 3):
        rate.item()
    return network()

def fails():
    raise RuntimeError("no such luck")

def unsaved_buffer():
    model = network()
    model.register_buffer("scale", torch.ones(1), persistent=False)
    return model

def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))

def number():
    return 3

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = network()

    def forward(self, x):
        return self.module(x)

class Plain(nn.Module):
    # tensors that are neither parameters nor buffers, and a weight that a hook computes

    def __init__(self):
        super().__init__()
        self.mean, self.layer = [torch.tensor(0.5)], nn.utils.weight_norm(nn.Conv2d(3, 3, 3))

    def forward(self, x):
        return self.layer(x - self.mean[0])

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x))
"""
INPUT = ["--input", "3", "8", "8"]


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A module ``networks``, and its checkpoints and programs, in the working directory."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import networks

    torch.manual_seed(5)
    model = trained(networks.network())
    nn.init.normal_(model[3].weight)
    torch.save(model.state_dict(), "weights.pt")
    torch.save(model.state_dict(), "old.pt", _use_new_zipfile_serialization=False)
    nested = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": nested}, "nested.pt")
    torch.save({"epoch": 3}, "none.pt")
    torch.save([torch.ones(2)], "list.pt")
    torch.save(model[:1].state_dict(), "few.pt")
    torch.save(nn.Sequential(*model, nn.Linear(2, 2)).state_dict(), "more.pt")
    Path("text.pt").write_text("no checkpoint")
    torch.export.save(torch.export.export(model, (torch.randn(SHAPE),)), "program.pt2")
    Path("text.pt2").write_text("no program")
    Path("text.json").write_text("no report")
    report(model, SHAPE, l2=False).to_json("report.json")
    yield model
    sys.modules.pop("networks", None)


def test_the_command_shows_and_writes_a_report(networks, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    files = [f"--{kind}={kind}.{kind}" for kind in ("json", "csv", "html")]
    assert command.main(["report", "networks:network", *INPUT, "--plot=plot.svg", *files]) == 0
    printed = capsys.readouterr()
    found = Report.from_json("json.json")
    assert found.title == "networks:network"
    assert all(any(line.startswith(f"{row.name} ") for line in printed.out.splitlines()) for row in found.rows)
    assert printed.err == ""  # no progress bar where there is no terminal
    assert Path("csv.csv").read_text() == found.to_csv()
    assert Path("html.html").read_text() == found.to_html()
    assert Path("plot.svg").read_text().startswith("<?xml")


CHECKPOINTS = ("weights.pt=networks:network", "old.pt=networks:network", "nested.pt=networks:network")
MADE_TWICE = ("weights.pt=networks:reads_values", "weights.pt=networks:unsaved_buffer")


@pytest.mark.parametrize("name", [*CHECKPOINTS, *MADE_TWICE, "program.pt2"])
def test_the_command_takes_checkpoints_and_programs(networks, name, capsys):
    pytest.importorskip("rich")
    given = [] if name.endswith("pt2") else INPUT
    assert command.main(["report", name, *given, "--no-l2", "--json", "found.json"]) == 0
    expected = report(networks, SHAPE, l2=False)
    assert Report.from_json("found.json").rows == expected.rows


@pytest.mark.parametrize("path", ["epoch=3.ckpt", "lr=0.1/weights.pt"])
def test_a_path_may_have_equals_signs(networks, path, capsys):
    pytest.importorskip("rich")
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(networks.state_dict(), path)
    assert command.main(["report", f"{path}=networks:network", *INPUT, "--no-l2", "--json", "found.json"]) == 0
    found = Report.from_json("found.json")
    assert (found.title, found.rows) == (path, report(networks, SHAPE, l2=False).rows)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(networks, prefix):
    torch.save({prefix + name: value for name, value in networks.state_dict().items()}, "prefixed.pt")
    model = loading.load_model("prefixed.pt=networks:network")
    assert torch.equal(model[0].weight, networks[0].weight)
    torch.save({f"{prefix}module.{name}": value for name, value in networks.state_dict().items()}, "prefixed.pt")
    model = loading.load_model("prefixed.pt=networks:Wrapped")
    assert torch.equal(model.module[0].weight, networks[0].weight)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager"), nn.Identity()])
def test_checkpoints_of_averaged_models_are_those_of_the_model(networks, wrap):
    torch.save(AveragedModel(wrap(networks)).state_dict(), "averaged.pt")
    model = loading.load_model("averaged.pt=networks:network")
    assert torch.equal(model[0].weight, networks[0].weight)


def test_a_model_may_have_a_prefix_itself(networks):
    torch.save({f"module.{name}": value for name, value in networks.state_dict().items()}, "own.pt")
    model = loading.load_model("own.pt=networks:Wrapped")
    assert torch.equal(model.module[0].weight, networks[0].weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("name", "shape"), [("Plain", SHAPE), ("Tied", [1, 8])])
def test_a_checkpoint_makes_the_model_that_was_saved(networks, name, shape):
    made = loading.load_model(f"networks:{name}")
    torch.save(made.state_dict(), "made.pt")
    loaded = report(loading.load_model(f"made.pt=networks:{name}"), shape, l2=False, bounds=True)
    assert loaded == report(made, shape, l2=False, bounds=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_checkpoint_of_older_modules_is_taken_as_pytorch_takes_it(networks):
    """Many that can be downloaded are of before batch norms counted, or weight norms were parametrizations."""
    kept = {name: value for name, value in networks.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(kept, "uncounted.pt")
    assert torch.equal(loading.load_model("uncounted.pt=networks:network")[0].weight, networks[0].weight)
    old = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))
    torch.save(old.state_dict(), "hooked.pt")
    assert torch.equal(loading.load_model("hooked.pt=networks:parametrized")[0].weight, old[0].weight)


def test_a_checkpoint_stays_in_its_file(networks):
    """No weights are drawn, none are copied."""
    before = torch.get_rng_state()
    model = loading.load_model("weights.pt=networks:unseeded")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight, networks[0].weight)
    if (maps := Path("/proc/self/maps")).exists():
        assert "weights.pt" in maps.read_text()


def test_the_command_compares(networks, capsys):
    pytest.importorskip("rich")
    assert command.main(["report", "networks:wide", *INPUT, "--no-l2", "--json", "wide.json"]) == 0
    models = ["networks:network", "weights.pt=networks:network", "wide.json"]
    files = ["--csv", "all.csv", "--html", "all.html"]
    assert command.main(["compare", *models, *INPUT, "--no-l2", "--layers", "linf", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    for title in ("networks:network", "weights.pt", "networks:wide"):
        assert any(line.startswith(f"{title} ") for line in lines)
    reports = [
        report(loading.load_model(model), SHAPE, l2=False, title=model.partition("=")[0]) for model in models[:2]
    ]
    assert Path("all.html").read_text() == compare([*reports, Report.from_json("wide.json")]).to_html()
    read = list(csv.DictReader(io.StringIO(Path("all.csv").read_text())))
    assert {line["title"] for line in read} == {"networks:network", "weights.pt", "networks:wide"}


WRONG = {
    "unknown module": ["nowhere:network", *INPUT],
    "unknown factory": ["networks:nothing", *INPUT],
    "factory that fails": ["networks:fails", *INPUT],
    "no module": ["networks:number", *INPUT],
    "no input": ["networks:network"],
    "wrong channels": ["networks:network", "--input", "4", "8", "8"],
    "wrong size": ["networks:network", "--input", "3", "9", "8"],
    "too few sizes": ["networks:network", "--input", "3"],
    "no file": ["nothing.pt=networks:network", *INPUT],
    "no program file": ["nothing.pt2"],
    "checkpoint of another model": ["weights.pt=networks:wide", *INPUT],
    "checkpoint of fewer layers": ["few.pt=networks:network", *INPUT],
    "checkpoint of more layers": ["more.pt=networks:network", *INPUT],
    "no state dict": ["none.pt=networks:network", *INPUT],
    "no dictionary": ["list.pt=networks:network", *INPUT],
    "no checkpoint": ["text.pt=networks:network", *INPUT],
    "no program": ["text.pt2"],
    "sizes for a program": ["program.pt2", *INPUT],
    "no report": ["text.json"],
    "sizes for a report": ["report.json", *INPUT],
    "bounds for a report": ["report.json", "--bounds"],
    "less of a report": ["report.json", "--no-l2"],
    "another rtol for a report": ["report.json", "--rtol", "1e-3"],
    "no folder": ["networks:network", *INPUT, "--json", "nowhere/report.json"],
    "no picture": ["networks:network", *INPUT, "--plot", "plot.txt"],
    "rtol": ["networks:network", *INPUT, "--rtol", "0"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WRONG)
def test_the_command_refuses_in_one_line(networks, what, capsys):
    pytest.importorskip("rich")
    assert command.main(["report", *WRONG[what]]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("convnorm: ")
    assert printed.out == ""


class Touching:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_no_code(networks, zipped):
    torch.save({"weight": Touching()}, "code.pt", _use_new_zipfile_serialization=zipped)
    assert command.main(["report", "code.pt=networks:network", *INPUT]) == 2
    assert not Path("touched").exists()


@pytest.mark.parametrize("given", [("report.json", "--no-l2"), ("report.json", *INPUT), ("program.pt2", *INPUT)])
def test_options_that_would_change_nothing_are_refused_of_several_models_too(networks, given, capsys):
    pytest.importorskip("rich")
    assert command.main(["compare", given[0], *given]) == 2
    assert given[1] in capsys.readouterr().err
    assert command.main(["compare", "networks:network", *given[:1], *INPUT, "--no-l2"]) == 0  # one of them needs both


@pytest.mark.parametrize("name", ["weights.pt", "epoch=3.ckpt"])
def test_a_checkpoint_without_its_model_is_told_from_a_module(networks, name, capsys):
    pytest.importorskip("rich")
    Path("weights.pt").rename(name)
    assert command.main(["report", name, *INPUT]) == 2
    error = f"convnorm: MODEL {name!r} is a file: a state dict goes with a model, {name}=MODEL\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(("package", "name"), [("torchvision", "resnet18"), ("timm", "timm:resnet18")])
def test_a_missing_package_is_named(networks, package, name, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, package, None)
    assert command.main(["report", name, *INPUT]) == 2
    assert "is not installed: pip install" in capsys.readouterr().err


def test_the_command_runs_from_a_shell(networks, tmp_path):
    pytest.importorskip("rich")
    paths = [tmp_path, Path(convnorm.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    line = [sys.executable, "-m", "convnorm", "report", "nothing.pt=networks:network", *INPUT]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "convnorm: file 'nothing.pt' is not there\n"
    line[4:] = ["networks:network", "--input", "3", "9", "8"]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    line[4:] = ["weights.pt=networks:network", *INPUT, "--no-l2"]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18", "timm:resnet18"])
def test_models_by_their_names_elsewhere(name):
    for package in ("torchvision", "timm") if "timm" in name else ("torchvision",):
        if not find_spec(package):  # whether it can be imported is what is tested
            pytest.skip(f"{package} is not installed")
    found = report(loading.load_model(name), [1, 3, 64, 64], l2=False)
    assert len(found.rows) == 21
    assert sum(row.folded is not None for row in found.rows) == 20
    with pytest.raises(ValueError, match=r"is no model of \w+; there is .*resnet18"):
        loading.load_model(f"{name}x")
