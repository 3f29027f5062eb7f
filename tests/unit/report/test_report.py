"""The report of a made-up run: complete, self-contained, honest about misses, clear about damage."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from megatron_vl.cli.report import main
from megatron_vl.errors import DataError
from megatron_vl.report.figures import smooth
from megatron_vl.report.layout_phases import find_layout_phases
from megatron_vl.report.records import StepTime, TrainingRecord, load_training
from megatron_vl.report.report import read_report, render_page, render_text
from megatron_vl.report.results import results_markdown
from megatron_vl.report.tables import format_table, show_duration, time_rows, total_seconds
from tests.unit.report.fake_run import write_fake_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_fake_run(tmp_path_factory.mktemp("run"), num_steps=60, samples_per_task=2)
    (folder / "data" / "stage1.html").touch()
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return render_page(read_report(run_dir), run_dir)


class _Tags(HTMLParser):
    """Collects what a browser would fetch and what a reader can follow, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        found = self.links if tag == "a" else self.fetched
        found += [values[name] or "" for name in ("src", "href", "xlink:href", "data") if name in values]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched
    assert all(target.startswith(("data:image/", "#")) for target in tags.fetched)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_tells_the_whole_story(page: str) -> None:
    for text in (
        "7 of 7",
        "not Qwen-7B",
        "TP 1 x PP 2 x DP 1 x VP 2",
        "39 of 39 tensors bit-identical",
        "Held-out examples: referring",
        "unreadable_image 2",
        "examples/tiny/stage2.yaml",
        "8 min 05 s",
    ):
        assert text in page
    assert page.count("<svg") == 4
    assert page.count("data:image/jpeg") == 10
    assert "First replies of the model after stage 3" in page and "Find it." in page


def test_links_to_pages_of_data_sets_are_relative(run_dir: Path, page: str, tmp_path: Path) -> None:
    tags = _Tags()
    tags.feed(page)
    assert [link for link in tags.links if not link.startswith("#")] == ["data/stage1.html"]
    elsewhere = tmp_path / "else where" / "report.html"
    assert main([str(run_dir), "--output", str(elsewhere)]) == 0
    tags = _Tags()
    tags.feed(elsewhere.read_text(encoding="utf-8"))
    (link,) = [link for link in tags.links if not link.startswith("#")]
    assert (elsewhere.parent / unquote(link)).resolve() == (run_dir / "data" / "stage1.html").resolve()


def test_the_contents_lead_to_every_section(page: str) -> None:
    sections = re.findall(r'<section id="([\w-]+)">', page)
    contents = page[page.index("<nav") : page.index("</nav>")]
    assert re.findall(r'href="#([\w-]+)"', contents) == sections
    assert page.count("<section") == len(sections) and sections[-1] == "next"


def test_a_score_that_looking_did_not_raise_is_said_beside_what_was_met(tmp_path: Path) -> None:
    run_dir = write_fake_run(tmp_path, num_steps=20, samples_per_task=2)
    assert read_report(run_dir).remarks == ()
    eval_dir = run_dir / "eval"
    lines = [json.loads(line) for line in (eval_dir / "predictions_model.jsonl").read_text().splitlines()]
    blind = [line if line["task"] == "ocr" else {**line, "prediction": ""} for line in lines]
    (eval_dir / "predictions_blind.jsonl").write_text("".join(json.dumps(line) + "\n" for line in blind))
    report = read_report(run_dir)
    said = "Not required, and not reached: the score on ocr (recall of words) is 50.0\u00a0%, that of the blind model"
    assert said in render_text(report) and said in results_markdown(report)
    assert "the score on ocr" in render_page(report, run_dir)


def test_a_run_without_dialogues_has_a_report(tmp_path: Path) -> None:
    run_dir = write_fake_run(tmp_path, num_steps=5, samples_per_task=1)
    (run_dir / "eval" / "replies.jsonl").unlink()
    assert list(read_report(run_dir).examples) == ["referring", "caption", "vqa", "ocr"]


def test_texts_of_the_run_are_escaped(page: str) -> None:
    assert "an &lt;example&gt; processor" in page
    assert "<example>" not in page


def test_missed_requirements_are_said_to_be_missed(tmp_path: Path) -> None:
    run_dir = write_fake_run(tmp_path, num_steps=20, samples_per_task=1)
    path = run_dir / "eval" / "checks.json"
    path.write_text(path.read_text().replace("true", "false"))
    report = read_report(run_dir)
    missed = [item.what for item in report.requirements if not item.met]
    assert missed == ["Stage 1 leaves the language model as it was", "VQA accuracy on vqa after stage 2"]
    assert "5 of 7" in render_page(report, run_dir)
    assert render_text(report).count("MISSED") == 2


def test_command_writes_the_page_and_prints_the_tables(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir)]) == 0
    assert (run_dir / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    printed = capsys.readouterr().out
    assert "Requirements" in printed
    assert "7 of 7 requirements met" in printed
    assert not [path for path in run_dir.iterdir() if path.name.startswith((".", "report.html."))]


def test_a_page_that_cannot_be_written_is_an_error_before_the_work(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run is damaged, which is not even noticed; of the second, which is not there, no folder is made."""
    damaged = write_fake_run(tmp_path / "run", num_steps=5, samples_per_task=1)
    (damaged / "run.json").write_text("{")
    assert main([str(damaged), "--output", str(tmp_path)]) == 2
    assert f"error: --output {tmp_path}: cannot be written (Is a directory)\n" == capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert main([str(run_dir), "--output", str(run_dir / "run.json" / "x.html")]) == 2
    assert "x.html: cannot be written (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("run.json", "quickstart"),
        ("model/stage2/metrics.jsonl", "tools/train.py"),
        ("eval/predictions_blind.jsonl", "tools/generate.py"),
        ("eval/losses/blind_stage2.json", "tools/evaluate_loss.py"),
    ],
)
def test_a_missing_file_is_named_with_its_maker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, maker: str
) -> None:
    write_fake_run(tmp_path, num_steps=5, samples_per_task=1)
    (tmp_path / name).unlink()
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error
    assert maker in error


def test_both_models_must_have_answered_the_same_questions_each_once(tmp_path: Path) -> None:
    write_fake_run(tmp_path, num_steps=5, samples_per_task=2)
    path = tmp_path / "eval" / "predictions_blind.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    assert read_report(tmp_path).num_met == 7, "their order does not matter"
    path.write_text("".join([*lines, lines[1]]))
    with pytest.raises(DataError, match=r"blind\.jsonl: 1 questions .*vqa-0 is answered more than once"):
        read_report(tmp_path)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # as a copy that was cut
    with pytest.raises(DataError, match=r"blind\.jsonl, line 8: not JSON"):
        read_report(tmp_path)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=r"blind\.jsonl: 1 questions .*ocr-1 is not answered"):
        read_report(tmp_path)
    path.write_text("".join(lines).replace("What color", "Which color"))
    with pytest.raises(DataError, match=r"model\.jsonl: 2 questions .*vqa-0 is not answered"):
        read_report(tmp_path)


def test_a_missing_image_names_the_prediction(tmp_path: Path) -> None:
    write_fake_run(tmp_path, num_steps=5, samples_per_task=1)
    (tmp_path / "eval" / "images" / "vqa-0.png").unlink()
    with pytest.raises(DataError, match=r"vqa-0\.png.*vqa-0"):
        read_report(tmp_path)


def _line(**values: object) -> str:
    defaults = dict.fromkeys(
        ("learning_rate", "grad_norm", "tokens_per_second", "images_per_second", "tflops_per_rank"), 1.0
    )
    return json.dumps({**defaults, "layout": "DP 2", **values}) + "\n"


def test_training_records_of_a_resumed_run(tmp_path: Path) -> None:
    torn = _line(iteration=1, lm_loss=3) + _line(iteration=2, lm_loss=2) + _line(iteration=2, validation_loss=9)
    (tmp_path / "metrics.jsonl").write_text(torn + _line(iteration=2, lm_loss=1.5) + '{"iteration": 3, "lm_')
    assert [(r.iteration, r.lm_loss) for r in load_training(tmp_path)] == [(1, 3), (2, 1.5)]


def test_a_damaged_or_foreign_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration\n' + _line(iteration=2, lm_loss=2))
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 2.0}\n')
    with pytest.raises(DataError, match="line 1.*learning_rate.*found the keys iteration, lm_loss"):
        load_training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(_line(iteration=2, validation_loss=2))
    with pytest.raises(DataError, match="no line has a training loss"):
        load_training(tmp_path)


def _record(iteration: int, layout: str) -> TrainingRecord:
    return TrainingRecord(iteration, 1.0, 1e-3, 1.0, 1.0, 1.0, 1.0, layout)


def test_a_layout_phase_is_the_steps_at_one_layout() -> None:
    phases = find_layout_phases([_record(1, "a"), _record(2, "a"), _record(3, "b"), _record(4, "a")])
    assert [(phase.layout, phase.first, phase.last) for phase in phases] == [("a", 1, 2), ("b", 3, 3), ("a", 4, 4)]


def test_smoothing_keeps_a_constant_and_short_series() -> None:
    assert smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert smooth([3.0, 1.0]) == [3.0, 1.0]
    assert smooth([]) == []


def test_durations_and_tables() -> None:
    assert [show_duration(s) for s in (0.04, 59.9, 59.96, 3599, 3725)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 02 min",
    ]
    assert format_table(("a", "n"), [("xyz", "1")]) == "a    n\n───  ─\nxyz  1"


def test_total_counts_steps_side_by_side_once_and_pauses_not_at_all() -> None:
    times = [StepTime("a", 10, 100), StepTime("b", 10, 105), StepTime("c", 2, 106), StepTime("a", 5, 200, False)]
    assert total_seconds(times) == 20
    assert [(row.step, row.seconds, row.attempts) for row in time_rows(times)] == [
        ("a", 15, 2),
        ("b", 10, 1),
        ("c", 2, 1),
    ]
