"""Loops that run as machine code: `compiled` turns a function over numbers and arrays into one, by numba.

The only place that knows of numba. Importing it is free: numba is imported, and the function compiled, at the first
call. Knows nothing of what the loops compute.
"""

# What a kernel is. A plain function over int, float, bool, tuples of them, and numpy arrays, that allocates little
# and calls nothing but numpy, math and other kernels of its own file. It means the same as Python: no fastmath,
# so sums are added in the order in which they are written, and `function` is the reference that tests compare with.
#
# Machine code is kept beside the source (in __pycache__, or else in the user's cache folder) and is used again while
# that file, the processor and numba are the same. Other files are not looked at: so a kernel calls no kernel of another
# file and reads no constant of one (a test checks it); they are passed in. One more kind of argument (a list for an
# array, a transposed array, a read-only one) is compiled again, for about a second: pass the same kinds always.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


class Compiled(Generic[Given, Returned]):
    """A function that is compiled when it is first called; `function` is the same in plain Python."""

    def __init__(self, function: Callable[Given, Returned]) -> None:
        self.function = function
        self._machine: Callable[Given, Returned] | None = None
        functools.update_wrapper(self, function)

    def __call__(self, *args: Given.args, **kwargs: Given.kwargs) -> Returned:
        """What the function returns."""
        try:
            return (self._machine or self.machine())(*args, **kwargs)
        except OSError:  # of the cache alone, since a kernel does no I/O: a full disk, say
            return self._made(cache=False)(*args, **kwargs)

    def machine(self) -> Callable[Given, Returned]:
        """numba's dispatcher of the function, which compiles once for each kind of arguments."""
        if self._machine is None:
            try:
                return self._made(cache=True)
            except RuntimeError:  # numba finds no folder where it may write machine code
                return self._made(cache=False)
        return self._machine

    def _made(self, *, cache: bool) -> Callable[Given, Returned]:
        from numba import njit  # noqa: PLC0415 (0.3 s, and most commands run no kernel)

        made: Callable[Given, Returned] = njit(cache=cache)(self.function)
        self._machine = made
        return made

    @property
    def _numba_type_(self) -> Any:  # numba's types have none that mypy knows
        """How numba sees a kernel that another kernel calls: as its own dispatcher."""
        from numba import typeof  # noqa: PLC0415

        return typeof(self.machine())  # type: ignore[no-untyped-call]


def compiled(function: Callable[Given, Returned]) -> Compiled[Given, Returned]:
    """Decorate a kernel; see above for what one may do."""
    return Compiled(function)
