"""``verify --json``: what the kit's program finds, for programs."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import succeed
from fake_library import fake_library
from test_verify import verify
from tiny import tiny_bundle

from netship.targets.presets import native


def test_json_is_one_object_with_the_keys_of_check(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    bundle = tiny_bundle(tmp_path / "tiny", native())
    result = verify(bundle.path, "--repeat", "7", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    answer = json.loads(result.stdout)
    assert answer["passed"] and answer["origin"] == "measured"
    assert answer["compared"] == "golden inputs" and answer["images"] == 2
    assert [each["name"] for each in answer["results"]] == ["golden 0", "golden 1"]
    worst = max(each["max_abs_error"] for each in answer["results"])
    assert answer["max_abs_error"] == worst and 0 <= answer["of_tolerance"] <= 1
    times = answer["latency_ms"]
    assert times["minimum"] <= times["median"] <= times["p90"] <= times["p99"]
    assert {"before", "after", "machine", "cores"} <= {*answer["board"]}
    checked = json.loads(succeed("runtime_demo.check", bundle.path, "--json"))
    assert {*answer} - {"model"} < {*checked}
    # A wrong answer that is no number.
    wrong = verify(
        fake_library(tmp_path, native(), WRITTEN=11).path, "--json", "--repeat", "0"
    )
    answer = json.loads(wrong.stdout)
    assert wrong.returncode == 1 and answer["passed"] is False
    assert answer["max_abs_error"] is None and answer["latency_ms"] is None
    refused = verify(tmp_path / "none", "--json")
    assert (refused.returncode, refused.stdout) == (2, "")
