"""Where the YAML files of layers outside peerscale are found."""

import os
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class OwnLayers(SearchPathPlugin):
    """In `conf/` of the current folder and of the folders in PYTHONPATH; of files of one name, peerscale's counts."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in dict.fromkeys([".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]):
            if folder and (conf := Path(folder, "conf").resolve()).is_dir():
                search_path.append("own-layers", f"file://{conf}")
