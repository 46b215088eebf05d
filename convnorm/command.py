"""``python -m convnorm report MODEL`` and ``compare MODEL MODEL``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from . import loading
from .comparison import Comparison, compare
from .report import Report, report
from .reporting.measure import Progress
from .reporting.optional import optional
from .reporting.row import ORDS

WIDTH = 100  # of a table that goes to a file or a pipe
RTOL = 1e-2


def add_commands(commands: argparse._SubParsersAction) -> None:
    one = commands.add_parser(
        "report",
        help="the norms of all layers",
        description=(report.__doc__ or "").partition("\n")[0],  # python -OO has none
        epilog=loading.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("model", metavar="MODEL", help="see below")
    _add_options(one)
    one.add_argument("--bounds", action="store_true", help="also certified Lipschitz constants of the whole network")
    one.set_defaults(run=run_report)
    several = commands.add_parser(
        "compare",
        help="several models or checkpoints side by side",
        description="Reports side by side. MODEL may also be a JSON file that `report --json` wrote.",
        epilog=loading.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several.add_argument("models", metavar="MODEL", nargs="+", help="see below")
    _add_options(several)
    several.add_argument("--layers", choices=list(ORDS), help="also show this norm layer by layer")
    several.set_defaults(run=run_compare)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=int, nargs="+", metavar="SIZE", help="channels and spatial sizes: 3 224 224")
    parser.add_argument("--no-l2", action="store_true", help="l1 and linf only, which take no time")
    parser.add_argument("--rtol", type=float, default=RTOL, help="how narrow the brackets of l2 are (%(default)s)")
    parser.add_argument("--no-batch-norm", action="store_true", help="without norms that include batch norms")
    for kind in ("json", "csv"):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write it as {kind.upper()}")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")


def run_report(options: argparse.Namespace) -> int:
    _check(options)
    found = measured(options.model, options)
    _write(found, options)  # first: the table may end in a pipe that closes, or in letters that it cannot print
    show(found.table(width()))
    return 0


def run_compare(options: argparse.Namespace) -> int:
    _check(options)
    together = compare([measured(model, options) for model in options.models])
    _write(together, options)
    show(together.table(width()))
    if options.layers:
        show(together.layer_table(ORDS[options.layers], width()))
    return 0


def measured(name: str, options: argparse.Namespace) -> Report:
    if name.endswith(".json"):
        loading.readable(name)
        return Report.from_json(Path(name))
    model = loading.load_model(name)
    exported = not isinstance(model, nn.Module)
    if options.input is None and not exported:
        raise ValueError(f"convnorm: --input is missing: channels and spatial sizes of what {name!r} is given")
    with progress_bar(name) as progress:
        return report(
            model,
            None if exported else [1, *options.input],
            l2=not options.no_l2,
            rtol=options.rtol,
            batch_norm=not options.no_batch_norm,
            bounds=getattr(options, "bounds", False),
            title=name if exported else name.rpartition("=")[0] or name,
            progress=progress,
        )


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """On standard error, if that is a terminal, and gone afterwards."""
    rich = optional("rich", "rich.progress")
    console = optional("rich", "rich.console").Console(stderr=True)
    with rich.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, layer: bar.update(task, completed=done, total=total, description=layer or title)


def width() -> int:
    return optional("rich", "rich.console").Console().width if sys.stdout.isatty() else WIDTH


def show(table: object) -> None:
    optional("rich", "rich.console").Console(width=width()).print(table)


def _check(options: argparse.Namespace) -> None:
    """Before anything is measured for a file that could not be written."""
    optional("rich")
    models = [options.model] if "model" in options else options.models
    if options.input and all(model.endswith(".pt2") for model in models):
        raise ValueError(f"convnorm: --input {options.input}: an exported program brings its own sizes")
    if all(model.endswith(".json") for model in models):
        names = ("input", "no_l2", "no_batch_norm", "bounds")
        given = [name for name in names if getattr(options, name, False)] + ["rtol"] * (options.rtol != RTOL)
        if given:
            what = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"convnorm: {what}: a report such as {models[0]!r} is shown as it was measured")
    if options.plot:
        optional("matplotlib")
    for path in filter(None, (options.json, options.csv, options.html, options.plot)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"convnorm: folder {str(Path(path).parent)!r} of {path!r} is not there")
    if options.plot and Path(options.plot).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"convnorm: --plot {options.plot!r} must end in .png, .svg or .pdf")


def _write(found: Report | Comparison, options: argparse.Namespace) -> None:
    for kind in ("json", "csv", "html"):
        if path := getattr(options, kind):
            getattr(found, f"to_{kind}")(path)
    if options.plot:
        found.plot(options.plot)
