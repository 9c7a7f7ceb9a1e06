"""What an unfinished run of ``loftq-init`` has kept of each layer."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .distributed import world
from .files import rename_into_place
from .layer_plan import LayerPlan
from .report import LayerReport, dumps
from .safetensors_io import TensorEntry, read_header, write_file
from .solve import SolvedLayer


class Pieces:
    """Finished layers in the workspace: NUMBER.base until its shard is written, NUMBER.done to the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, layer: LayerPlan, kind: str) -> Path:
        return self.folder / f"{layer.index:05d}.{kind}"

    def has(self, layer: LayerPlan) -> bool:
        return self._path(layer, "done").exists()

    def put(self, layer: LayerPlan, solved: SolvedLayer) -> None:
        """Keep a layer. The second file says that both are whole; the sync of its name covers both."""
        facts = {"report": dumps(solved.report.to_json()), "digest": solved.digest}
        base, done = self._path(layer, "base"), self._path(layer, "done")
        temporary = self.folder / f"piece-{world().rank}.tmp"
        write_file(temporary, solved.base)
        os.replace(temporary, base)
        write_file(temporary, solved.factors, facts)
        rename_into_place(temporary, done)

    def base(self, layer: LayerPlan) -> list[TensorEntry]:
        return list(read_header(self._path(layer, "base"))[0].values())

    def drop_base(self, layer: LayerPlan) -> None:
        self._path(layer, "base").unlink(missing_ok=True)

    def factors(self, layer: LayerPlan) -> list[TensorEntry]:
        return list(read_header(self._path(layer, "done"))[0].values())

    def facts(self, layer: LayerPlan) -> tuple[LayerReport, str]:
        about = read_header(self._path(layer, "done"))[1]
        return LayerReport.from_json(json.loads(about["report"])), about["digest"]
