"""Results to keep: dated, with the commit, and the same verdicts in JSON and Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vl.report.report import read_report
from megatron_vl.report.results import write_results
from tests.unit.report.fake_run import write_fake_run


def test_results_carry_date_commit_and_every_verdict(tmp_path: Path) -> None:
    run_dir = write_fake_run(tmp_path / "run", num_steps=20, samples_per_task=2)
    checks = run_dir / "eval" / "checks.json"
    checks.write_text(checks.read_text().replace("true", "false"))
    report = read_report(run_dir)
    write_results(report, tmp_path / "results" / "learn")
    found = json.loads((tmp_path / "results" / "learn.json").read_text(encoding="utf-8"))
    page = (tmp_path / "results" / "learn.md").read_text(encoding="utf-8")
    assert (found["date"], found["commit"]) == (report.run.date, report.run.commit)
    assert [item["met"] for item in found["requirements"]] == [item.met for item in report.requirements]
    assert page.count("| missed |") == sum(not item.met for item in report.requirements) > 0
    assert found["total_seconds"] == round(report.seconds, 1)
    assert report.run.date in page
    assert report.run.commit in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    assert len(tables) > 30
