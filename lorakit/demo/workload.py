"""Which requests are served: their prompts and adapters, and the steps they join and leave at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A prompt of some tokens for an adapter.

    Attributes:
        name: For the cache manager and for the table.
        slot: The adapter's slot; None: the base model.
        prompt: Tokens.
    """

    name: str
    slot: int | None
    prompt: int


@dataclass(frozen=True)
class Step:
    """What changes before a step; everyone who was there already decodes one token."""

    joins: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()


# Neighbours share an adapter (c, d), a base request stands between adapters, c leaves and returns.
SLOTS = {"a": 2, "b": None, "c": 0, "d": 0, "e": 1, "f": None}
STEPS = (
    Step(joins=("a", "b", "c", "d")),
    Step(),
    Step(joins=("e",), leaves=("c",)),
    Step(),
    Step(joins=("f", "c"), leaves=("a",)),
    Step(),
)
MAX_BATCH_SIZE = 5


@dataclass(frozen=True)
class Workload:
    """Requests and the geometry of a cache that holds them."""

    prompts: tuple[int, ...]
    page_size: int

    def requests(self) -> dict[str, Request]:
        """By name."""
        return {
            name: Request(name, slot, prompt)
            for (name, slot), prompt in zip(SLOTS.items(), self.prompts, strict=True)
        }

    @property
    def max_seq_len(self) -> int:
        """The longest prompt and a token of each step."""
        return max(self.prompts) + len(STEPS)

    @property
    def num_pages(self) -> int:
        """Enough for the largest batch at full length."""
        return MAX_BATCH_SIZE * -(-self.max_seq_len // self.page_size)


SMALL = Workload(prompts=(13, 1, 9, 6, 17, 4), page_size=4)
LARGE = Workload(prompts=(201, 16, 143, 97, 277, 64), page_size=16)


def batch_name(requests: Sequence[Request]) -> str:
    """``a:2 b:- c:0``: each request and its adapter's slot."""
    return " ".join(f"{r.name}:{'-' if r.slot is None else r.slot}" for r in requests)
