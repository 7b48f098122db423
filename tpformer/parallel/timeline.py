"""placeholder until the timeline lands"""
from contextlib import AbstractContextManager


class Timeline:
    def span(self, kind: str, *, stage: int, micro_batch: int) -> AbstractContextManager[None]:
        raise NotImplementedError
