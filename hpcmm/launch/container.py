"""The words that put a command into a container: in front of it for Apptainer, arguments of srun for pyxis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcmm.config.schema import ContainerConfig, ContainerEngine, RunConfig
from hpcmm.runs.run_dir import RunDir


@dataclass(frozen=True)
class Container:
    """A site's container, with the folders that the ranks must see."""

    config: ContainerConfig
    mounts: tuple[str, ...] = ()
    working_directory: str = "/"

    @classmethod
    def of(cls, config: RunConfig, run: RunDir, working_directory: Path) -> Container:
        """With the folders of the run, of its cache and of the launch, and then the site's own."""
        container = config.cluster.container
        if container.engine is None:
            return cls(container)
        from hpcmm.node.cache import cache_dir  # noqa: PLC0415 -- importlib.metadata, 20 ms of every dry run

        folders = (str(run.root), str(cache_dir(config.cluster)), str(working_directory), *container.mounts)
        return cls(container, folders, str(working_directory))

    def inside(self) -> list[str]:
        """What stands in front of a command that srun starts."""
        if self.config.engine is not ContainerEngine.apptainer:
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", "--pwd", self.working_directory, *binds, *self.config.arguments, self._image()]

    def srun_arguments(self) -> list[str]:
        """What srun itself must be told."""
        if self.config.engine is not ContainerEngine.pyxis:
            return []
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in self.mounts)
        where = [f"--container-mounts={pairs}", f"--container-workdir={self.working_directory}"]
        return [f"--container-image={self._image()}", *where, *self.config.arguments]

    def on_first_node(self) -> list[str]:
        """What stands in front of a command of the batch script itself, which runs outside of any container."""
        if self.config.engine is ContainerEngine.pyxis:
            return ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--relative=0", *self.srun_arguments()]
        return self.inside()

    def _image(self) -> str:
        assert self.config.image is not None  # validated
        return self.config.image
