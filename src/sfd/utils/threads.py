"""Work in threads, a bounded number of items ahead of where its results are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[Result, None, None]:
    """Call a function with each item, `workers` at a time; yield the results in order, at most `workers` ahead.

    Work starts with the first result that is asked for, and ends when the iterator is closed.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=initializer)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt need not wait for the rest
