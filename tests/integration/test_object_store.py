"""``tools/prepare_data.py`` over a small S3 server, in processes of their own: the bytes of the disk, whatever breaks.

The tests need s3fs, of the extra ``remote``. It is not among the packages of ``constraints-cpu.txt``, because botocore
refuses the version of python-dateutil there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.data.jobs import ROOT, RUN, hashes, recipe_file
from tests.helpers.data.prepared import png, write_raw
from tests.helpers.data.reading import write_tar
from tests.helpers.object_store import ALONE, ObjectStore, serve
from tests.unit.data.prepare.test_interrupted import DIES

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")

NO_PAUSES = """
import sys
from megatron_vl.cli import prepare
from megatron_vl.data.remote import store
store.PAUSES = (0.0, 0.0, 0.0)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    """Captions in five tars and documents, in the bucket ``raw`` and, the same files, in the folder ``disk``."""
    disk = tmp_path / "disk"
    write_raw(disk)
    for number in (3, 4):
        members = [("a.png", png(number)), ("a.txt", b"a shade"), ("b.png", b"broken"), ("b.txt", b"nothing")]
        write_tar(disk / "captions" / f"{number:05d}.tar", members)
    shutil.copytree(disk, tmp_path / "buckets" / "raw" / "of tests")
    with serve(tmp_path / "buckets") as served:
        yield served


def run(store: ObjectStore, output: Path, *flags: str, code: str = NO_PAUSES, **changed: str) -> tuple[int, str]:
    """Exit status and what was said on standard error."""
    recipe = recipe_file(store.root.parent)
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    arguments = [str(recipe), "--root", "s3://raw/of tests", "--output", str(output), "--quiet", *flags]
    done = subprocess.run(
        [sys.executable, "-c", code + RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env={**environment, **store.environment, **changed},
    )  # fmt: skip
    return done.returncode, done.stderr


def from_disk(store: ObjectStore) -> dict[str, str]:
    output = store.root.parent / "expected" / "set"
    status, said = run(store, output, "--workers", "1", "--root", str(store.root.parent / "disk"))
    assert status == 0, said
    assert store.requests == [], "nothing is asked of a store"
    return hashes(output)


def test_several_processes_prepare_the_bytes_of_the_disk(store: ObjectStore, tmp_path: Path) -> None:
    expected = from_disk(store)
    status, said = run(store, tmp_path / "new" / "set", "--workers", "2")
    assert status == 0, said
    assert hashes(tmp_path / "new" / "set") == expected and len(expected) == 8
    tars = [line for line in store.requests if line.startswith("GET") and ".tar" in line]
    assert len(tars) == 5, "every tar is fetched once"


def test_a_connection_that_breaks_in_the_middle_is_tried_again(store: ObjectStore, tmp_path: Path) -> None:
    expected = from_disk(store)
    store.broken = 8  # more often than s3fs tries
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1")
    assert status == 0, said
    assert store.broken == 0 and hashes(tmp_path / "new" / "set") == expected


def test_a_killed_preparation_goes_on(store: ObjectStore, tmp_path: Path) -> None:
    expected = from_disk(store)
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1", code=NO_PAUSES + DIES.format(survives=5))
    assert status == -signal.SIGKILL, said
    store.requests.clear()
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1")
    assert status == 0, said
    assert hashes(tmp_path / "new" / "set") == expected
    tars = {line.split()[2] for line in store.requests if line.startswith("GET") and ".tar" in line}
    assert tars == {f"tests/captions/{number:05d}.tar" for number in (2, 3, 4)}, "the first two were finished"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            r"no usable credentials were found \(NoCredentialsError: .*\); set AWS_PROFILE, or AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_ACCESS_KEY_ID": "stranger"}, r"the store refuses access \(PermissionError: .*\)\. The credentials must"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"cannot look it up, in 4 attempts \(EndpointConnectionError: "),
    ],
)
def test_what_keeps_a_store_shut_is_one_line(
    store: ObjectStore, tmp_path: Path, changed: dict[str, str], expected: str
) -> None:
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1", **ALONE, **changed)
    assert status == 2
    (line,) = said.splitlines()
    assert re.match(rf"error: source 'captions': s3://raw/of tests/captions: {expected}", line), line


def test_settings_of_fsspec_open_a_public_bucket(store: ObjectStore, tmp_path: Path) -> None:
    expected = from_disk(store)
    (store.root / "raw").rename(store.root / "public")
    settings = {"FSSPEC_S3_ANON": "true", "FSSPEC_S3_ENDPOINT_URL": store.url, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    no_key = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    flags = "--workers", "1", "--root", "s3://public/of tests"
    status, said = run(store, tmp_path / "new" / "set", *flags, **settings, **no_key)
    assert status == 0, said
    assert hashes(tmp_path / "new" / "set") == expected


def test_what_is_not_there_is_one_line(store: ObjectStore, tmp_path: Path) -> None:
    (store.root / "raw/of tests/text.jsonl").unlink()
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1")
    assert status == 2 and said == "error: source 'documents': s3://raw/of tests/text.jsonl: no such file\n"


def test_a_file_that_changes_while_it_is_read_ends_the_preparation(store: ObjectStore, tmp_path: Path) -> None:
    tar = store.root / "raw/of tests/captions/00002.tar"
    changes = f"""
from pathlib import Path
from megatron_vl.data.remote import address
ask = address.ask
def late(place, request, doing):
    if place.endswith("00002.tar") and doing.startswith("read it"):
        path = Path({str(tar)!r})
        path.write_bytes(path.read_bytes().replace(b"shade", b"SHADE"))
    return ask(place, request, doing)
address.ask = late
"""
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1", code=NO_PAUSES + changes)
    assert status == 2
    assert said == (
        "error: source 'captions': s3://raw/of tests/captions/00002.tar: was changed while it was read; start again "
        "when nobody writes there\n"
    )


def test_marks_of_folders_and_empty_files_are_no_files(store: ObjectStore, tmp_path: Path) -> None:
    expected = from_disk(store)
    store.marks = ["of tests/captions/"]
    status, said = run(store, tmp_path / "new" / "set", "--workers", "1")
    assert status == 0, said
    assert hashes(tmp_path / "new" / "set") == expected
