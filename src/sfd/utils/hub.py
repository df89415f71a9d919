"""What is saved as a folder, on the Hugging Face hub: `push_to_hub`, `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from sfd.utils.errors import SFDError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Shared = TypeVar("Shared", bound="HubFolder")


class HubFolder(ModelHubMixin):
    """Base of what `save` writes as a folder and `from_folder` reads; subclasses have both and `card`."""

    def save(self, folder: Path) -> None:
        """Write the folder."""
        raise NotImplementedError

    # Options differ between subclasses.
    from_folder: ClassVar[Callable[..., Any]]  # a class method: reads the folder
    card: Callable[..., str]  # writes the text of the model card, README.md

    @classmethod
    def from_pretrained(
        cls: type[Shared],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Shared:
        """Read a folder, or a name on the hub ("owner/name"), which is fetched if it is not in the local cache."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = fetch(
                str(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        return cast(Shared, cls.from_folder(folder, **options))

    def _save_pretrained(self, save_directory: Path) -> None:
        # By way of another folder: `save` may replace the one it is given, and what else lies in this one is not ours.
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            self.save(Path(temporary) / "saved")
            shutil.copytree(Path(temporary) / "saved", save_directory, dirs_exist_ok=True)
        self._hub_mixin_config = None  # the folder has its own configuration

    def generate_model_card(self, *args: Any, **known: Any) -> ModelCard:
        """Make the model card; `known` goes to `card`."""
        return ModelCard(self.card(**known))


def fetch(name: str, **options: Any) -> Path:
    """Give the folder of a name on the hub, from the local cache if it is there; see `snapshot_download`."""
    if not HUB_NAME.fullmatch(name):
        raise SFDError(f"{name} is neither a folder nor a name on the hub, which is OWNER/NAME; give one of the two")
    try:
        return Path(snapshot_download(name, **options))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SFDError(
            f"{name} is neither a folder nor to be had from the hub ({reason}); run `hf download {name}` where there "
            "is a network"
        ) from None
