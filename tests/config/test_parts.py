"""Parts of a model from YAML files, checked by the source of their classes."""

import subprocess
import sys
from pathlib import Path

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.parts import build_part, part_name
from hpcmm.config.validate import validate
from hpcmm.errors import HpcmmError
from hpcmm.workloads.anomaly.schema import DECODER

OWN_DECODER = '''\
from collections.abc import Sequence

from torch import Tensor, nn

from hpcmm.workloads.anomaly.models.decoders.decoder import Decoder

print("imported")


class WideDecoder(Decoder):
    """The finest map alone."""

    def __init__(self, channels: Sequence[int], width: int, kernel: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels[0], width, kernel, padding=kernel // 2, bias=bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.layer(features[0])


class NoDecoder(nn.Module):
    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()


class Starred(WideDecoder):
    pass


class Needy(Decoder):
    def __init__(self, channels, width, depth: int) -> None:
        super().__init__()
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's with a package and a config folder."""
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "decoders.py").write_text(OWN_DECODER)
    options = tmp_path / "conf" / "model" / "decoder"
    options.mkdir(parents=True)
    (options / "wide.yaml").write_text("_target_: own_package.decoders.WideDecoder\nkernel: 3\n")
    (options / "none.yaml").write_text("_target_: own_package.decoders.NoDecoder\n")
    (options / "needy.yaml").write_text("_target_: own_package.decoders.Needy\n")
    (options / "gone.yaml").write_text("_target_: own_package.decoders.Gone\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(*overrides: str) -> list[str]:
    try:
        validate(compose_run(["cluster=local", "launch.config_dir=conf", *overrides]))
    except HpcmmError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("override", ["model/decoder=wide", "model.decoder=wide"])
def test_a_users_decoder_is_chosen_by_its_name(own: Path, override: str):
    config = compose_run(["cluster=local", "launch.config_dir=conf", override, "model.decoder_width=8"])
    validate(config)
    assert "own_package" not in sys.modules
    assert part_name(config.model.decoder) == "wide"
    decoder = build_part(config.model.decoder, DECODER, channels=[4, 8], width=8)
    assert decoder.layer.kernel_size == (3, 3)


def test_a_parameter_of_a_part_is_an_override(own: Path):
    config = compose_run(["cluster=local", "launch.config_dir=conf", "model/decoder=wide", "model.decoder.bias=false"])
    validate(config)
    assert config.model.decoder == {
        "name": "wide", "_target_": "own_package.decoders.WideDecoder", "kernel": 3, "bias": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model.decoder.kernle=1"],
            "model.decoder.kernle is not a parameter of WideDecoder; its parameters: kernel, bias.",
        ),
        (["model.decoder.kernel=wide"], "model.decoder.kernel is 'wide', but WideDecoder takes int."),
        (["model.decoder.kernel=1.5"], "model.decoder.kernel is 1.5, but WideDecoder takes int."),
        (["model.decoder.bias=1"], "model.decoder.bias is 1, but WideDecoder takes bool."),
        (["model.decoder.width=4"], "model.decoder.width cannot be given: the workload sets it."),
        (["model.decoder._target_=torch.nn.Linear"], "that is not a Decoder"),
        (["model.decoder._target_=pathlib.Path"], "which is not a Decoder"),
        (["model/decoder=none"], "which is not a Decoder"),
        (["model/decoder=gone"], "there is no such class"),
        (["model/decoder=needy"], "model.decoder.depth is not given, but Needy needs it."),
        (["model.decoder=poetry"], "but hpcmm has fcn, gone, mlp, mlp_bn, needy, none, resnet, wide."),
        (["model.decoder=../../decoder/fcn"], "but hpcmm has fcn"),
        (["model.decoder=[1]"], "model.decoder: "),
    ],
)
def test_a_wrong_part_is_named_without_being_imported(own: Path, overrides: list[str], said: str):
    found = (
        problems("model/decoder=wide", *overrides)
        if "/" not in overrides[0].partition("=")[0]
        else problems(*overrides)
    )
    assert len(found) == 1
    assert said in found[0]
    assert "own_package" not in sys.modules


def test_a_part_of_another_class_is_not_built(own: Path):
    with pytest.raises(HpcmmError, match="is not a Decoder, which each model/decoder must be"):
        build_part({"_target_": "own_package.decoders.NoDecoder"}, DECODER, channels=[1], width=1)
    with pytest.raises(HpcmmError, match="cannot be imported"):
        build_part({"_target_": "own_package.nowhere.Decoder"}, DECODER, channels=[1], width=1)
    with pytest.raises(HpcmmError, match="is not a class"):
        build_part({"_target_": "os.getcwd"}, DECODER, channels=[1], width=1)


def test_a_config_folder_hides_none_of_hpcmms_own_files(own: Path):
    (own / "conf" / "model" / "decoder" / "fcn.yaml").write_text("_target_: own_package.decoders.WideDecoder\n")
    assert "so give yours another name" in problems()[0]
    assert "there is no such folder" in problems("launch.config_dir=nowhere")[0]


def test_a_folder_that_is_not_one_of_config_groups_is_refused_soon(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hpcmm.config.space.MOST_ENTRIES", 20)
    many = own / "many"
    many.mkdir()
    for number in range(30):
        (many / f"{number}.txt").touch()
    assert "which holds more than 20 files" in problems("launch.config_dir=many")[0]


def test_a_sweep_over_a_users_decoder_resolves_each_point(own: Path):
    from hpcmm.config.sweep import compose_points

    for word in ("model/decoder=wide,mlp", "model.decoder=wide,mlp"):
        points = compose_points(["cluster=local_slurm", "launch.config_dir=conf", word, "train.seed=0,1"])
        assert [part_name(point.config.model.decoder) for point in points] == ["wide", "wide", "mlp", "mlp"]
        assert all("_target_" in point.config.model.decoder for point in points)


def test_checking_parts_imports_no_torch(own: Path):
    code = (
        "import sys; from hpcmm.config.compose import compose_run; from hpcmm.config.validate import validate; "
        "validate(compose_run(['cluster=local', 'launch.config_dir=conf', 'model/decoder=wide'])); "
        "print('torch' in sys.modules, 'own_package' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=own, check=True)
    assert done.stdout.split() == ["False", "False"]


def composed(*overrides: str):
    config = compose_run(["cluster=local", "launch.config_dir=conf", *overrides])
    validate(config)
    return config.model.decoder


def test_a_part_means_the_same_as_a_value_and_as_a_group(own: Path):
    wide = own / "conf" / "model" / "decoder" / "fine.yaml"
    wide.write_text("_target_: own_package.decoders.Rated\nrate: 1e-4\nwarm: ${train.learning_rate}\n")
    (own / "own_package" / "decoders.py").write_text(
        OWN_DECODER + "\nclass Rated(WideDecoder):\n"
        "    def __init__(self, channels, width, rate: float, warm: float, kernel: int = 1) -> None: ...\n"
    )
    by_group, by_value = composed("model/decoder=fine"), composed("model.decoder=fine")
    assert by_group == by_value
    assert (by_value["rate"], by_value["warm"]) == (1e-4, 1e-3)
    assert composed("model.decoder=fine", "model.decoder.kernel=7")["kernel"] == 7
    assert composed("model.decoder.kernel=7", "model.decoder=fine")["kernel"] == 7


def test_another_class_takes_the_names_place(own: Path):
    given = composed("model/decoder=resnet", "model.decoder={_target_: own_package.decoders.WideDecoder, kernel: 3}")
    assert part_name(given) == "WideDecoder"
    assert "leave it out" in problems("model/decoder=wide", "model.decoder.name=other")[0]


def test_what_the_source_does_not_tell_is_left_to_the_rank(own: Path):
    (own / "own_package" / "many.py").write_text(
        "from own_package.decoders import WideDecoder\nfrom own_package.decoders import *\nAlias = WideDecoder\n"
        "if True:\n    class Within(WideDecoder):\n"
        "        def __init__(self, channels, width, depth: int = None, note: 'a free text' = 3) -> None: ...\n"
    )
    for name in ("Alias", "WideDecoder", "Starred"):
        assert composed(f"model.decoder={{_target_: own_package.many.{name}, kernel: 3}}")["kernel"] == 3
    within = composed("model.decoder={_target_: own_package.many.Within, depth: null, note: 4}")
    assert within["depth"] is None


def test_the_task_is_chosen_as_hydra_does_it(own: Path):
    task = own / "conf" / "task"
    task.mkdir()
    (task / "again.yaml").write_text("# @package _global_\ndefaults:\n  - anomaly\n  - _self_\n")
    (own / "conf" / "experiment").mkdir()
    (own / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /task: again\n  - override /model/decoder: wide\n"
    )
    for words in (["task='anomaly'"], ["task=again"], ["experiment=mine"], ["experiment='mine'"]):
        assert "kernel" in composed(*words, "model/decoder=wide")
    assert part_name(composed("experiment=mine")) == "wide"
    assert "again, anomaly" in problems("task=nope", "data.generate=true")[0]
    assert "launch.config_dir is ???" not in problems("launch.config_dir='conf'")


def test_a_class_given_as_a_value_brings_its_keys(own: Path):
    target = "task._target_=hpcmm.workloads.anomaly.workload.AnomalyWorkload"
    config = compose_run(["cluster=local", "task=script", "task.path=a.py", target])
    assert config.model.decoder_width == 256


def test_the_points_of_a_sweep_share_one_copy_of_all_their_classes(own: Path):
    from hpcmm.config.sweep import compose_points
    from hpcmm.launch.plan import plan

    bare = own / "bare_package"
    bare.mkdir()
    (bare / "d.py").write_text(OWN_DECODER)
    (own / "conf" / "model" / "decoder" / "bare.yaml").write_text("_target_: bare_package.d.WideDecoder\n")
    for swept in ("fcn,wide", "wide,fcn", "fcn,bare"):
        words = ["cluster=slurm", "launch.config_dir=conf", f"model/decoder={swept}", "dry_run=true"]
        planned = plan(compose_points(words), words)
        assert planned.project == own
        assert any(folder.endswith("code/project") for folder in planned.job.python_path)
