"""Which samples make a batch."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class Batches(Sampler[list[int]]):
    """The numbers of each micro-batch of one process, from a step on.

    All processes and micro-batches of a step have the same `batch_size` samples between them, however many there are.

    Args:
        batch_size: samples of a step, over all processes.
        first_step, last_step: the steps that are to be made, the last not included.
        rank, processes: which of how many this process is.
        accumulate: micro-batches of a step.

    Raises:
        ValueError: if the batch cannot be shared out evenly.

    >>> list(Batches(4, 1, 3, processes=2, rank=1))
    [[6, 7], [10, 11]]
    """

    def __init__(
        self,
        batch_size: int,
        first_step: int,
        last_step: int,
        *,
        rank: int = 0,
        processes: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % (processes * accumulate):
            parts = f"{processes} process(es) times {accumulate} micro-batch(es)"
            raise ValueError(f"batch_size must be a multiple of {parts}, got {batch_size}")
        self.batch_size, self.first_step, self.last_step = batch_size, first_step, last_step
        self.rank, self.processes, self.accumulate = rank, processes, accumulate

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // (self.processes * self.accumulate)
        for step in range(self.first_step, self.last_step):
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * self.processes + self.rank) * size
                yield list(range(start, start + size))
