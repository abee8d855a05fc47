"""All of hpcmm reads a run directory through hpcmm.files: what lies there may be another user's trap."""

import ast
from pathlib import Path

import hpcmm

PACKAGE = Path(hpcmm.__file__).parent
READERS = (
    "runs", "jobs", "launch", "serve", "evaluate", "config/config_file.py", "config/untyped_config.py",
    "analyze/runs.py", "reports/run_record.py", "reports/find.py", "train/checkpoint.py", "doctor/preflight.py",
    "node/cache.py", "worker/compiled_ops.py", "workloads/anomaly/page/held_out.py",
)  # fmt: skip
"""The code that reads run directories and the cache folder."""
RAW = {"read_text", "read_bytes", "open", "is_file", "iterdir", "glob", "rglob"}
READ_ELSEWHERE = {
    # Not in a run directory: the kernel's files, folders of Python's and of the user's project.
    ("files.py", "_has_no_name_here"),
    ("launch/interpreter.py", "installed_packages"),
    ("runs/attempts.py", "process_began_s"),
    ("launch/snapshot.py", ""),
    ("launch/project_files.py", ""),
    ("launch/job_imports.py", ""),
    # The server's own folder, which is private.
    ("serve/server.py", ""),
    ("serve/guard.py", ""),
    ("serve/uploads.py", ""),
    # This user's own run, which they have just made, or which is at work.
    ("launch/write.py", "_sha256"),
    ("launch/submit.py", "_output_to"),
    ("runs/attempts.py", "begin_attempt"),
    ("train/checkpoint.py", "_publish"),
    ("train/checkpoint.py", "_newest_first"),
    # Reports, each of which hpcmm.reports reads with care; checkpoints, whose every file is looked at.
    ("reports/find.py", "_reports_in"),
    ("reports/find.py", "_a_point"),
    ("train/checkpoint.py", "read_trained"),
    # Nothing is read: names that an error, or a choice of the user's own path, depends on.
    ("reports/find.py", "find_reports"),
    ("evaluate/__main__.py", "_is_sweep"),
}
OF_FILES = {"read_text", "read_tail", "read_json_object", "open_regular", "open_checked", "read_checked", "names_in"}
BESIDE = {
    # The file lies directly in the folder that it belongs to.
    ("config/config_file.py", "_frozen"),
    ("config/untyped_config.py", "read_untyped_config"),
    ("serve/address.py", "read_address"),
}


def calls():
    """Module, function, name and call of each call in the code that reads."""
    for reader in READERS:
        path = PACKAGE / reader
        for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = module.relative_to(PACKAGE).as_posix()
            for function in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
                if isinstance(function, ast.FunctionDef):
                    for call in ast.walk(function):
                        if isinstance(call, ast.Call):
                            yield name, function.name, call


def test_no_file_of_a_run_is_opened_but_by_the_safe_reader():
    found = {
        f"{module}, {function}: .{call.func.attr}()"
        for module, function, call in calls()
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in RAW
        and not (isinstance(call.func.value, ast.Name) and call.func.value.id == "os")
        and not READ_ELSEWHERE & {(module, function), (module, "")}
    }
    assert found == set(), "read it by a function of hpcmm.files, or say in READ_ELSEWHERE why it is safe"


def test_each_read_says_in_which_run_the_file_lies():
    found = {
        f"{module}, {function}: {call.func.id}()"
        for module, function, call in calls()
        if isinstance(call.func, ast.Name)
        and call.func.id in OF_FILES
        and not any(keyword.arg == "within" for keyword in call.keywords)
        and (module, function) not in BESIDE
    }
    assert found == set(), "give within=run.root, so that no link between the run's folder and the file is followed"
