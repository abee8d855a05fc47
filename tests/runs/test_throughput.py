"""What a run gets through, from what its ranks noted."""

import json
from pathlib import Path

import pytest

from hpcmm.runs.metrics import MetricsWriter
from hpcmm.runs.run_dir import RunDir
from hpcmm.runs.throughput import Throughput, in_words, throughput_of


def noted(folder: Path, rank: int, *, peak: float | None = None, steps=((1.0, {}),), attempt: int = 1) -> RunDir:
    run = RunDir(folder)
    run.metrics.mkdir(exist_ok=True, parents=True)
    with MetricsWriter(run.metrics / f"rank_{rank:04d}.jsonl", attempt) as metrics:
        metrics.start(rank=rank, local_rank=rank, world_size=2, node="n", job_id="1")
        metrics.device(name="GPU", precision="bf16", peak_flops=peak)
        metrics.resume(0)
        for number, (step_s, values) in enumerate(steps):
            metrics.step(number, loss=1.0, **values, peak_memory_bytes=1e9 * (rank + 1), step_s=step_s)
    return run


def test_ranks_add_up_and_the_first_step_is_left_out(tmp_path: Path) -> None:
    slow, usual = (100.0, {"input_tokens": 500}), (2.0, {"input_tokens": 500, "model_flops": 4e12})
    noted(tmp_path, 0, peak=1e13, steps=[slow, usual, usual])
    run = noted(tmp_path, 1, peak=1e13, steps=[slow, usual, usual])
    found = throughput_of(run)
    assert (found.steps, found.tokens_per_s) == (2, 500.0), "250 tokens a second on each of two ranks"
    assert (found.model_flops, found.flops_per_s, found.peak_flops_per_s) == (8e12, 4e12, 2e13)
    assert found.mfu == pytest.approx(0.2)
    assert found.hfu is None, "nothing is computed again"
    assert found.peak_memory_bytes == 2e9


def test_what_is_computed_again_is_in_the_hardwares_share_alone(tmp_path: Path) -> None:
    values = {"model_flops": 3e12, "hardware_flops": 4e12}
    found = throughput_of(noted(tmp_path, 0, peak=1e13, steps=[(1.0, values)]))
    assert (found.mfu, found.hfu) == (pytest.approx(0.3), pytest.approx(0.4))
    assert "MFU 30.0% of the GPUs' bf16 peak, HFU 40.0% with what is computed again" in in_words(found)


def test_without_a_known_peak_there_is_no_share_of_it(tmp_path: Path) -> None:
    noted(tmp_path, 0, peak=1e13, steps=[(1.0, {"model_flops": 3e12})])
    found = throughput_of(noted(tmp_path, 1, peak=None, steps=[(1.0, {"model_flops": 3e12})]))
    assert (found.flops_per_s, found.mfu) == (6e12, None)
    assert "MFU" not in in_words(found)


def test_a_rank_that_shares_its_micro_batch_notes_none_of_the_tokens(tmp_path: Path) -> None:
    noted(tmp_path, 0, steps=[(1.0, {"input_tokens": 300})])
    found = throughput_of(noted(tmp_path, 1, steps=[(1.0, {})]))
    assert found.tokens_per_s == 300
    assert in_words(found) == "300 tokens/s; a rank's peak memory is 2 GB"


def test_the_time_of_a_step_is_the_median_of_those_in_which_nothing_was_counted(tmp_path: Path) -> None:
    counted = {"comm_bytes_data": 100.0, "comm_bytes_tensor": 7.0}
    steps = [(9.0, {}), (5.0, counted), (1.0, {}), (2.0, {}), (1.5, {})]
    found = throughput_of(noted(tmp_path, 0, steps=steps))
    assert found.step_s == 1.5
    assert found.comm_bytes == {"data": 100.0, "tensor": 7.0}


def test_bytes_are_the_mean_over_the_ranks_also_at_the_beginning_of_a_long_file(tmp_path: Path) -> None:
    many = [(1.0, {})] * 2000
    noted(tmp_path, 0, steps=[(1.0, {}), (1.0, {"comm_bytes_data": 10.0}), (1.0, {"comm_bytes_data": 30.0}), *many])
    found = throughput_of(noted(tmp_path, 1, steps=[(1.0, {}), (1.0, {"comm_bytes_pipeline": 4.0})]))
    assert found.comm_bytes == {"data": 10.0, "pipeline": 2.0}


def test_the_loss_is_that_of_the_newest_step_of_all_ranks_each_token_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.mkdir()
    for rank, losses in enumerate(([5.0, 4.0, 3.0], [5.0, 1.0])):
        with MetricsWriter(run.rank_metrics(rank)) as metrics:
            for step, loss in enumerate(losses):
                metrics.step(step, loss=loss, tokens=1 + rank, peak_memory_bytes=1.0, step_s=1.0)
    assert throughput_of(run).loss == pytest.approx((4.0 + 2 * 1.0) / 3)


def test_runs_of_earlier_versions_and_damaged_records_tell_nothing(tmp_path: Path) -> None:
    assert throughput_of(RunDir(tmp_path / "none")) is None
    run = noted(tmp_path, 0, steps=[])
    file = run.metrics / "rank_0000.jsonl"
    file.write_text(
        file.read_text(encoding="utf-8") + '{"event": "step", "step": 1, "step_s": 1.0}\n', encoding="utf-8"
    )
    assert throughput_of(run) is None
    odd = {
        "event": "step",
        "step": 2,
        "step_s": 1.0,
        "peak_memory_bytes": "x",
        "model_flops": 1e300,
        "input_tokens": -1,
    }
    file.write_text(file.read_text(encoding="utf-8") + json.dumps(odd) + "\n", encoding="utf-8")
    found = throughput_of(run)
    assert (found.flops_per_s, found.tokens_per_s, found.peak_memory_bytes) == (0, 0, 0)


def test_numbers_have_the_unit_that_suits_them() -> None:
    found = Throughput(3, 12_345.6, 2e15, 4.2e12, 4.2e12, None, "bf16", 1.5e9)
    assert in_words(found) == "12,346 tokens/s; 4.2 TFLOP/s (2 PFLOP a step); a rank's peak memory is 1.5 GB"
