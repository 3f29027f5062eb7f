"""Published data sets that differ from the format of a reader only in names: the reader and its options.

``{type: gqa, ...}`` in a recipe is ``{type: vqa, ...}`` with the options of this table. The recipe may still set any of
them. Image patterns name the files as in the folder of the set, unpacked or in the downloaded zips.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DATA_SETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Captions after img2dataset. Scores are CLIP similarities of ViT-B/32 where a set has several.
    "laion_en": ("img2dataset", {"score_field": "similarity"}),
    "laion_zh": ("img2dataset", {"score_field": "similarity", "language": "zh"}),
    "laion_coco": ("img2dataset", {"caption_field": "top_caption", "score_field": "all_similarities"}),
    "datacomp": (
        "img2dataset",
        {
            "caption_field": ["txt", "caption", "text"],
            "score_field": ["clip_b32_similarity_score", "clip_l14_similarity_score"],
        },
    ),
    "coyo": (
        "img2dataset",
        {
            "caption_field": ["txt", "caption", "text"],
            "score_field": ["clip_similarity_vitb32", "clip_similarity_vitl14"],
        },
    ),
    "cc12m": ("img2dataset", {}),
    "cc3m": ("img2dataset", {}),
    "sbu": ("img2dataset", {}),
    "coco_caption": (
        "karpathy",
        {
            "splits": ["train", "restval"],
            "image_pattern": ["{filepath}/{filename}", "{filepath}.zip/{filepath}/{filename}"],
        },
    ),
    # Questions.
    "vqav2": (
        "vqa",
        {
            "image_pattern": [
                "train2014/COCO_train2014_{image_id:012d}.jpg",
                "val2014/COCO_val2014_{image_id:012d}.jpg",
                "train2014.zip/train2014/COCO_train2014_{image_id:012d}.jpg",
                "val2014.zip/val2014/COCO_val2014_{image_id:012d}.jpg",
            ]
        },
    ),
    "gqa": (
        "vqa",
        {
            "records": "",
            "answer_field": "answer",
            "image_pattern": ["images/{imageId}.jpg", "images.zip/images/{imageId}.jpg"],
        },
    ),
    "vgqa": (
        "vqa",
        {
            "records": "",
            "unfold": "qas",
            "id_field": "qa_id",
            "answer_field": "answer",
            "image_pattern": [
                "VG_100K/{image_id}.jpg",
                "VG_100K_2/{image_id}.jpg",
                "images.zip/VG_100K/{image_id}.jpg",
                "images2.zip/VG_100K_2/{image_id}.jpg",
            ],
        },
    ),
    "dvqa": ("vqa", {"records": "", "answer_field": "answer", "image_pattern": "images/{image}"}),
    "ocr_vqa": (
        "vqa",
        {
            "records": "",
            "question_field": "questions",
            "split_field": "split",
            "splits": ["1"],
            "image_pattern": ["images/{key}.jpg", "images/{key}.png", "images/{key}.gif"],
        },
    ),
    "docvqa": ("vqa", {"records": "data", "id_field": "questionId", "image_pattern": "{image}"}),
    "textvqa": (
        "vqa",
        {
            "records": "data",
            "annotated": True,
            "image_pattern": ["train_images/{image_id}.jpg", "train_val_images.zip/train_images/{image_id}.jpg"],
        },
    ),
    "chartqa": (
        "vqa",
        {"records": "", "question_field": "query", "answer_field": "label", "image_pattern": "png/{imgname}"},
    ),
    # Grounding and OCR.
    "grit": ("grounded_caption", {}),
    "refcoco_plus": ("refcoco", {}),
    "refcocog": ("refcoco", {"split_by": "umd"}),
    "synthdog_en": ("ocr", {}),
    "synthdog_zh": ("ocr", {"language": "zh"}),
}
