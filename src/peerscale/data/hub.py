"""Texts streamed from the Hugging Face hub. Only this module needs the package `datasets` (extra `hub`)."""

from collections.abc import Iterator

from peerscale.errors import UserError


def texts(name: str, subset: str, split: str, skip: int = 0) -> Iterator[str]:
    """The column `text` of a data set, from row `skip` on.

    Raises:
        UserError: the package `datasets` is not installed, or a row cannot be read.
    """
    try:
        import datasets  # pyrefly: ignore[missing-import]
    except ImportError:
        raise UserError(
            f"{name} needs the package datasets: .venv/bin/python -m pip install --editable '.[hub]'"
        ) from None
    n_read = skip
    try:
        for row in datasets.load_dataset(name, name=subset, split=split, streaming=True).skip(skip):
            yield row["text"]
            n_read += 1
    except Exception as error:  # from one of several HTTP, archive and JSON libraries
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name} {split} cannot be read after {n_read:,} rows: {reason}") from None
