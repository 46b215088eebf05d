"""Independent cells, spread over processes: local ones, or Ray's on one or several machines.

An engine is a generator of what has ended, ``(cell, None)`` or ``(cell, what went wrong)``, and of None now and then,
for whoever draws its progress. Workers write rows, checkpoints and progress to the run's folder; machines share it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .cell import Cell, Protocol
from .data import load
from .ranks import check_usable
from .run import run

Ended = tuple[Cell, str | None]
TICK = 0.5  # seconds
loaded = lru_cache(maxsize=1)(load)  # one data set in a worker, whatever the number of its cells


@dataclass(frozen=True)
class Work:
    """What the cells of a run have in common."""

    protocol: Protocol
    out: Path
    data: Path | None
    device: str
    threads: int  # of each worker

    def do(self, cell: Cell, device: str) -> str | None:
        """Within a worker. What went wrong comes back as text: one line, or the traceback of what nobody foresaw."""
        torch.set_num_threads(self.threads)
        news = news_file(self.out, cell)
        try:
            data = loaded(self.protocol.dataset, self.data)
            run(cell, self.protocol, data, self.out, torch.device(device), lambda told: write_news(news, told))
        except (ValueError, OSError, ImportError) as error:
            return str(error)
        except Exception:
            return traceback.format_exc()
        finally:
            news.unlink(missing_ok=True)
        return None

    def devices(self) -> list[str]:
        if self.device != "cuda":
            return [self.device]
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]

    def places(self) -> int:
        """How many cells to train at a time, unless told."""
        at_once = len(self.devices()) if self.device.startswith("cuda") else os.cpu_count() // self.threads
        return max(1, at_once)


def news_file(out: Path, cell: Cell) -> Path:
    return out / "progress" / f"{cell.name}.json"


def write_news(file: Path, news: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(news))
    new.replace(file)  # whoever reads sees a whole one


def forget_news(out: Path, cells: Sequence[Cell]) -> None:
    """Of workers that were killed."""
    for cell in cells:
        for left in (out / "progress").glob(f"{cell.name}.*"):
            left.unlink(missing_ok=True)


def local(cells: Sequence[Cell], work: Work, jobs: int) -> Iterator[Ended | None]:
    """``jobs`` processes of this machine, taking its GPUs by turns. Of one that dies, only the cell is lost."""
    check_usable(work.device)
    forget_news(work.out, cells)
    context = multiprocessing.get_context("spawn")  # a process with CUDA or threads cannot be forked
    lifeline, held = context.Pipe(duplex=False)
    devices = work.devices()
    waiting, running = deque(cells), dict[Future[str | None], tuple[Cell, int]]()

    def worker() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=context, initializer=live_by, initargs=(lifeline,))

    def begin(place: int) -> None:
        if waiting:
            cell = waiting.popleft()
            with uninterrupted():
                running[workers[place].submit(work.do, cell, devices[place % len(devices)])] = cell, place

    workers = [worker() for _ in range(jobs)]
    try:
        for place in range(jobs):
            begin(place)
        while running:
            for future in wait(running, TICK, FIRST_COMPLETED).done:
                cell, place = running.pop(future)
                try:
                    error = future.result()
                except BrokenProcessPool:
                    error = "its process was killed, by the system if memory ran out"
                    workers[place] = worker()
                begin(place)
                yield cell, error
            yield None
    finally:
        held.close()
        for each in workers:
            each.shutdown(wait=False, cancel_futures=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While processes start: Ctrl-C goes to all of a terminal, and they inherit that it is not for them. Here it waits
    until they have started, also where a thread that does not block it takes it.
    """
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # which alone has handlers
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def live_by(lifeline: Connection) -> None:
    """A worker ends once nobody holds the other end: when its engine does, even by SIGKILL."""

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ray(cells: Sequence[Cell], work: Work, jobs: int) -> Iterator[Ended | None]:
    """Ray's workers: of the cluster that RAY_ADDRESS names, else of this machine. GPUs take as many as they do here."""
    try:
        import ray
    except ImportError:
        raise ImportError("engine 'ray' needs Ray: pip install \"convnorm[ray]\"") from None
    forget_news(work.out, cells)
    work = replace(work, out=work.out.absolute(), data=work.data and work.data.absolute())  # workers may be elsewhere
    address = os.environ.get("RAY_ADDRESS")
    room = {"address": address} if address else {"num_cpus": jobs * work.threads, "include_dashboard": False}
    code = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    ray.init(**room, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": code}})
    gpus = part_of_gpu(jobs, len(work.devices())) if work.device == "cuda" else 0
    task = ray.remote(num_cpus=work.threads, num_gpus=gpus, max_retries=0)(work.do.__func__)
    try:
        futures = {task.remote(work, cell, work.device): cell for cell in cells}
        pending = list(futures)
        while pending:
            done, pending = ray.wait(pending, timeout=TICK)
            for future in done:
                try:
                    yield futures[future], ray.get(future)
                except ray.exceptions.RayError as error:
                    yield futures[future], str(error)
            yield None
    finally:
        ray.shutdown()


def part_of_gpu(jobs: int, gpus: int) -> float:
    """Of each of ``jobs`` cells, in ten-thousandths as Ray counts it.

    >>> part_of_gpu(8, gpus=8), part_of_gpu(12, gpus=8), part_of_gpu(3, gpus=1)
    (1.0, 0.5, 0.3333)
    """
    on_each = -(-jobs // max(1, gpus))
    return 10_000 // on_each / 10_000


ENGINES: dict[str, Callable[[Sequence[Cell], Work, int], Iterator[Ended | None]]] = {"local": local, "ray": ray}
