"""The ids of Qwen-VL's special tokens: the one fact that data and model share about the vocabulary.

The special tokens follow the byte-pair tokens in a fixed order (``tokenization_qwen.py`` of the published model), so
every id follows from the number of byte-pair tokens that are kept. ``qwen_vl_7b`` keeps all 151,643.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_EXTRA = 205


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens of a vocabulary that keeps ``num_bpe_tokens`` byte-pair tokens."""

    num_bpe_tokens: int

    @property
    def by_text(self) -> dict[str, int]:
        """Every special token's surface form and id, in order."""
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        names += [f"<|extra_{i}|>" for i in range(NUM_EXTRA)]
        names += ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
        return {name: self.num_bpe_tokens + i for i, name in enumerate(names)}

    @property
    def endoftext(self) -> int:
        return self.num_bpe_tokens

    @property
    def im_start(self) -> int:
        return self.num_bpe_tokens + 1

    @property
    def im_end(self) -> int:
        return self.num_bpe_tokens + 2

    @property
    def img_start(self) -> int:
        return self.im_end + NUM_EXTRA + 7  # after the extras, and two tags each of ref, box and quad

    @property
    def img_end(self) -> int:
        return self.img_start + 1

    @property
    def img_pad(self) -> int:
        return self.img_start + 2

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary: byte-pair tokens and special tokens."""
        return self.img_start + 3
