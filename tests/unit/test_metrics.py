import json
import math

import pytest
import torch

from hydra_rlhf.errors import CheckpointError
from hydra_rlhf.runtime.metrics import Accumulator, JsonLines


def test_keys_are_sorted_after_stage_and_step_and_lines_end_in_newlines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"loss/value": 0.5, "a": 1, "step": 3, "stage": "ppo"})
    lines.append({"z": "ü\n", "b": None})
    assert lines.path.read_bytes() == (
        b'{"stage": "ppo", "step": 3, "a": 1, "loss/value": 0.5}\n{"b": null, "z": "\\u00fc\\n"}\n'
    )


def test_numbers_that_json_does_not_have_are_strings_at_any_depth(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1e-300})
    assert json.loads(lines.path.read_text()) == {"a": "nan", "b": ["inf", {"c": "-inf"}], "d": 1e-300}


def test_floats_come_back_exactly(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"x": 0.1 + 0.2})
    assert json.loads(lines.path.read_text())["x"] == 0.30000000000000004


def test_size_is_the_offset_that_truncate_goes_back_to(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.size == 0
    lines.append({"step": 1})
    # {"step": 1} and a newline.
    assert lines.size == 12
    lines.append({"step": 2})
    with lines.path.open("ab") as file:
        file.write(b'{"step": 3, "half a li')  # a line that a kill cut off
    lines.truncate(12)
    lines.append({"step": 2})
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert JsonLines(lines.path).size == lines.sync() == 24


def test_a_file_shorter_than_the_offset_is_refused_and_left_alone(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 12 bytes.* 13"):
        lines.truncate(13)
    assert lines.size == 12
    with pytest.raises(CheckpointError, match="0 bytes"):
        JsonLines(tmp_path / "none.jsonl").truncate(1)
    JsonLines(tmp_path / "none.jsonl").truncate(0)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_removed_folder_is_an_error_and_is_not_made_again(tmp_path):
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"cannot write .*run folder must stay in place"):
        lines.append({"step": 1})
    assert not (tmp_path / "run").exists()


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(tmp_path):
    # /dev/full has no room for any byte; RLIMIT_FSIZE gives a file room for 20, so the second line fits in part.
    import resource
    import signal

    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl"):
            lines.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert lines.path.read_text() == '{"step": 1}\n'


def test_accumulator_sums_and_keeps_extremes():
    metrics = Accumulator()
    metrics.add({"loss": torch.tensor(0.25, requires_grad=True), "ratio_max": torch.tensor(1.5), "ratio_min": 0.75})
    metrics.add({"loss": torch.tensor(0.5), "ratio_max": torch.tensor(1.25), "ratio_min": 0.5, "late": 2})
    assert metrics.result() == {"late": 2.0, "loss": 0.75, "ratio_max": 1.5, "ratio_min": 0.5}
    assert list(metrics.result()) == ["late", "loss", "ratio_max", "ratio_min"]


@pytest.mark.parametrize("key", ["loss", "ratio_max", "ratio_min"])
@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
def test_accumulator_never_hides_nan(key, values):
    metrics = Accumulator()
    for value in values:
        metrics.add({key: torch.tensor(value)})
    assert math.isnan(metrics.result()[key])


def test_accumulator_does_not_lose_small_parts():
    # In fp32, 2**24 + 1 is 2**24: adding one four times would change nothing.
    metrics = Accumulator()
    for value in (2.0**24, 1.0, 1.0, 1.0, 1.0):
        metrics.add({"x": torch.tensor(value)})
    assert metrics.result() == {"x": 16777220.0}


def test_accumulator_keeps_no_graph_and_does_not_follow_later_writes():
    source = torch.tensor(1.0, dtype=torch.float64)
    metrics = Accumulator()
    metrics.add({"x": source})
    source += 1
    assert metrics.result() == {"x": 1.0}
