"""How times are taken: a contender and what it is compared with by turns, in blocks of calls of equal length.

Other work on a machine slows both blocks of a pair alike, so that their ratio stands where their times do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .record import Quantiles

BLOCK = 1e-3  # seconds
LEAST_ROUNDS = 5

Call = Callable[[], object]


@dataclass
class Block:
    """As many runs as fill a block. Calling it takes one block's time: ``seconds`` holds those of one call."""

    run: Call
    device: str
    calls_per_run: float = 1  # or what a run is worth, in calls
    runs: int = 1
    seconds: list[float] = field(default_factory=list)

    def fill(self, duration: float) -> float:
        """Find how many runs take this long; returns what they do take, since they are one at least."""
        while (taken := min(self._time() for _ in range(3))) < duration / 2:  # the least: others interrupt
            self.runs *= 2
        before, self.runs = self.runs, max(1, round(self.runs * duration / taken))
        return taken * self.runs / before

    def __call__(self) -> None:
        self.seconds.append(self._time() / (self.runs * self.calls_per_run))

    @property
    def us(self) -> Quantiles:
        return Quantiles.of([1e6 * s for s in self.seconds])

    def ratio_to(self, other: Block) -> Quantiles:
        """Round by round."""
        return Quantiles.of([time / its for time, its in zip(self.seconds, other.seconds, strict=True)])

    def _time(self) -> float:
        run, runs = self.run, range(self.runs)
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in runs:
                run()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in runs:
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@dataclass
class Between:
    """What is done between the blocks, untimed."""

    action: Call

    def fill(self, duration: float) -> None:
        pass

    def __call__(self) -> None:
        self.action()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads, or as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def block(calls: Sequence[Call], device: str, graph: bool = False) -> Block:
    """A block of calls in rotation, or replayed as one CUDA graph of all of them."""
    if graph:
        return Block(replayed(calls), device, len(calls))
    if len(calls) == 1:
        return Block(calls[0], device)
    return Block(lambda: [call() for call in calls], device, len(calls))


def replayed(calls: Sequence[Call]) -> Call:
    """One CUDA graph of all calls, one after another: its launch is shared among them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is built on first use must not be captured
        for call in (*calls, *calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def device_copy(size: int, buffer: int = 1 << 29) -> Block:
    """Reading ``size`` bytes at the GPU's copy bandwidth, which counts a byte copied as one read and one written."""
    source = torch.zeros(buffer, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Block(lambda: target.copy_(source), "cuda", calls_per_run=2 * buffer / size)


def launches(call: Call) -> int | None:
    """How many kernels, copies and fills a call starts on the GPU; None where the profiler sees none."""
    call()  # what happens on first use does not count
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profile.events()) or None


def by_turns(benchmark: Callable, contender: Block, others: Sequence[Block | Between], seconds: float) -> None:
    """Rounds of one block of each for about so many seconds, run by pytest-benchmark."""
    duration = contender.fill(BLOCK)
    for other in others:
        other.fill(duration)

    def others_first() -> None:
        for other in others:
            other()

    rounds = max(LEAST_ROUNDS, round(seconds / (duration * (1 + len(others)))))
    benchmark.pedantic(contender, setup=others_first, rounds=rounds)
