"""A prepared data set of what a page must survive and must show exactly: markup in texts and names, characters that do
not show or were cut, several pictures in one segment, boxes that spell the tags themselves."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import yaml

from megatron_vl.cli import prepare
from megatron_vl.data.sources import qwen_vl_chat
from tests.helpers.data.prepared import png
from tests.helpers.data.reading import write_tar
from tests.helpers.tiny import MODEL

SEQ_LENGTH = 512
SOURCE = "cap<b>'\"&"
SCRIPT = "<script>document.title='taken over'</script>"
CAPTIONS = (
    SCRIPT,
    '"><img src=http://example.com/x.png onerror="document.title=\'taken over\'">',
    "spelled out: <box>(1,2),(300,400)</box> and <|endoftext|>",
    "</span></div></style></textarea>{{ 7 * 7 }}{% raw %}",
    "hidden\u202e and\u200b odd\u00a0blanks  two",
)
CHATS = (
    (
        "Picture 1: <img>0.png</img> has <ref>one</ref><box>(100,200),(300,400)</box>\nPicture 2: <img>1.png</img>\n"
        "Where is <ref>the other</ref>?",
        "<box>(250,125),(750,625)</box> and <quad>(1,2),(3,4),(5,6),(7,8)</quad>, not <box>(5,5)</box>",
    ),
    ("In <box>(10,20),(30,40)</box> of Picture 1: <img>2.png</img>?", "A <ref>shade</ref>."),
)


def make_hostile_data_set(folder: Path) -> str:
    """Prepare the data set and return its prefix; one caption and one document are left out."""
    members = []
    for i, caption in enumerate(CAPTIONS):
        members += [(f"{i}<i>'&.png", png(40 * i)), (f"{i}<i>'&.txt", caption.encode())]
    members += [("9<i>'&.png", b"no image"), ("9<i>'&.txt", b"left out")]
    write_tar(folder / "captions" / "00000.tar", members)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(100 + 40 * i, side=200))
    chats = [
        {"id": f"chat{i}", "conversations": [{"from": "user", "value": ask}, {"from": "assistant", "value": answer}]}
        for i, (ask, answer) in enumerate(CHATS)
    ]
    (folder / "chat.json").write_text(json.dumps(chats), encoding="utf-8")
    documents = ["汉字" * 700, "tab\tand\r\nline\n\n end ", f"a document {SCRIPT}"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text(lines + "{broken\n", encoding="utf-8")
    recipe = {
        "sources": [
            {"name": SOURCE, "type": "img2dataset", "path": "captions"},
            {"name": "chats", "type": "qwen_vl_chat", "path": "chat.json", "image_root": "."},
            {"name": "documents", "type": "text", "path": "text.jsonl"},
        ],
        "seq_length": SEQ_LENGTH,
        "num_queries": MODEL.resampler.num_queries,
        "num_bpe_tokens": MODEL.num_bpe_tokens,
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    prefix = str(folder / "set")
    arguments = [str(folder / "data.yaml"), "--output", prefix, "--workers", "1", "--quiet"]
    with mock.patch.object(qwen_vl_chat, "check_boxes"):  # as of a version that did not leave out what is no box
        assert prepare.main(arguments) == 0
    return prefix
