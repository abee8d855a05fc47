"""All of hpcmm writes through hpcmm.files: where a command writes, another user may have left a link."""

import ast
from pathlib import Path

import hpcmm

PACKAGE = Path(hpcmm.__file__).parent
WRITES = {"write_text", "write_bytes", "touch", "to_csv", "to_parquet", "to_json", "savefig", "save", "save_file"}
COPIES = {"copyfile", "copy", "copy2"}
WRITTEN_ELSEWHERE = {
    # Into the open file of hpcmm.files.
    ("evaluate/side_by_side.py", "draw_chart"),
    ("workloads/anomaly/maps_picture.py", "draw"),
    # Into memory.
    ("evaluate/__main__.py", "_write"),
    ("serve/uploads.py", "jpeg"),
    # In the run's own directory, which was made for this user alone.
    ("annotate/stopping.py", "note_stopped"),
    ("launch/write.py", ""),
    ("launch/submit.py", "_output_to"),
    ("launch/snapshot.py", "_copy"),
    ("worker/__main__.py", ""),
    ("worker/signal_forwarding.py", ""),
    ("runs/attempts.py", "begin_attempt"),
    ("runs/failures.py", ""),
    ("train/checkpoint.py", ""),
    ("train/loop.py", ""),
    ("train/recipes/experts.py", ""),
    ("train/weights.py", ""),
    ("node/recorder.py", "_opened_high"),
    # In a folder that was made for this alone, and that nobody else can come to.
    ("reports/convert.py", "_copy"),
    ("nsys/capture.py", ""),
    ("worker/compiled_ops.py", ""),
    ("workloads/anomaly/page/blocks.py", ""),
    ("workloads/omni/page/served.py", "_copied"),
    # In the cache folder, which no other user can write.
    ("workloads/anomaly/data/", ""),
    ("workloads/omni/data/made/", ""),
    # The kernel's file.
    ("reports/load.py", "serve"),
}
"""Module, or the start of its path, and function; none stands for all of the module."""


def writes_by_name(call):
    """Whether a call writes, or opens to write, a file that it knows by its name."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    of = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if name == "open" and of not in {"os", "Image"}:
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        return any(set(mode) & set("wax+") for mode in modes)
    return name in WRITES or (name in COPIES and of == "shutil")


def test_no_file_is_written_but_by_the_safe_writer():
    found = set()
    for module in sorted(PACKAGE.rglob("*.py")):
        name = module.relative_to(PACKAGE).as_posix()
        for function in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                known = any(name.startswith(start) and only in {"", function.name} for start, only in WRITTEN_ELSEWHERE)
                calls = (call for call in ast.walk(function) if isinstance(call, ast.Call))
                if not known and any(map(writes_by_name, calls)):
                    found.add(f"{name}, {function.name}")
    assert found == set(), "write it by a function of hpcmm.files, or say in WRITTEN_ELSEWHERE why it is safe"
