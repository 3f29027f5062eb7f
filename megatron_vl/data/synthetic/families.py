"""One function for each family of data. It makes one *part*, a run of consecutive items, and returns its records.

Each part has its own random stream, named by (split, seed, family, part). So the data do not depend on the number of
processes. Images are written to disk at once. Records that belong in one JSON file of the whole family are returned,
and ``FINISH`` writes them when all parts exist.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from megatron_vl.data.images.decode import decode_image, encode_jpeg
from megatron_vl.data.synthetic.config import Split, SyntheticConfig
from megatron_vl.data.synthetic.fonts import find_fonts
from megatron_vl.data.synthetic.language import (
    Phrase,
    ask_several,
    converse,
    describe,
    document,
    name,
)
from megatron_vl.data.synthetic.lexicon import WORDS, paragraph
from megatron_vl.data.synthetic.page import PageRenderer
from megatron_vl.data.synthetic.photos import find_photos
from megatron_vl.data.synthetic.render import SceneRenderer
from megatron_vl.data.synthetic.scene import Scene, sample_scene
from megatron_vl.data.synthetic.writers import (
    Picture,
    TarShard,
    write_json,
    write_json_lines,
    write_refexp,
    write_vqa,
)

Json = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A run of consecutive items of one family."""

    config: SyntheticConfig
    folder: Path
    """Folder of the family."""
    family: str
    index: int
    first: int
    """Index of the first item in the family."""
    count: int

    def rng(self) -> Random:
        """Return the random stream of this part."""
        return Random(f"{self.config.split}/{self.config.seed}/{self.family}/{self.index}")

    def scene(self, rng: Random) -> Scene:
        """Return a scene of the right split."""
        config = self.config
        return sample_scene(rng, config.scene, split=config.split, heldout_percent=config.heldout_percent)

    @property
    def texture_seed(self) -> int:
        """Seed of grounds and papers, the same for all parts of a data set."""
        return zlib.crc32(f"{self.config.split}/{self.config.seed}".encode())

    def new_renderer(self) -> SceneRenderer:
        """Return a new renderer of scenes."""
        return SceneRenderer(self.config.scene, self.texture_seed)


def make_captions(part: Part) -> list[Json]:
    """Make image-caption tars."""
    rng, renderer = part.rng(), part.new_renderer()
    with TarShard(part.folder, part.index, part.config.samples_per_shard) as tar:
        for _ in range(part.count):
            scene = part.scene(rng)
            tar.add(_picture(part, scene, renderer.encode(scene, rng)))
    return []


def make_grounded_captions(part: Part) -> list[Json]:
    """Make tars whose json has the boxes of the caption's phrases, as in Kosmos-2's GRIT."""
    rng, renderer = part.rng(), part.new_renderer()
    with TarShard(part.folder, part.index, part.config.samples_per_shard) as tar:
        for _ in range(part.count):
            scene = part.scene(rng)
            caption = describe(scene)
            boxes = {
                "noun_chunks": [_grit_entry(phrase, scene) for phrase in caption.nouns],
                "ref_exps": [_grit_entry(phrase, scene) for phrase in caption.expressions],
            }
            tar.add(_picture(part, scene, renderer.encode(scene, rng), boxes))
    return []


def _picture(part: Part, scene: Scene, image: bytes, extra: Json | None = None) -> Picture:
    url = f"synthetic:{part.config.split}/{scene.key}"
    return Picture(image, describe(scene).text, scene.image_size, scene.image_size, url, extra=extra)


def _grit_entry(phrase: Phrase, scene: Scene) -> list[float]:
    box = [round(value / scene.image_size, 6) for value in phrase.object.corners]
    return [float(phrase.start), float(phrase.end), *box, 1.0]


def make_vqa(part: Part) -> list[Json]:
    """Make images, and several questions about each."""
    rng, renderer = part.rng(), part.new_renderer()
    folder = _image_folder(part)
    records = []
    for image_id in range(part.first, part.first + part.count):
        scene = part.scene(rng)
        (folder / f"{image_id:012d}.jpg").write_bytes(renderer.encode(scene, rng))
        for number, question in enumerate(ask_several(scene, rng, part.config.scene)):
            records.append(
                {
                    "image_id": image_id,
                    "question_id": image_id * 1000 + number,
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                }
            )
    return records


def make_refexp(part: Part) -> list[Json]:
    """Make images, and an expression with its box for each object."""
    rng, renderer = part.rng(), part.new_renderer()
    folder = _image_folder(part)
    records = []
    for image_id in range(part.first, part.first + part.count):
        scene = part.scene(rng)
        file_name = f"{image_id:012d}.jpg"
        (folder / file_name).write_bytes(renderer.encode(scene, rng))
        size = {"width": scene.image_size, "height": scene.image_size}
        for item in scene.objects:
            record = {
                "file_name": file_name,
                "image_id": image_id,
                "expression": name(item),
                "corners": item.corners,
            }
            records.append({**record, **size})
    return records


def make_pages(part: Part) -> list[Json]:
    """Make document pages, and a line of metadata for each."""
    config = part.config
    renderer = PageRenderer(
        config.page,
        fonts=find_fonts("en", config.page.num_fonts, config.font_dirs),
        chinese=find_fonts("zh", config.page.num_fonts, config.font_dirs) if config.page.chinese_share else (),
        seed=part.texture_seed,
    )
    rng = part.rng()
    records = []
    for index in range(part.first, part.first + part.count):
        page = renderer.draw(rng, split=config.split, heldout_percent=config.heldout_percent)
        file_name = f"image_{index}.jpg"
        (part.folder / file_name).write_bytes(page.image)
        truth = {"gt_parse": {"text_sequence": " ".join(line.text for line in page.lines)}}
        lines = [{"text": line.text, "quad": [[round(x, 2), round(y, 2)] for x, y in line.quad]} for line in page.lines]
        records.append(
            {
                "file_name": file_name,
                "ground_truth": json.dumps(truth, ensure_ascii=False),
                "size": [page.width, page.height],
                "lang": page.language,
                "lines": lines,
            }
        )
    return records


def make_chat(part: Part) -> list[Json]:
    """Make images, and a dialogue about each."""
    rng, renderer = part.rng(), part.new_renderer()
    folder = _image_folder(part)
    records = []
    for index in range(part.first, part.first + part.count):
        scene = part.scene(rng)
        file_name = f"{index:012d}.jpg"
        (folder / file_name).write_bytes(renderer.encode(scene, rng))
        turns = converse(scene, f"images/{file_name}", rng)
        conversation = [{"from": turn.role, "value": turn.text} for turn in turns]
        records.append({"id": f"synthetic_{index}", "conversations": conversation})
    return records


def make_text(part: Part) -> list[Json]:
    """Make a file of documents: mostly in the language of the images, and some everyday sentences."""
    rng = part.rng()
    chinese = part.config.page.chinese_share / 2
    records = []
    for index in range(part.first, part.first + part.count):
        language = "zh" if rng.random() < chinese else "en"
        if language == "zh":
            text = paragraph(rng, 60, "zh")
        elif rng.random() < 0.1:
            text = paragraph(rng, 120, "en")
        else:
            words = rng.sample(WORDS, rng.randint(1, 2))
            text = document(part.scene(rng), words, rng, part.config.scene)
        records.append({"text": text, "id": f"synthetic-{index}", "lang": language})
    write_json_lines(part.folder / f"{part.index:05d}.jsonl", records)
    return []


def make_photos(part: Part) -> list[Json]:
    """Make one more tar of image-caption pairs from scikit-image's photographs."""
    limit = part.config.photo_size
    with TarShard(part.folder, part.index, part.config.samples_per_shard) as tar:
        for photo, path in find_photos(part.config.split):
            image = decode_image(path.read_bytes())
            original = image.size
            image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
            encoded = encode_jpeg(image, 92)
            tar.add(Picture(encoded, photo.caption, *image.size, f"skimage:{photo.file}", original))
    return []


def _image_folder(part: Part) -> Path:
    folder = part.folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


MAKE: dict[str, Callable[[Part], list[Json]]] = {
    "caption": make_captions,
    "grounded_caption": make_grounded_captions,
    "vqa": make_vqa,
    "refexp": make_refexp,
    "ocr": make_pages,
    "chat": make_chat,
    "text": make_text,
    "photos": make_photos,
}

FINISH: dict[str, Callable[[Path, Sequence[Json], Split], None]] = {
    "vqa": write_vqa,
    "refexp": lambda folder, records, split: write_refexp(folder, records),
    "ocr": lambda folder, records, split: write_json_lines(folder / "metadata.jsonl", records),
    "chat": lambda folder, records, split: write_json(folder / "chat.json", records),
}
