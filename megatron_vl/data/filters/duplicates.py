"""Images that look similar, found by a 64-bit perceptual hash.

For 8 x 8 positions of the image, the hash (dHash) records whether the image gets darker to the right. It survives
scaling and recompression, and changes with crops and flips. An image without any such step (a plain color) has hash 0,
which says nothing. So 0 is never similar to anything.

Two hashes within a distance of d bits are equal in at least one of d + 1 bands of bits. So only images that share a
band are compared. The bands are interleaved, because neighboring bits depend on each other: a white border makes whole
rows zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

Hashes = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]


def dhash(image: Image.Image) -> int:
    """Return the perceptual hash of an image, as an unsigned 64-bit integer."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(small[:, :-1] > small[:, 1:]).tobytes(), "big")


def band_mask(band: int, distance: int) -> np.uint64:
    """Return the bits of one of the ``distance + 1`` bands, set."""
    return np.uint64(sum(1 << bit for bit in range(band, 64, distance + 1)))


def pairs_in_band(bits: Hashes, hashes: Hashes, distance: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield pairs of hashes within a distance in bits that agree in a band, as positions i < j; int64[pairs] each.

    ``bits`` is uint64[n], the bits of the band, sorted. ``hashes`` is uint64[n]. Each pair occurs once.
    """
    begins = np.arange(len(bits) - 1)
    step = 1
    while len(begins):
        begins = begins[begins + step < len(bits)]
        begins = begins[bits[begins] == bits[begins + step]]
        near = begins[np.bitwise_count(hashes[begins] ^ hashes[begins + step]) <= distance]
        yield near, near + step
        step += 1


def near_duplicate_pairs(hashes: Hashes, distance: int) -> tuple[IntArray, IntArray]:
    """Return pairs of different hashes within a distance in bits, as indices i < j, in order of j; int64[pairs] each.

    ``hashes`` is uint64[n], without repetitions.
    """
    firsts, seconds = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for band in range(distance + 1):
        bits = hashes & band_mask(band, distance)
        order = np.argsort(bits, kind="stable")
        for i, j in pairs_in_band(bits[order], hashes[order], distance):
            firsts.append(order[i])
            seconds.append(order[j])
    pairs = np.unique(np.stack([np.concatenate(seconds), np.concatenate(firsts)]), axis=1)
    return pairs[1], pairs[0]


def matches_any(hashes: Hashes, others: Hashes, distance: int) -> npt.NDArray[np.bool_]:
    """Return bool[n]: whether each of ``hashes``, uint64[n], is within a distance of one of ``others``, uint64[m]."""
    others = np.unique(others[others != 0])
    found = np.isin(hashes, others)
    fresh, inverse = np.unique(np.where(found, 0, hashes), return_inverse=True)
    like = np.zeros(len(fresh), dtype=np.bool_)
    nonzero = np.flatnonzero(fresh)
    firsts, seconds = near_duplicate_pairs(np.concatenate([others, fresh[nonzero]]), distance)
    hits = seconds[(firsts < len(others)) & (seconds >= len(others))] - len(others)
    like[nonzero[hits]] = True
    return found | like[inverse]
