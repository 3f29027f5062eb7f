"""How a token is chosen from logits: greedy, or drawn.

The logits pass through these steps in this order, as in ``transformers``:

1. *repetition penalty* p: of every token that the prompt or the answer holds, a positive logit is divided by p and a
   negative one multiplied. Padding of a batch is no part of a prompt.
2. *temperature* t: all logits are divided by t. At 0 the token of the largest logit is chosen, of equal ones the lowest
   id, and the steps below are left out.
3. *top-k*: only the k largest stay, and those equal to the k-th. 0 leaves all.
4. *top-p*: of the tokens sorted by probability, the most probable stay until their sum reaches p. At least one stays.
   Of equally probable tokens the lowest ids stay first. 1 leaves all.

Then a token is drawn from the softmax of what is left. The draw is no state of a generator. It is a number in [0, 1)
that depends only on the seed, the number of the question and the position in the answer. The token is the first, in
the order of ids, up to which the probabilities add up to more than that number. So an answer depends neither on its
batch nor on the layout, except where two layouts round the logits apart exactly at such a border. ``logits.py`` does
it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

from megatron_vl.errors import ConfigError

_MANTISSA_BITS = 53


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see the module. Without arguments, the most probable token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that is impossible or has no effect."""
        for name, value, valid, expected in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number from 0, which is greedy"),
            ("top_k", self.top_k, self.top_k >= 0, "a number from 0, which keeps all tokens"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, and at most 1, which keeps all tokens"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "a number above 0; 1 is no penalty",
            ),
            ("seed", self.seed, 0 <= self.seed < 2**64, "an integer from 0 below 2^64"),
        ):
            if not valid:
                raise ConfigError(f"{name} {value}: expected {expected}")
        if self.greedy and (self.top_k or self.top_p < 1):
            name, value = ("top_k", self.top_k) if self.top_k else ("top_p", self.top_p)
            raise ConfigError(
                f"{name} {value} has no effect at temperature 0, which always takes the most probable token; "
                "set a temperature, for example 1"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


GREEDY = Sampling()


def draw(seed: int, number: int, position: int) -> float:
    """Return a number in [0, 1) for a position of the answer to a question, the same wherever it is computed.

    It is the first 53 bits of BLAKE2b (8 bytes) over the three integers, as unsigned 64-bit little-endian numbers.
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, number, position), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - _MANTISSA_BITS)) / 2**_MANTISSA_BITS
