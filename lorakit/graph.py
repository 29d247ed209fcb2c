"""A step captured in a CUDA graph, with the memory it uses kept alive."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from lorakit import jit


class Graph:
    """Capture what is launched in a ``with`` block, to be replayed with new contents in the same arrays::

        y = layer(x)              # once before: kernels compile and libraries start up outside of a capture
        with lorakit.Graph() as graph:
            y = layer(x)
        x[...] = new_x            # rewrite inputs and metadata in place
        graph.replay()            # y holds the new result

    Nothing runs during the capture. What ops allocate in the block comes from a memory pool of the graph's
    own, which lives as long as the graph: CuPy's pool would hand freed intermediates out again while replays
    still write to them. So keep the graph for as long as its results are used.
    """

    def __init__(self) -> None:
        cupy = jit.import_cupy()
        self._pool = cupy.cuda.MemoryPool()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._allocator = cupy.cuda.using_allocator(self._pool.malloc)
        self._graph: Any = None

    def __enter__(self) -> Graph:
        if self._graph is not None:
            raise RuntimeError("this graph has been captured already")
        self._allocator.__enter__()
        self._stream.__enter__()
        try:
            self._stream.begin_capture()
        except BaseException:
            self._leave(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            graph = self._stream.end_capture()
        except Exception:
            if error is None:  # else the error in the block is why the capture failed
                raise
        else:
            if error is None:
                self._graph = graph
        finally:
            self._leave(kind, error, trace)

    def _leave(self, *info: Any) -> None:
        self._stream.__exit__(*info)
        self._allocator.__exit__(*info)

    def replay(self) -> None:
        """Launch the captured step on the current stream.

        Raises:
            RuntimeError: Nothing was captured.
        """
        if self._graph is None:
            raise RuntimeError("nothing was captured: use `with graph: ...` first")
        self._graph.launch(jit.import_cupy().cuda.get_current_stream())
