"""``tools/tokenize_text.py``: compute tokens, labels and chat prompts of given texts, to compare them with others.

The input is a JSON object with up to three lists of cases. The tool sets in each case the values that are named after
the arrow. It copies everything else unchanged.

  tokenize  {"text"}                                               -> ids_rle
  sft       {"conversations": [{"from", "value"}],
             optional "system", "max_length"}                      -> length, ids_rle, labels_unshifted_rle
  chat      {"query", optional "history": [[query, reply]],
             "system", "max_window_size"}                          -> raw_text, ids_rle

Ids are run-length encoded as [value, count]. Labels are not shifted, and -100 marks a token that is not supervised. An
image is written <img>PATH</img>; an image tag without its partner is an error. In "tokenize" the name of any special
token becomes that token. In dialogues only the grounding tags do. "sft" cuts a sample at "max_length", even within an
image, as the released script does. Training leaves out such a sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.cli.command import exit_status
from megatron_vl.cli.output import write_whole
from megatron_vl.cli.parser import CommandParser
from megatron_vl.config.presets import PRESETS
from megatron_vl.data.prompting.chat import DEFAULT_SYSTEM, ChatStyle, complete_turns, render_turns
from megatron_vl.data.prompting.markup import IMAGE_TAGS, stray_image_tag
from megatron_vl.data.prompting.tokenize import encode_pieces, encode_text
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import Turn
from megatron_vl.errors import ConfigError, DataError
from megatron_vl.generation.chat import MAX_WINDOW_SIZE, ChatEncoder, Dialogue, read_history
from megatron_vl.log import write_line

LISTS = ("tokenize", "sft", "chat")
IGNORED = -100
Json = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    return exit_status(lambda: _run(_build_parser().parse_args(argv)))


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tools/tokenize_text.py",
        __doc__,
        example="python tools/tokenize_text.py --input tests/golden/qwen_vl/qwen_text.json --output "
        "runs/text.json --label-style released",
    )
    published = PRESETS["qwen_vl_7b"]
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSON file of cases")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--label-style",
        choices=("paper", "released"),
        default="paper",
        help="what of a dialogue is supervised: the assistant's answers and their ChatML tokens (paper, the default), "
        "or also the ChatML tokens and line ends of every turn (released, the published fine-tuning script)",
    )
    parser.add_argument("--vocab-file", help="Qwen's .tiktoken file (default: the one of the dashscope package)")
    parser.add_argument(
        "--num-bpe-tokens",
        type=int,
        default=published.num_bpe_tokens,
        metavar="N",
        help="byte-pair tokens that the vocabulary keeps",
    )
    parser.add_argument(
        "--num-queries", type=int, default=published.resampler.num_queries, metavar="N", help="slots of an image"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.num_queries < 1:
        raise ConfigError(f"--num-queries {options.num_queries}: an image has at least one slot")
    document = _read(options.input)
    tokenizer = QwenTokenizer(options.num_bpe_tokens, options.vocab_file)
    encoder = _CaseEncoder(tokenizer, options.num_queries, options.label_style)
    counts = []
    for name, encode in zip(LISTS, (encoder.text, encoder.sample, encoder.prompt), strict=True):
        cases = document.get(name, [])
        for index, case in enumerate(cases):
            try:
                cases[index] = {**case, **encode(case)}
            except DataError as error:
                raise DataError(f"{options.input}, {name}[{index}]: {error}") from error
        counts.append(f"{len(cases)} {name}")
    write_whole(options.output, json.dumps(document, ensure_ascii=False) + "\n")
    write_line(f"{options.output}: {', '.join(counts)}")


def _read(path: Path) -> Json:
    """Read the document: an object with at least one of the lists, whose items are objects."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--input {path}: cannot be read ({error}); expected JSON") from error
    lists = [name for name in LISTS if name in document] if isinstance(document, dict) else []
    if not lists:
        raise DataError(f"{path}: expected an object with at least one of the lists {', '.join(LISTS)}")
    for name in lists:
        if not isinstance(document[name], list):
            raise DataError(f"{path}: {name} is {type(document[name]).__name__}, expected a list of cases")
        for index, case in enumerate(document[name]):
            if not isinstance(case, dict):
                raise DataError(f"{path}, {name}[{index}]: found {str(case)[:80]!r}, expected an object")
    return document


@dataclass(frozen=True)
class _CaseEncoder:
    """Computes what is added to a case. Each method raises DataError without naming the case."""

    tokenizer: QwenTokenizer
    num_queries: int
    style: ChatStyle

    def text(self, case: Json) -> Json:
        """Return the fields of a case of ``tokenize``."""
        return {"ids_rle": runs(encode_text(_string(case, "text"), self.tokenizer, num_queries=self.num_queries))}

    def sample(self, case: Json) -> Json:
        """Return the fields of a case of ``sft``."""
        turns = complete_turns([Turn("system", _string(case, "system", DEFAULT_SYSTEM)), *_turns(case)])
        for turn in turns:
            _check_images(turn.text, in_answer=turn.role == "assistant")
        encoded = encode_pieces(render_turns(turns, self.style), self.tokenizer, num_queries=self.num_queries)
        cut = slice(_number(case, "max_length", len(encoded.tokens)))
        ids, learned = encoded.tokens[cut].tolist(), encoded.supervised[cut].tolist()
        labels = [token if target else IGNORED for token, target in zip(ids, learned, strict=True)]
        return {"length": len(ids), "ids_rle": runs(ids), "labels_unshifted_rle": runs(labels)}

    def prompt(self, case: Json) -> Json:
        """Return the fields of a case of ``chat``."""
        query, system = _string(case, "query"), _string(case, "system", DEFAULT_SYSTEM)
        dialogue = Dialogue(query, read_history(case.get("history")), system)
        for asked in (system, query, *(asked for asked, _ in dialogue.history)):
            _check_images(asked)
        for _, reply in dialogue.history:
            _check_images(reply, in_answer=True)
        window = _number(case, "max_window_size", MAX_WINDOW_SIZE)
        prompt = ChatEncoder(self.tokenizer, self.num_queries, window).prompt(dialogue)
        return {"raw_text": prompt.text, "ids_rle": runs(prompt.tokens)}


def runs(ids: Iterable[int]) -> list[list[int]]:
    """Return the run-length encoding: a list of [value, count]."""
    return [[value, len(list(group))] for value, group in itertools.groupby(ids)]


def _turns(case: Json) -> list[Turn]:
    items = case.get("conversations")
    if not isinstance(items, list) or not items:
        raise DataError(f"conversations is {str(items)[:80]!r}, expected a list of turns")
    turns = []
    for number, item in enumerate(items, 1):
        role = item.get("from") if isinstance(item, dict) else None
        if role not in ("user", "assistant"):
            raise DataError(f"turn {number} is {str(item)[:80]!r}, expected 'from' to be 'user' or 'assistant'")
        turns.append(Turn(role, _string(item, "value")))
    return turns


def _check_images(text: str, *, in_answer: bool = False) -> None:
    """Refuse what the original refuses: an image tag alone. An image named by the assistant is refused too."""
    stray = next((tag for tag in IMAGE_TAGS if tag in text), None) if in_answer else stray_image_tag(text)
    if stray is not None:
        expected = "no image in an answer" if in_answer else "<img>PATH</img>"
        raise DataError(f"found a {stray} in {text[:80]!r} that belongs to no image; expected {expected}")


def _string(case: Json, key: str, default: str | None = None) -> str:
    value = case.get(key, default)
    if not isinstance(value, str):
        raise DataError(f"{key} is {str(value)[:80]!r}, expected a text")
    return value


def _number(case: Json, key: str, default: int) -> int:
    value = case.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{key} is {str(value)[:80]!r}, expected a number of tokens")
    return value
