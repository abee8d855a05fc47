"""The parts of a rank's start, from the marks in its environment."""

import os
import time

import psutil

from hpcmm.runs.attempts import parts_before, process_began_s


def test_the_parts_add_up_to_the_time_since_the_job_s_start():
    environ = {
        "SLURM_JOB_START_TIME": "100", "HPCMM_SCRIPT_BEGAN_S": "100.5", "HPCMM_SRUN_BEGAN_S": "101.75",
        "HPCMM_CAPTURE_BEGAN_S": "102", "HPCMM_COMMAND_BEGAN_S": "104",
    }  # fmt: skip
    parts = dict(parts_before(104.5, environ))
    assert parts == {"scheduler": 0.5, "prepare": 1.25, "srun": 0.25, "capture": 2.0, "interpreter": 0.5}
    assert sum(parts.values()) == 4.5
    assert sum(duration_s for _, duration_s in parts_before(None, environ)) == 4.0


def test_without_slurm_the_preparation_in_front_of_a_rank_is_a_part_of_its_own():
    marks = {"HPCMM_SCRIPT_BEGAN_S": "100", "HPCMM_CAPTURE_BEGAN_S": "239", "HPCMM_COMMAND_BEGAN_S": "249"}
    assert dict(parts_before(250.0, marks)) == {"prepare": 139.0, "capture": 10.0, "interpreter": 1.0}


def test_a_stage_that_left_no_mark_is_left_out():
    assert dict(parts_before(5.0, {"HPCMM_CAPTURE_BEGAN_S": "2", "HPCMM_COMMAND_BEGAN_S": "4"})) == {
        "capture": 2.0,
        "interpreter": 1.0,
    }
    assert list(parts_before(5.0, {})) == []


def test_the_start_of_a_process_is_known_to_a_few_hundredths():
    before = time.time()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(process_began_s()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    began_s = float(os.read(reader, 64))
    assert before - 0.05 <= began_s <= time.time() + 0.05
    assert abs(process_began_s() - psutil.Process().create_time()) < 2
