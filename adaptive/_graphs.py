"""How the pieces of a token's way are run: one by one, as graphs, or as one graph."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from adaptive._memory import ran_out
from adaptive._pieces import Perform, Piece, perform, perform_compiled
from adaptive.calibration import UnsupportedError

if TYPE_CHECKING:
    from adaptive._device_stack import DeviceStack

#: How a step of fixed shapes is run.
Capture = Literal["step", "segments", "none"]


class AbstractRunner(abc.ABC):
    """Runs the pieces of a :class:`adaptive._device_stack.DeviceStack` for one token.

    Parameters
    ----------
    perform : callable
        Carries a piece out.
    """

    def __init__(self, perform: Perform = perform) -> None:
        self._perform = perform

    @abc.abstractmethod
    def run(self, stack: DeviceStack) -> int | None:
        """Run the pieces that the flags ask for; return how many slots now wait, if known."""

    @abc.abstractmethod
    def settle(self, stack: DeviceStack) -> None:
        """Run the piece that pays what every segment is owed."""


class BySegment(AbstractRunner):
    """The host chooses the pieces: one number is read per segment boundary."""

    def run(self, stack: DeviceStack) -> int:
        """See :class:`AbstractRunner`."""
        waiting = stack.pending + 1
        self._do(stack, Piece("begin"))
        for segment in range(1, stack.segments):
            way = int(stack.way[segment])
            if way == 0:
                break
            self._do(stack, Piece("segment", segment, alone=way == 1))
        else:
            waiting = 0
        self._do(stack, Piece("finish"))
        if waiting >= stack.most:
            self._do(stack, Piece("flush"))
            waiting = 0
        return waiting

    def settle(self, stack: DeviceStack) -> None:
        """See :class:`AbstractRunner`."""
        self._do(stack, Piece("flush"))

    @abc.abstractmethod
    def _do(self, stack: DeviceStack, piece: Piece) -> None:
        """Run one piece."""


class Direct(BySegment):
    """Operator by operator, on any device."""

    def _do(self, stack: DeviceStack, piece: Piece) -> None:
        self._perform(stack, piece)


class SegmentGraphs(BySegment):
    """One CUDA graph per piece, for any torch."""

    def __init__(self, perform: Perform = perform) -> None:
        super().__init__(perform)
        self._graphs: dict[tuple[Piece, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        #: End of the bucket for which kernels are ready.
        self._rehearsed = 0

    def _do(self, stack: DeviceStack, piece: Piece) -> None:
        key = piece, stack.stop
        if key not in self._graphs:
            if self._rehearsed != stack.stop:
                _rehearse(stack, self._perform)
                self._rehearsed = stack.stop
            graph = torch.cuda.CUDAGraph()
            with _capturing(graph, self._pool):
                self._perform(stack, piece)
            self._graphs[key] = graph
        self._graphs[key].replay()


class StepGraph(AbstractRunner):
    """The whole step is one CUDA graph; deeper segments are the bodies of nested IF nodes.

    The host reads nothing. For torch from 2.12 and CUDA from 12.4 on.
    """

    def __init__(self, perform: Perform = perform) -> None:
        super().__init__(perform)
        if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
            raise UnsupportedError(
                f"`capture='step'` needs conditional nodes, which torch {torch.__version__} does "
                "not have here (CUDA builds have them from 2.12 on): pass 'segments'"
            )
        #: By the end of the bucket, and whether of a step or of what settles it.
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, stack: DeviceStack) -> None:
        """See :class:`AbstractRunner`."""

        def whole(graph: torch.cuda.CUDAGraph) -> None:
            self._perform(stack, Piece("begin"))
            self._nest(graph, stack, 1)
            self._perform(stack, Piece("finish"))
            with only_if(graph, stack.overdue):
                self._perform(stack, Piece("flush"))

        self._replay((stack.stop, True), stack, whole)

    def settle(self, stack: DeviceStack) -> None:
        """See :class:`AbstractRunner`."""
        self._replay((stack.stop, False), stack, lambda _: self._perform(stack, Piece("flush")))

    def _replay(
        self,
        key: tuple[int, bool],
        stack: DeviceStack,
        work: Callable[[torch.cuda.CUDAGraph], None],
    ) -> None:
        if key not in self._graphs:
            _rehearse(stack, self._perform)
            graph = torch.cuda.CUDAGraph()
            with _capturing(graph, self._pool):
                work(graph)
            self._graphs[key] = graph
        self._graphs[key].replay()

    def _nest(self, graph: torch.cuda.CUDAGraph, stack: DeviceStack, segment: int) -> None:
        """Capture a segment, and inside a body those behind it."""
        if segment < stack.segments:
            with only_if(graph, stack.going[segment]):
                for flag, alone in ((stack.alone, True), (stack.crowded, False)):
                    with only_if(graph, flag[segment]):
                        self._perform(stack, Piece("segment", segment, alone))
                self._nest(graph, stack, segment + 1)


def runner_for(capture: Capture, *, compiled: bool = False) -> AbstractRunner:
    """Return a runner, of pieces that are compiled or not.

    Raises
    ------
    UnsupportedError
        If this torch has no conditional nodes.
    """
    kinds: dict[Capture, Callable[[Perform], AbstractRunner]] = {
        "none": Direct,
        "segments": SegmentGraphs,
        "step": StepGraph,
    }
    return kinds[capture](perform_compiled if compiled else perform)


def _rehearse(stack: DeviceStack, perform: Perform) -> None:
    """Run every piece once on a stream of its own, as captures ask for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        stack.rehearse(perform)
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
