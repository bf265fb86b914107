"""Assets: a real pip takes wheels and source archives from a local folder; nothing here asks the network."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from slimbench.harness.config.schema import ModelConfig
from slimbench.harness.config.sources import CONF_DIR
from slimbench.tasks import assets
from slimbench.tasks.archive import unpack
from slimbench.tasks.assets import Asset, AssetError
from slimbench.util import checksums
from slimbench.util.files import atomic_folder, cache_dir

MEMBER = "demo/data/words.txt"
CONTENT = b"one two three\n"
OTHER = b"four five six\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT, **extra: bytes) -> str:
    """Write `demo-1.0-py3-none-any.whl` and return its hash."""
    files = {MEMBER: content, "demo/unwanted.txt": b"x", **extra}
    info = {
        "demo-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
        "demo-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "demo-1.0.dist-info/RECORD": b"",
    }
    file = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for name, data in (files | info).items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return assets.hash_file(file)


def make_tar(file: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return file


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip, by its own configuration, takes packages from, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the shipped catalogue by one with the asset `demo`."""
    count = iter(range(100))

    def use(**fields: object) -> Asset:
        file = tmp_path / f"catalogue-{next(count)}.yaml"
        file.write_text(yaml.safe_dump({"demo": {"uri": "pypi:demo==1.0", "members": {MEMBER: None}} | fields}))
        monkeypatch.setattr(assets, "CATALOGUE", file)
        return assets.catalogue()["demo"]

    return use


def left_in_cache() -> list[str]:
    return sorted(entry.name for entry in (cache_dir() / "assets").iterdir() if entry.suffix != ".lock")


def test_fetch_keeps_the_member_and_works_offline_afterwards(index, catalogue):
    pinned = make_wheel(index)
    asset = catalogue(sha256=pinned, members={MEMBER: sha256(CONTENT)})
    assert not assets.is_fetched("demo") and assets.verify("demo") == ["demo: not fetched"]
    file = assets.fetch("demo", progress=False)
    assert file.read_bytes() == CONTENT
    (index / "demo-1.0-py3-none-any.whl").unlink()
    assert assets.is_fetched("demo") and assets.path("demo") == file and assets.verify("demo") == []
    folder = cache_dir() / "assets" / f"demo-{asset.fingerprint}"
    assert left_in_cache() == [folder.name]
    assert {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()} == {MEMBER, checksums.SEAL}
    file.write_bytes(OTHER)
    assert assets.verify("demo") == ["demo: words.txt has a wrong SHA-256"]
    catalogue(sha256=pinned, members={MEMBER: sha256(OTHER)})
    assert not assets.is_fetched("demo"), "another pin is another asset"


@pytest.mark.parametrize("pin", [sha256(CONTENT), None])
def test_a_cached_member_with_other_bytes_is_not_used_but_fetched_again(index, catalogue, pin):
    catalogue(sha256=make_wheel(index), members={MEMBER: pin})
    file = assets.fetch("demo", progress=False)
    times = file.stat()
    file.write_bytes(OTHER[: len(CONTENT)].ljust(len(CONTENT)))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not assets.is_fetched("demo")
    assert assets.fetch("demo", progress=False).read_bytes() == CONTENT
    assert assets.is_fetched("demo") and assets.verify("demo") == []


def test_wrong_archive_is_refused_and_the_next_fetch_starts_clean(index, catalogue):
    pinned = make_wheel(index)
    make_wheel(index, OTHER)
    asset = catalogue(sha256=pinned)
    leftover = cache_dir() / "assets" / f".demo-{asset.fingerprint}-of-a-killed-fetch"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"half")
    with pytest.raises(AssetError, match="not the pinned one") as error:
        assets.fetch("demo", progress=False)
    assert "\n" not in str(error.value) and left_in_cache() == []
    make_wheel(index)
    assert assets.fetch("demo", progress=False).read_bytes() == CONTENT


def test_setup_script_runs_only_if_the_hash_is_the_pinned_one(index, catalogue, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")  # pip's spelling of "no isolation": build with what is installed
    mark = tmp_path / "setup-script-ran"
    script = (
        f"import pathlib, setuptools\npathlib.Path({str(mark)!r}).touch()\nsetuptools.setup(name='demo', version='1.0', py_modules=[])\n"
    )
    member = "demo-1.0/words.txt"
    files = {
        "demo-1.0/setup.py": script.encode(),
        member: CONTENT,
        "demo-1.0/PKG-INFO": b"Metadata-Version: 1.0\nName: demo\nVersion: 1.0\n",
    }
    archive = make_tar(index / "demo-1.0.tar.gz", files)
    catalogue(sha256="0" * 64, members={member: None})
    with pytest.raises(AssetError, match="not the pinned one"):
        assets.fetch("demo", progress=False)
    assert not mark.exists()
    catalogue(sha256=assets.hash_file(archive), members={member: None})
    assert assets.fetch("demo", progress=False).read_bytes() == CONTENT
    assert mark.exists()


def test_unknown_package_says_what_to_do(index, catalogue):
    catalogue()
    with pytest.raises(AssetError, match=r"asset demo: download failed: .*demo==1\.0.*fetch it again") as error:
        assets.fetch("demo", progress=False)
    assert "\n" not in str(error.value)


def test_two_processes_download_once(index, catalogue, tmp_path, monkeypatch):
    catalogue(sha256=make_wheel(index), members={MEMBER: None, "demo/unwanted.txt": None})
    log = tmp_path / "pip.log"
    monkeypatch.setenv("PIP_LOG", str(log))
    code = (
        "import sys; from pathlib import Path; from slimbench.tasks import assets\n"
        "assets.CATALOGUE = Path(sys.argv[1]); print(assets.fetch('demo'))"
    )
    command = [sys.executable, "-P", "-c", code, str(assets.CATALOGUE)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=CONF_DIR.parent, text=True, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    folder = Path(outputs[0][0].strip())
    assert (folder / MEMBER).read_bytes() == CONTENT and (folder / "demo/unwanted.txt").read_bytes() == b"x"
    assert log.read_text().count("Successfully downloaded demo") == 1


def test_file_asset_is_used_in_place(tmp_path, catalogue):
    file = tmp_path / "words.txt"
    file.write_bytes(CONTENT)
    catalogue(uri=f"file:{file}", sha256=sha256(CONTENT), members={})
    assert assets.fetch("demo") == file and assets.verify("demo") == []
    file.write_bytes(OTHER)
    assert assets.verify("demo") == ["demo: words.txt has a wrong SHA-256"]
    with pytest.raises(AssetError, match="not the pinned file"):
        assets.fetch("demo")
    with pytest.raises(AssetError, match=r"did you mean 'words\.txt'"):
        assets.fetch(f"file:{tmp_path}/word.txt")


def test_unknown_names_and_uris():
    with pytest.raises(AssetError, match="no asset 'lee-new'; did you mean 'lee-news'"):
        assets.fetch("lee-new")
    with pytest.raises(AssetError, match="is no asset URI"):
        assets.fetch("hf:")
    with pytest.raises(ValidationError, match="is no asset URI"):
        Asset(name="x", uri="ftp:host/file")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of `org/model` in an offline hub cache."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_hub_model_comes_from_the_hub_cache(hub):
    (hub / "model.safetensors").write_bytes(b"")
    assert assets.fetch("hf:org/model") == hub == assets.fetch_hub("org/model", "main")
    assert assets.is_fetched("hf:org/model@main") and not assets.is_fetched("hf:org/other")


def test_hub_model_without_safetensors_is_refused(hub):
    (hub / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AssetError, match="org/model has no safetensors at revision main"):
        assets.fetch_hub("org/model")


def test_unreachable_hub_model_is_one_line(hub):
    with pytest.raises(AssetError, match="cannot fetch org/other from the hub") as error:
        assets.fetch_hub("org/other")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("member", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", ""])
def test_members_cannot_leave_the_folder(tmp_path, member):
    with pytest.raises(ValidationError, match="no safe path"):
        Asset(name="x", uri="pypi:x==1", members={member: None})
    archive = make_tar(tmp_path / "a.tar.gz", {member or "x": CONTENT})
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(AssetError, match="no safe path"):
        unpack(archive, {member: None}, target)
    assert list(target.iterdir()) == [] and not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [({MEMBER: "0" * 64}, "words.txt is not the pinned file"), ({"demo/absent.txt": None}, "has no file demo/absent.txt")],
)
def test_wrong_member_is_refused(tmp_path, members, message):
    make_wheel(tmp_path)
    target = tmp_path / "target"
    with pytest.raises(AssetError, match=message), atomic_folder(target) as folder:
        unpack(tmp_path / "demo-1.0-py3-none-any.whl", members, folder)
    assert not target.exists()


def test_links_in_an_archive_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(OTHER)
    archive = make_tar(tmp_path / "a.tar.gz", {"good": CONTENT}, links={"bad": str(secret), "good/sub": str(tmp_path)})
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(AssetError, match="has no file bad"):
        unpack(archive, {"good": None, "bad": None}, target)
    assert not (target / "bad").exists()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_damaged_archive_is_named(tmp_path, kind):
    content = os.urandom(1 << 16)
    if kind == "tar":
        archive = make_tar(tmp_path / "a.tar.gz", {"big": content})
        archive.write_bytes(archive.read_bytes()[: 1 << 15])
    else:
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("big", content)
        data = bytearray(archive.read_bytes())
        data[1000] ^= 255
        archive.write_bytes(data)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(AssetError, match=r"is damaged \(.*fetch it again"):
        unpack(archive, {"big": None}, target)


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / "whole").write_text(text)
            assert text == "first" or (target / "whole").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"] and (target / "whole").read_text() == "second"


def test_killed_process_leaves_no_target(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from slimbench.util.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path / "target")], cwd=CONF_DIR.parent)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "target").exists()


def test_shipped_catalogue_pins_every_byte():
    for asset in assets.catalogue().values():
        assert asset.sha256 and asset.license and asset.description
        assert all(digest and len(digest) == 64 for digest in asset.members.values()), asset.name
        assert asset.uri.count("==") == 1


@pytest.mark.parametrize("file", sorted((CONF_DIR / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_model_files_are_valid(file):
    raw = yaml.safe_load(file.read_text())
    if file.stem == "custom":
        assert raw["name"] == raw["source"] == "???"
        raw |= {"name": "mine", "source": "file:/models/mine"}
    model = ModelConfig.model_validate(raw)
    kind, _, rest = model.source.partition(":")
    assert file.stem in (model.name, "custom")
    assert kind in ("hf", "asset", "random", "file")
    if kind == "asset":
        assert rest in assets.catalogue()
    if kind == "hf":
        assert rest.count("/") == 1 and model.revision
    assert (model.shape is not None) == model.is_random
