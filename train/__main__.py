"""``python -m train``: the experiments of *Large Norms of CNN Layers Do Not Hurt Adversarial Robustness*."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from . import evaluate, figure2, ranks, rows, table2, theory, widths
from .attacks import RELEASED, STANDARD
from .cell import ALLOWED, METHODS, PRESETS, Cell, Protocol, protocol
from .data import NAMES, Data, directory_of, load
from .engines import ENGINES, Work
from .methods import ADVERSARIAL
from .models import PAPER
from .progress import Board
from .ranks import check_usable
from .run import run

ATTACKS = {"standard": STANDARD, "released": RELEASED, "apgd-ce": ("apgd-ce",)}
EXPERIMENTS = {"table2": "norm regularisation", "figure2": "adversarial training", "widths": "width against robustness"}
PAGES = {"table2": table2.render, "figure2": figure2.render}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m train: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    exact = partial(argparse.ArgumentParser, allow_abbrev=False)  # --seed is no short form of --seeds
    whole = exact(prog="python -m train", description=(__doc__ or "").partition(": ")[2])
    commands = whole.add_subparsers(required=True, metavar="COMMAND", parser_class=exact)

    one = commands.add_parser("run", help="train one network, attack it, and write its row")
    one.add_argument("--model", required=True, choices=tuple(PAPER))
    one.add_argument("--method", required=True, choices=METHODS)
    one.add_argument("--beta", type=float, help="strength: of decay, ALP and TRADES; what 'clip' clips to")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--experiment", choices=ALLOWED["experiment"], help="whose protocol (default: the method's)")
    one.add_argument(
        "--watch",
        type=Path,
        metavar="PATH",
        help="l1 and linf of all layers at every step: to FILE.csv, or TensorBoard",
    )
    add_protocol(one)
    one.set_defaults(command=run_one)

    for name, what in EXPERIMENTS.items():
        all = commands.add_parser(name, help=f"{what}: train the missing cells, render all from their rows")
        all.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells by name: 'resnet18-*'")
        all.add_argument("--render", action="store_true", help="train nothing")
        all.add_argument("--engine", choices=tuple(ENGINES), default="local")
        all.add_argument(
            "--jobs", type=count, help="cells at a time, on this machine's GPUs or cores (default: one on each)"
        )
        add_protocol(all, "--seeds", less=["--width"] if name == "widths" else ())  # it has widths of its own
        all.set_defaults(command=run_widths if name == "widths" else run_all, experiment=name)

    network = commands.add_parser("evaluate", help="all that is measured of one trained network, as a page")
    evaluate.add_arguments(network)
    network.set_defaults(command=evaluate.main)

    proofs = commands.add_parser(
        "theory", help="build the networks of Propositions 1 and 2 and Theorem 2, and check them"
    )
    proofs.add_argument("--out", type=Path, default=Path("runs/theory"), metavar="DIR", help="(default: runs/theory)")
    proofs.add_argument("--eps", type=evaluate.radius, default=0.04, help="of the attacks (default: 0.04)")
    proofs.add_argument("--xi", type=float, default=1000, help="least Lipschitz constant (default: 1000)")
    proofs.add_argument("--norm", type=float, default=1000, help="least norm of each layer (default: 1000)")
    proofs.set_defaults(command=run_theory)
    return whole


def add_protocol(command: argparse.ArgumentParser, *more: str, less: Sequence[str] = ()) -> None:
    """The options that say how, where and on what to train; with ``more`` of them, without ``less``."""
    command.add_argument("--preset", choices=PRESETS, default="smoke", help="(default: smoke)")
    command.add_argument("--data", metavar="DIR", help="directory of the data set (or CONVNORM_DATA)")
    command.add_argument("--dataset", choices=NAMES, help="(default: cifar10 if there is a directory, else synthetic)")
    command.add_argument("--out", type=Path, metavar="DIR", help="rows, checkpoints, pages (default: runs/...)")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--threads", type=count, help="of each process on a CPU")
    changes = command.add_argument_group("changes to the preset")
    for option in ("--epochs", "--training-images", "--test-images", "--attacked-images", "--batch", *more):
        changes.add_argument(option, type=int, metavar="N")
    for option in ("--width", "--learning-rate"):
        if option not in less:
            changes.add_argument(option, type=float, metavar="X")
    changes.add_argument("--eps", type=evaluate.radius, metavar="X", help="of the attack: 0.031 or 8/255")
    changes.add_argument("--attacks", type=lambda name: ATTACKS.get(name, (name,)), metavar="|".join(ATTACKS))
    changes.add_argument("--variant", choices=ALLOWED["variant"], help="of norm decay and clipping")
    changes.add_argument("--precision", choices=ALLOWED["precision"])
    changes.add_argument("--compiled", action="store_true", default=None, help="training steps by torch.compile")


def count(text: str) -> int:
    """
    >>> count("3")
    3
    """
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def chosen(options: argparse.Namespace, experiment: str, data: Data) -> Protocol:
    """The preset with the changes to it, and no more images than there are."""
    preset = protocol(experiment, options.preset)
    changes = {name: value for name, value in vars(options).items() if value is not None and hasattr(preset, name)}
    changed = replace(preset, **changes | {"dataset": data.name, "experiment": experiment})
    training_images = min(changed.training_images, len(data.training))
    test_images = min(changed.test_images, len(data.test))
    attacked_images = min(changed.attacked_images, test_images)
    return replace(changed, training_images=training_images, test_images=test_images, attacked_images=attacked_images)


def given(options: argparse.Namespace) -> tuple[Data, Path | None]:
    directory = directory_of(options.data)
    if not (options.dataset or directory):
        print("neither --data nor CONVNORM_DATA: on synthetic images", file=sys.stderr)
    return load(options.dataset or ("cifar10" if directory else "synthetic"), directory), directory


def run_one(options: argparse.Namespace) -> int:
    experiment = options.experiment or ("figure2" if options.method in ADVERSARIAL else "table2")
    cell = Cell(options.model, options.method, options.beta, options.seed)
    data, _ = given(options)
    how = chosen(options, experiment, data)
    out = folder_of(experiment, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not rows.missing(out, [cell], how):
        there = f"row {str(rows.path(out, cell))!r} is there"
        if options.watch and not options.watch.exists():
            raise ValueError(f"{there}: its training can be watched with another --out only")
        if os.environ.get("RANK", "0") == "0":
            print(there)
        return 0
    with ranks.joined(options.device) as device:
        board = Board(1, quiet=ranks.rank() > 0)
        with board.shown():
            row = run(cell, how, data, out, device, lambda news: board.tell(cell, news), options.watch)
        board.ended(cell, row)
    return 0


def run_all(options: argparse.Namespace) -> int:
    out, failed = folder_of(options.experiment, options), 0
    if not options.render:
        data, directory = given(options)
        how = chosen(options, options.experiment, data)
        failed = fill(how.cells(), how, out, directory, options)
    print(PAGES[options.experiment](rows.read(out), out))
    return 1 if failed else 0


def folder_of(experiment: str, options: argparse.Namespace) -> Path:
    return options.out or Path("runs") / f"{experiment}-{options.preset}"


def run_widths(options: argparse.Namespace) -> int:
    out, failed = folder_of(options.experiment, options), 0
    if options.render:
        print(widths.render(out))
        return 0
    data, directory = given(options)
    how = chosen(options, "figure2", data)
    check_usable(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)  # of the evaluations, in this process
    for part, folder, cells in widths.parts(how, out):
        failed += fill(cells, part, folder, directory, options)
        for cell in only(cells, options):
            place = widths.evaluation(folder, cell)
            file = rows.path(folder, cell)
            trained = file.exists() and "diverged" not in rows.read_one(file)
            if trained and not (place / "evaluation.json").exists():
                evaluate.evaluate(
                    folder / "checkpoints" / f"{cell.name}.pt",
                    data,
                    eps=part.eps,
                    images=part.attacked_images,
                    attacks=part.attacks,
                    iterations=part.attack_iterations,
                    out=place,
                    device=torch.device(options.device),
                )
    print(widths.render(out))
    return 1 if failed else 0


def only(cells: Sequence[Cell], options: argparse.Namespace) -> list[Cell]:
    return [cell for cell in cells if any(fnmatchcase(cell.name, pattern) for pattern in options.only)]


def fill(cells: Sequence[Cell], how: Protocol, out: Path, directory: Path | None, options: argparse.Namespace) -> int:
    """Trains those that are asked for and have no row; how many failed."""
    asked = only(cells, options)
    if not asked:
        raise ValueError(f"--only {' '.join(options.only)} is none of the cells, such as {cells[0].name}")
    missing = rows.missing(out, asked, how)
    if not missing:
        return 0
    if "LOCAL_RANK" in os.environ:
        raise ValueError("torchrun is for one network: python -m train run; cells are spread by --engine and --jobs")
    work = Work(how, out, directory, options.device, options.threads or 1)
    jobs = options.jobs or work.places()
    waiting, failed = list(missing), 0
    board = Board(len(missing))
    with board.shown():
        for ended in ENGINES[options.engine](missing, work, min(jobs, len(missing))):
            if ended is None:
                board.look(out, waiting)
                continue
            cell, error = ended
            waiting.remove(cell)
            failed += error is not None
            board.ended(cell, error or rows.read_one(rows.path(out, cell)))
    return failed


def run_theory(options: argparse.Namespace) -> int:
    checks = theory.run(options.out, eps=options.eps, xi=options.xi, norm=options.norm)
    print(theory.table(checks))
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
