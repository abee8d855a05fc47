"""No code of a model's folder is run, and nobody is asked whether it may be."""

import ast
from pathlib import Path

import hpcmm

PACKAGE = Path(hpcmm.__file__).parent
PASSES_ON = {"image_encoders/vit.py"}
"""Modules whose own ``from_pretrained`` passes on what it is given."""


def test_each_call_that_loads_a_folder_trusts_no_code_in_it():
    calls = [
        (module, node)
        for module in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    asked = [
        f"{module.relative_to(PACKAGE)}:{node.lineno}"
        for module, node in calls
        if not any(module.as_posix().endswith(name) for name in PASSES_ON)
        and not any(
            each.arg == "trust_remote_code" and isinstance(each.value, ast.Constant) and each.value.value is False
            for each in node.keywords
        )
    ]
    assert len(calls) >= 8
    assert asked == []
