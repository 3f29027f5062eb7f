"""Configuration of the generator: frozen dataclasses and the two profiles.

``tiny`` can be learned in minutes by a ViT of 3 x 128 with 14-pixel patches. Every object fills whole patches.
Positions are the nine cells of a 3 x 3 grid, so a coordinate of a box takes one of 13 values, with few digits. Words
are among the first ranks of the byte-pair vocabulary. ``full`` is for larger models: 448 pixels, many objects at any
patch border, ten colors and eight shapes. Its pages have many lines with fonts, paper, noise, blur and strong
perspective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "heldout"]
FAMILIES = ("caption", "grounded_caption", "vqa", "refexp", "ocr", "text", "chat", "photos")


@dataclass(frozen=True)
class SceneConfig:
    """Pictures of a few objects on a plain, slightly noisy ground."""

    image_size: int = 84
    """Side of the square image in pixels."""
    step: int = 28
    """Objects begin at multiples of this many pixels."""
    sizes: tuple[tuple[str, int], ...] = (("small", 28), ("big", 56))
    """Name and side in pixels of each size."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
    """Shapes that occur (``render.OUTLINES``)."""
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "black", "white")
    """Colors that occur (``render.COLORS``)."""
    object_weights: tuple[float, ...] = (0.5, 0.5)
    """Relative frequency of scenes with one object, two, ..."""
    distinct_attributes: bool = True
    """No two objects of a scene share a color or a shape, so each of these alone identifies the object."""
    noise: float = 6.0
    """Standard deviation of the ground's texture, in levels of 255."""
    jpeg_quality: int = 92
    """Quality of the encoded images (no chroma subsampling)."""
    question_weights: tuple[tuple[str, float], ...] = (
        ("color", 0.36),
        ("shape", 0.26),
        ("position", 0.22),
        ("size", 0.08),
        ("count", 0.08),
    )
    """Kinds of questions and their relative frequency."""
    questions_per_image: int = 2
    """Number of different questions about one image."""


@dataclass(frozen=True)
class PageConfig:
    """Document pages; all lengths in pixels."""

    width: tuple[int, int] = (84, 84)
    """Least and greatest width of a page."""
    height: tuple[int, int] = (84, 84)
    """Least and greatest height of a page."""
    layout: Literal["words", "lines"] = "words"
    """Single words on a coarse grid, or columns of running text."""
    num_lines: tuple[int, int] = (1, 2)
    """Words: least and greatest number. Lines: the same per column."""
    line_height: tuple[int, int] = (28, 28)
    """Least and greatest height of a line of text."""
    letter_width: int = 14
    """Words only: width of a word per letter."""
    step: int = 14
    """Words only: lines begin at multiples of this."""
    max_blocks: int = 1
    """Lines only: greatest number of blocks below each other."""
    max_columns: int = 1
    """Lines only: greatest number of columns in a block."""
    alignments: tuple[Literal["left", "center", "right"], ...] = ("left",)
    """Lines only: one is chosen for each column."""
    vertical_share: float = 0.0
    """Lines only: share of Chinese columns that are written vertically."""
    corpus_en: str = ""
    """Lines only: text file with the words of English pages. By default, built-in sentences."""
    corpus_zh: str = ""
    """The same for Chinese pages."""
    perspective: tuple[float, float] = (0.0, 7.0)
    """Words: a corner moves by one of these two values. Lines: by any value between them."""
    rotation: float = 0.0
    """Lines only: greatest rotation of the paper in degrees, in either direction."""
    paper_scale: tuple[float, float] = (1.0, 1.0)
    """Lines only: least and greatest size of the paper, as a share of what fits into the image."""
    elastic: float = 0.0
    """Greatest shift in pixels by uneven paper."""
    num_fonts: int = 3
    """Number of fonts to use of those found, the most legible first."""
    max_blur: float = 0.0
    """Greatest radius of the Gaussian blur."""
    motion_blur: int = 0
    """Greatest length in pixels of a motion blur, which half of the pages have; 0 or 1 for none."""
    max_noise: float = 6.0
    """Greatest standard deviation of the pixel noise, in levels of 255."""
    tint: float = 0.0
    """Greatest share by which a color is stronger or weaker, in a fifth of the pages."""
    contrast: float = 0.1
    """Share by which contrast and brightness vary."""
    shadow: float = 0.0
    """Greatest strength of a shadow across the page, 0 to 1."""
    background: bool = False
    """Put the paper on a textured ground, instead of one like the paper."""
    background_dir: str = ""
    """Folder of pictures for the ground (SynthDoG; the paper used COCO's)."""
    background_blur: float = 10.0
    """Greatest radius of the blur of these pictures."""
    chinese_share: float = 0.0
    """Share of Chinese pages, if a Chinese font is found."""
    jpeg_quality: tuple[int, int] = (88, 95)
    """Least and greatest quality of the encoded images."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Configuration of a whole data set."""

    profile: str = "tiny"
    """Name of the profile, for information."""
    split: Split = "train"
    """Split to draw from, as decided by the hash of the content."""
    seed: int = 1
    """Seed of all randomness; the split is mixed into it."""
    heldout_percent: int = 10
    """Share of all possible scenes and pages that is never drawn for training."""
    counts: tuple[tuple[str, int], ...] = (
        ("caption", 6000),
        ("grounded_caption", 2000),
        ("vqa", 5000),
        ("refexp", 4000),
        ("ocr", 3000),
        ("chat", 1000),
        ("text", 20000),
        ("photos", 1),
    )
    """Images of each family (text: documents; photos: 1 for all that are found, 0 for none)."""
    samples_per_shard: int = 1000
    """Pictures in a tar."""
    photo_size: int = 168
    """Length in pixels to which the longer side of photographs is reduced."""
    font_dirs: tuple[str, ...] = ()
    """Folders that are searched for fonts before the usual ones."""
    scene: SceneConfig = field(default_factory=SceneConfig)
    page: PageConfig = field(default_factory=PageConfig)

    def count(self, family: str) -> int:
        """Return the number of items of a family; 0 if it is not listed."""
        return dict(self.counts).get(family, 0)

    @property
    def num_images(self) -> int:
        """Rendered images of all families."""
        return sum(number for family, number in self.counts if family not in ("text", "photos"))


TINY = SyntheticConfig()

FULL = SyntheticConfig(
    profile="full",
    photo_size=512,
    scene=SceneConfig(
        image_size=448,
        step=14,
        sizes=(("small", 56), ("medium", 112), ("big", 196)),
        shapes=("circle", "square", "triangle", "star", "cross", "diamond", "hexagon", "heart"),
        colors=("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "pink", "brown"),
        object_weights=(0.25, 0.3, 0.25, 0.2),
        distinct_attributes=False,
        noise=10.0,
        question_weights=(
            ("color", 0.3),
            ("shape", 0.22),
            ("position", 0.2),
            ("size", 0.1),
            ("count", 0.08),
            ("exists", 0.1),
        ),
        questions_per_image=4,
    ),
    page=PageConfig(
        width=(640, 1024),
        height=(640, 1024),
        layout="lines",
        num_lines=(3, 12),
        line_height=(24, 52),
        max_blocks=4,
        max_columns=3,
        alignments=("left", "left", "center", "right"),
        vertical_share=0.2,
        perspective=(0.0, 60.0),
        rotation=4.0,
        paper_scale=(0.7, 1.0),
        elastic=1.5,
        num_fonts=40,
        max_blur=1.5,
        motion_blur=5,
        tint=0.15,
        max_noise=12.0,
        contrast=0.25,
        shadow=0.5,
        background=True,
        chinese_share=0.3,
        jpeg_quality=(50, 95),
    ),
)

PROFILES: dict[str, SyntheticConfig] = {"tiny": TINY, "full": FULL}


def scaled(counts: Sequence[tuple[str, int]], num_images: int) -> tuple[tuple[str, int], ...]:
    """Scale the counts to about ``num_images`` rendered images; text in proportion, photographs unchanged."""
    total = sum(number for family, number in counts if family not in ("text", "photos"))
    factor = num_images / max(total, 1)
    return tuple((family, n if family == "photos" else round(n * factor)) for family, n in counts)
