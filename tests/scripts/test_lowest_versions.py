"""The lowest versions that the project allows, as pip is asked for them."""

import importlib.util
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("lowest_versions", PROJECT / "scripts" / "lowest_versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_requirement_has_a_lower_bound_that_is_asked_for(script):
    lines = script.constraints(["train", "serve", "fp8", "dev"])
    assert all(line.count("==") == 1 for line in lines)
    assert {"hydra-core==1.3.2", "pyarrow==22.0"} <= set(lines)
    assert len(script.constraints([])) < len(lines)


@pytest.mark.parametrize("given", ["numpy", "numpy<3"])
def test_a_requirement_without_a_lower_bound_is_named(script, given):
    with pytest.raises(ValueError, match=f"^{given} of pyproject.toml has no lower bound"):
        script.lowest(given)
    with pytest.raises(ValueError, match="no-such: extras are train, serve, fp8, dev"):
        script.constraints(["no-such"])
