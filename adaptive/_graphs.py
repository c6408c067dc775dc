"""How the pieces of a token's way are run: one by one, as graphs, or as one graph."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from adaptive._capturable import NotCapturableError, OnlyCapturable
from adaptive._memory import ran_out
from adaptive._pieces import Perform, Piece, perform, perform_compiled
from adaptive.calibration import UnsupportedError

if TYPE_CHECKING:
    from adaptive._device_stack import DeviceStack
    from adaptive._span import Window

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
        self._captures = _Captures(perform)
        #: By the end of the bucket: what its ``begin`` hands on, where its graph writes it. Other
        #: pieces are captured when first needed, which may be after one of another bucket.
        self._near: dict[int, Window] = {}

    def _do(self, stack: DeviceStack, piece: Piece) -> None:
        key = piece, stack.stop
        if key not in self._graphs:
            if piece.name == "begin":
                self._captures.rehearse(stack)
            else:
                stack.near = self._near[stack.stop]
            with self._captures.capturing(stack) as graph:
                self._perform(stack, piece)
            self._near.setdefault(stack.stop, stack.near)
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
        self._captures = _Captures(perform)

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
            self._captures.rehearse(stack)
            with self._captures.capturing(stack) as graph:
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


class _Captures:
    """Captures of one stack: one pool of memory, one stream of the stack's device.

    With the stream that torch has for all captures, what the device's libraries lay down for it
    would belong to the first stack that is captured, and be gone with it.
    """

    def __init__(self, perform: Perform) -> None:
        self._perform = perform
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def rehearse(self, stack: DeviceStack) -> None:
        """Run every piece once, as captures ask for; say what could not be captured.

        Compiled pieces have been found to be free of that.
        """
        own, device = self._stream_for(stack), stack.slot.device
        watched = OnlyCapturable() if self._perform is perform else nullcontext()
        try:
            with _back_on(device), watched:
                own.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(own):
                    stack.rehearse(self._perform)
        except NotCapturableError as error:
            raise UnsupportedError(_refusal(error)) from error
        torch.cuda.current_stream(device).wait_stream(own)

    @contextmanager
    def capturing(self, stack: DeviceStack) -> Iterator[torch.cuda.CUDAGraph]:
        """Capture what is done inside; say what may be wrong if that fails."""
        graph = torch.cuda.CUDAGraph()
        stream = self._stream_for(stack)
        first: RuntimeError | None = None
        try:
            with (
                _back_on(stack.slot.device),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=stream,
                    capture_error_mode="thread_local",  # other threads may allocate meanwhile
                ),
            ):
                try:
                    yield graph
                except RuntimeError as error:
                    first = error  # ending a capture that failed is an error of its own
                    raise
        except RuntimeError as error:
            cause = first or error
            if ran_out(cause):
                raise cause from None
            raise UnsupportedError(_refusal(cause)) from cause

    def _stream_for(self, stack: DeviceStack) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(stack.slot.device)
        return self._stream


@contextmanager
def _back_on(device: torch.device) -> Iterator[None]:
    """Be on a device's current stream, and afterwards there where one was before.

    A capture that fails leaves its own stream as the current one.
    """
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        yield


def _refusal(error: RuntimeError) -> str:
    return (
        "the policy's step cannot be captured in a CUDA graph: a score or rule of your own may "
        "read a value on the host, branch on one, or change shapes. Leave `capture` out, or "
        "see what the docs ask of your own policies. The reason given: "
        f"{str(error).splitlines()[0]}"
    )


@contextmanager
def only_if(graph: torch.cuda.CUDAGraph, flag: Tensor) -> Iterator[None]:
    """Capture into the body of an IF node on a flag."""
    graph.begin_capture_to_if_node(flag)
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # the first error says more
            graph.end_capture_to_conditional_node()
        raise
    graph.end_capture_to_conditional_node()
