"""How the pieces of a token's way are run: one by one, as graphs, or as one graph."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from adaptive._memory import ran_out
from adaptive.calibration import UnsupportedError

if TYPE_CHECKING:
    from adaptive._device_stack import DeviceStack

#: Name, segment, and whether the newest token passes it alone.
_Piece = tuple[str, int, bool]
#: How a step of fixed shapes is run.
Capture = Literal["step", "segments", "none"]


class AbstractRunner(abc.ABC):
    """Runs the pieces of a :class:`adaptive._device_stack.DeviceStack` for one token."""

    @abc.abstractmethod
    def run(self, stack: DeviceStack) -> None:
        """Run the pieces that the flags ask for."""


class BySegment(AbstractRunner):
    """The host chooses the pieces: one number is read per segment boundary, one at the end."""

    def run(self, stack: DeviceStack) -> None:
        """See :class:`AbstractRunner`."""
        self._do(stack, ("begin", 0, True))
        for segment in range(1, stack.segments):
            way = int(stack.way)
            if way == 0:
                break
            self._do(stack, ("segment", segment, way == 1))
        self._do(stack, ("finish", 0, True))
        if bool(stack.overdue):
            self._do(stack, ("flush", 0, True))

    @abc.abstractmethod
    def _do(self, stack: DeviceStack, piece: _Piece) -> None:
        """Run one piece."""


class Direct(BySegment):
    """Operator by operator, on any device."""

    def _do(self, stack: DeviceStack, piece: _Piece) -> None:
        _work(stack, piece)


class SegmentGraphs(BySegment):
    """One CUDA graph per piece, for any torch."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[_Piece, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._rehearsed = False

    def _do(self, stack: DeviceStack, piece: _Piece) -> None:
        key = piece, stack.stop
        if key not in self._graphs:
            if not self._rehearsed:
                _rehearse(stack)
                self._rehearsed = True
            graph = torch.cuda.CUDAGraph()
            with _capturing(graph, self._pool):
                _work(stack, piece)
            self._graphs[key] = graph
        self._graphs[key].replay()


class StepGraph(AbstractRunner):
    """The whole step is one CUDA graph; deeper segments are the bodies of nested IF nodes.

    The host reads nothing. For torch from 2.12 and CUDA from 12.4 on.
    """

    def __init__(self) -> None:
        if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            raise UnsupportedError(
                f"`capture='step'` needs conditional nodes, which torch {torch.__version__} does "
                "not have here (CUDA builds have them from 2.12 on): pass 'segments'"
            )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, stack: DeviceStack) -> None:
        """See :class:`AbstractRunner`."""
        if stack.stop not in self._graphs:
            _rehearse(stack)
            graph = torch.cuda.CUDAGraph()
            with _capturing(graph, self._pool):
                stack.begin()
                self._nest(graph, stack, 1)
                stack.finish()
                with only_if(graph, stack.overdue):
                    stack.flush()
            self._graphs[stack.stop] = graph
        self._graphs[stack.stop].replay()

    def _nest(self, graph: torch.cuda.CUDAGraph, stack: DeviceStack, segment: int) -> None:
        """Capture a segment, and inside its body those behind it."""
        if segment < stack.segments:
            with only_if(graph, stack.going):
                if segment == 1:
                    stack.look()
                with only_if(graph, stack.alone):
                    stack.carry(segment, alone=True)
                with only_if(graph, stack.crowded):
                    stack.carry(segment, alone=False)
                stack.ask(segment)
                self._nest(graph, stack, segment + 1)


def runner_for(capture: Capture) -> AbstractRunner:
    """Return a runner.

    Raises
    ------
    UnsupportedError
        If this torch has no conditional nodes.
    """
    kinds: dict[Capture, Callable[[], AbstractRunner]] = {
        "none": Direct,
        "segments": SegmentGraphs,
        "step": StepGraph,
    }
    return kinds[capture]()


def _work(stack: DeviceStack, piece: _Piece) -> None:
    """Do what a piece names."""
    name, segment, alone = piece
    if name == "segment":
        if not alone:
            stack.look()
        stack.carry(segment, alone=alone)
        stack.ask(segment)
    else:
        {"begin": stack.begin, "finish": stack.finish, "flush": stack.flush}[name]()


def _rehearse(stack: DeviceStack) -> None:
    """Run every piece once on a stream of its own, as captures ask for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        stack.rehearse()
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture what is done inside; say what may be wrong if that fails."""
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except RuntimeError as error:
        if ran_out(error):
            raise
        raise UnsupportedError(
            "the policy's step cannot be captured in a CUDA graph: a score or rule of your own may "
            "read a value on the host, branch on one, or change shapes. Leave `capture` out, or "
            "see what the docs ask of your own policies. The reason given: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextmanager
def only_if(graph: torch.cuda.CUDAGraph, flag: Tensor) -> Iterator[None]:
    """Capture into the body of an IF node on a flag."""
    graph.begin_capture_to_if_node(flag)
    try:
        yield
    finally:
        graph.end_capture_to_conditional_node()
