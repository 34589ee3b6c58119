"""Where the YAML files of layers outside peerscale are found."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from peerscale.files import outside_folders


class OwnLayers(SearchPathPlugin):
    """In `conf/` of the current folder and of the folders in PYTHONPATH; of files of one name, peerscale's counts."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in dict.fromkeys(outside_folders()):
            if (conf := (folder / "conf").resolve()).is_dir():
                search_path.append("own-layers", f"file://{conf}")
