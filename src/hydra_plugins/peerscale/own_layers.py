"""Where the YAML files of layers outside peerscale are found."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from peerscale.config.compose import own_folders


class OwnLayers(SearchPathPlugin):
    """In the user's `conf/` folders; of two files of one name, peerscale's counts."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for conf in own_folders():
            search_path.append("own-layers", f"file://{conf}")
