"""The id of a hub data set in, the local folder of its files out."""

import logging
from collections.abc import Sequence

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from cocoa_pl.errors import UserError

log = logging.getLogger(__name__)


def snapshot(
    repo: str, *, subsets: Sequence[str], split: str | Sequence[str], revision: str | None
) -> str:
    """Fetch the parquet files of these subsets into the hub's cache and return their folder.

    Images are not fetched: the hub keeps them as archives, which have to be unpacked somewhere.

    Raises:
        UserError: if the hub cannot be reached and the cache has no copy, or holds no such files.
    """
    splits = [split] if isinstance(split, str) else list(split)
    patterns = [f"{subset}/{one}-*.parquet" for subset in subsets for one in splits]
    log.info(
        "%s: fetching %d subset(s) without their images, which are archives on the hub "
        "(MMEB-train: images_zip/%s.zip, ...) to be unpacked below data.image_root",
        repo,
        len(subsets),
        subsets[0],
    )
    try:
        folder: str = snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{repo} cannot be fetched ({str(error).splitlines()[0]:.200}); where there is a "
            f"network, run: hf download {repo} --repo-type dataset --local-dir FOLDER, "
            "unpack its image archives there, and use data=mmeb data.root=FOLDER"
        ) from error
    return folder
