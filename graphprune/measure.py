"""Latency, measured so that two numbers can be compared.

Candidates take turns within every round and the order changes, so a slow minute of the machine hits all of
them alike; a ratio is the median of per-round ratios. Several thread pools in one process (torch's OpenMP,
ONNX Runtime's own) slow each other down while their threads spin at barriers: :func:`isolated` gives every
candidate a process of its own, still taking turns, and is what benchmarks should use.

>>> timings = interleaved({"a": lambda: sum(range(100)), "b": lambda: sum(range(10_000))}, rounds=5)
>>> ratio(timings["b"], timings["a"]).median > 1
True
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .errors import GraphpruneError, InputError
from .threads import torch_threads


@dataclass(frozen=True)
class Timing:
    """Latency of one candidate.

    Attributes:
        median_ms: the median over all rounds, milliseconds a call.
        low_ms, high_ms: the quartiles, milliseconds.
        rounds: how many calls were timed.
        threads: torch's intra-operator threads while it ran (a runtime that was opened with its own
            number of threads keeps that).
        samples: milliseconds of every round, in order.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    threads: int
    samples: tuple[float, ...] = field(repr=False, default=())

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.low_ms:.3g} to {self.high_ms:.3g}, {self.threads} threads)"


@dataclass(frozen=True)
class Ratio:
    """How many times one latency another is: the median and quartiles of the per-round ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.0,
    threads: int | None = None,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Time candidates in turns within this process.

    Args:
        candidates: name → a call without arguments.
        rounds: the least number of timed calls of each.
        warmup: calls of each before timing starts.
        min_seconds: go on until this much time was measured in all.
        threads: torch's intra-operator threads meanwhile (restored afterwards); ``None`` leaves them.
        pause: seconds of rest before each call, for threads of the one before to stop spinning.

    Raises:
        InputError: there is no candidate, or a number makes no sense.
    """
    _check(candidates, rounds, warmup, threads)
    with torch_threads(threads) as used, _no_collection():
        for call in candidates.values():
            for _ in range(warmup):
                call()
        turns = {name: partial(_once, call) for name, call in candidates.items()}
        samples = _rounds(turns, rounds, min_seconds, pause)
    return {name: _timing(values, used) for name, values in samples.items()}


def isolated(
    factories: Mapping[str, Callable[[], Callable[[], Any]]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.0,
    threads: int | None = None,
    pause: float = 0.0,
    start: str = "spawn",
) -> dict[str, Timing]:
    """Time candidates in turns, each in a fresh process; the arguments are :func:`interleaved`'s.

    Args:
        factories: name → a function that can be pickled (module level, or ``functools.partial`` of one)
            and that builds the call in its own process.
        pause: seconds of rest before each call, so that threads of the process that ran before stop
            spinning and give their cores back.
        start: how a process begins, in the words of :mod:`multiprocessing`: ``spawn`` imports everything
            again, ``forkserver`` shares what its server has imported, which is less memory for many.

    Raises:
        InputError: there is no candidate, or a number makes no sense.
        GraphpruneError: a candidate failed in its process; names it.
    """
    _check(factories, rounds, warmup, threads)
    context: Any = multiprocessing.get_context(start)
    workers: dict[str, Any] = {}
    pipes: dict[str, Any] = {}
    try:
        for name, factory in factories.items():
            pipes[name], theirs = context.Pipe()
            workers[name] = context.Process(
                target=_work, args=(theirs, factory, warmup, threads), daemon=True
            )
            workers[name].start()
            theirs.close()
        used = {name: int(_answer(name, pipe)) for name, pipe in pipes.items()}

        def turn(name: str) -> float:
            pipes[name].send(True)
            return _answer(name, pipes[name])

        samples = _rounds({name: partial(turn, name) for name in factories}, rounds, min_seconds, pause)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers.values():
            worker.join(timeout=5)
            if worker.is_alive():
                worker.terminate()
                worker.join()
    return {name: _timing(values, used[name]) for name, values in samples.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """``a / b`` round by round.

    Raises:
        InputError: the timings are not of the same measurement.
    """
    if not a.samples or len(a.samples) != len(b.samples):
        raise InputError("a ratio needs two timings of one measurement, with a sample of each in every round")
    return Ratio(*_quartiles([x / y for x, y in zip(a.samples, b.samples, strict=True)]))


def _check(candidates: Mapping[str, Any], rounds: int, warmup: int, threads: int | None) -> None:
    if not candidates:
        raise InputError("nothing to measure: no candidate was given")
    if rounds < 1 or warmup < 0 or (threads is not None and threads < 1):
        raise InputError(f"cannot measure with rounds={rounds}, warmup={warmup}, threads={threads}")


def _once(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return max(time.perf_counter_ns() - start, 1) / 1e6


def _rounds(
    turns: Mapping[str, Callable[[], float]], rounds: int, min_seconds: float, pause: float = 0.0
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in turns}
    orders, measured, done = itertools.cycle(_orders(list(turns))), 0.0, 0
    while done < rounds or measured < min_seconds * 1e3:
        for name in next(orders):
            if pause:
                time.sleep(pause)
            elapsed = turns[name]()
            samples[name].append(elapsed)
            measured += elapsed
        done += 1
    return samples


def _orders(names: list[str]) -> list[list[str]]:
    """Rounds in which every candidate stands in every place, and behind every other, equally often.

    What ran before leaves caches, clock and threads behind. A rotation alone would have each candidate
    follow the same one nearly always (Williams 1949, "Experimental designs balanced for the estimation
    of residual effects of treatments"; an odd number of candidates needs the mirrored rounds as well).

    >>> ["".join(order) for order in _orders(list("abcd"))]
    ['abdc', 'bcad', 'cdba', 'dacb']
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    orders = [[names[(start + step) % count] for step in zigzag] for start in range(count)]
    return orders + [order[::-1] for order in orders] if count % 2 and count > 1 else orders


def _timing(samples: list[float], threads: int) -> Timing:
    median, low, high = _quartiles(samples)
    return Timing(median, low, high, len(samples), threads, tuple(samples))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection belongs to no candidate."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _answer(name: str, pipe: Any) -> float:
    try:
        answer = pipe.recv()
    except EOFError:
        raise GraphpruneError(f"candidate {name!r}: its process ended while it was measured") from None
    if isinstance(answer, str):
        raise GraphpruneError(f"candidate {name!r} failed: {answer}")
    return answer


def _work(pipe: Any, factory: Callable[[], Callable[[], Any]], warmup: int, threads: int | None) -> None:
    """A worker: build, warm up, report the threads, then time one call for every message."""
    try:
        with torch_threads(threads) as used, torch.no_grad():
            call = factory()
            for _ in range(warmup):
                call()
            gc.disable()
            pipe.send(used)
            while pipe.recv():
                pipe.send(_once(call))
    except (EOFError, ConnectionError):
        return  # the measurement is over
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
