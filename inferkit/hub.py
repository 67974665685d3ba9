"""Models of the Hugging Face Hub: from the local cache if they are whole there, else downloaded."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from inferkit import model_files
from inferkit.errors import DamagedFileError, LoadError, ModelNotFoundError
from inferkit.progress import Progress, downloads, quiet_bars, stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo

__all__ = ["cached_models", "close_matches", "config_folder", "is_id", "snapshot"]

_TIMEOUT = 10.0  # seconds for the first question to the hub
# The same weights in another layout, and adapters: transformers reads neither as the model.
_OTHER_WEIGHTS = re.compile(r"(consolidated|adapter_)")
_TOKENIZERS = re.compile(r"(tokenizer|vocab|spiece|sentencepiece|tekken|merges).*")


def is_id(ref: str) -> bool:
    """Whether ``ref`` could name a repository of the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(ref)
    except HFValidationError:
        return False
    return True


def snapshot(repo: str, revision: str | None, *, progress: Progress) -> Path:
    """The local folder of a model at a revision, downloaded if it is not cached whole.

    Args:
        repo: ``org/name`` or ``name``.
        revision: A branch, tag or commit; ``main`` if None.
        progress: Show bars while downloading, or call this with (what, done, total).

    Raises:
        ModelNotFoundError: There is no such model or revision, it is gated, or neither the hub
            nor a cached copy can be reached.
        DamagedFileError: The cached copy is incomplete and the hub cannot be reached.
        LoadError: Writing to the cache failed.
    """
    from huggingface_hub import snapshot_download

    cached = cached_snapshot(repo, revision)
    usable = cached is not None and _has_weights(cached)
    if cached is not None and usable and any(map(_TOKENIZERS.fullmatch, os.listdir(cached))):
        return cached

    def fetch(names: list[str]) -> str:
        wanted = _wanted(repo, names)
        with downloads(progress) as bars:
            return snapshot_download(
                repo, revision=revision, allow_patterns=wanted, tqdm_class=bars
            )

    try:
        return Path(_online(repo, revision, fetch))
    except _UnreachableError as error:
        if cached is not None and usable:
            return cached  # a model without a tokenizer, perhaps: nobody can be asked
        if cached is not None:
            raise DamagedFileError(
                f"the copy of {repo!r} in the hub cache, {cached}, is incomplete (it holds "
                f"{model_files.describe(cached)}), and the rest cannot be downloaded: {error}"
            ) from error
        raise _nowhere(repo, revision, error) from error


def config_folder(repo: str, revision: str | None) -> Path:
    """A local folder with the model's config.json, which alone is downloaded if not cached.

    Raises:
        ModelNotFoundError, LoadError: As ``snapshot``.
    """
    from huggingface_hub import hf_hub_download

    if cached := cached_snapshot(repo, revision):
        return cached

    def fetch(names: list[str]) -> str:
        _wanted(repo, names)  # refuses what is no model
        return hf_hub_download(repo, "config.json", revision=revision, tqdm_class=quiet_bars())

    try:
        return Path(_online(repo, revision, fetch)).parent
    except _UnreachableError as error:
        raise _nowhere(repo, revision, error) from error


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder in the local cache that has the config.json of ``revision``, if any."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def cached_models() -> Iterator[tuple[CachedRepoInfo, CachedRevisionInfo]]:
    """Models in the local cache whose config and weights are all there, by name."""
    for repo in _cached_repos():
        for revision in sorted(repo.revisions, key=lambda r: ("main" not in r.refs, r.commit_hash)):
            folder = revision.snapshot_path
            if (folder / "config.json").is_file() and _has_weights(folder):
                yield repo, revision


def close_matches(ref: str) -> str:
    """`` Did you mean ...?`` among the names that would work without network, or nothing."""
    names = ["demo", *(repo.repo_id for repo in _cached_repos())]
    by_lower = {name.lower(): name for name in names}
    by_lower.update({name.lower().rpartition("/")[2]: name for name in names})
    keys = [*difflib.get_close_matches(ref.lower(), by_lower, cutoff=0.6)]
    keys += difflib.get_close_matches(ref.lower().rpartition("/")[2], by_lower, cutoff=0.75)
    found = list(dict.fromkeys(by_lower[key] for key in keys))[:3]
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def _http_error() -> type[Exception]:
    """The root of the HTTP client's errors: httpx in huggingface_hub 1, httpx2 in 2."""
    from huggingface_hub import errors

    root: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    return root


class _UnreachableError(Exception):
    """The hub cannot be asked; the message says why and what to do."""


def _has_weights(folder: Path) -> bool:
    try:
        return bool(model_files.weight_files(folder))
    except DamagedFileError:
        return False


def _cached_repos() -> list[CachedRepoInfo]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(_cache_folder()).repos
    except CacheNotFound:
        return []
    return sorted((r for r in repos if r.repo_type == "model"), key=lambda r: r.repo_id)


def _online(repo: str, revision: str | None, fetch: Callable[[list[str]], str]) -> str:
    """Ask the hub for the names of a model's files, and pass them to ``fetch``.

    The first question has a short timeout and no retry, so that a dead network is found soon.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    if reason := _offline_reason():
        raise _UnreachableError(reason)
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
        return fetch([file.rfilename for file in info.siblings or []])
    except (_http_error(), LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        if stopped(error):
            raise
        refused = _refusal(error, repo, revision)
        if refused is not None:
            raise refused from error
        raise _UnreachableError(_network_reason(error)) from error
    except OSError as error:
        if stopped(error):
            raise
        raise LoadError(
            f"writing {repo!r} to the hub cache {_cache_folder()} failed: {error}; make room, or "
            "name another folder in the environment variable HF_HUB_CACHE before the first import."
        ) from error


def _nowhere(repo: str, revision: str | None, why: Exception) -> ModelNotFoundError:
    at = f" at revision {revision!r}" if revision else ""
    return ModelNotFoundError(
        f"{repo!r}{at} is neither a local path nor in the hub cache ({_cache_folder()}), and the "
        f"hub cannot be asked: {why}{close_matches(repo)}"
    )


def _wanted(repo: str, names: list[str]) -> list[str]:
    """The files of a repository that transformers needs: one set of weights, and the side files."""
    top = [name for name in names if "/" not in name and not _OTHER_WEIGHTS.match(name)]
    side = [name for name in top if name.endswith(model_files.SIDE_FILES)]
    side += [name for name in names if name.startswith("additional_chat_templates/")]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        weights = [name for name in top if re.fullmatch(r"pytorch_model.*\.bin", name)]
    if "config.json" in top and weights:
        return side + weights
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise ModelNotFoundError(
            f"{repo!r} on the hub holds GGUF files ({', '.join(ggufs[:3])}); download one and "
            f"pass its path: huggingface_hub.hf_hub_download({repo!r}, {ggufs[0]!r})."
        )
    lack = "config.json" if "config.json" not in top else "weights (*.safetensors, *.bin)"
    raise ModelNotFoundError(
        f"{repo!r} on the hub has no {lack}; it holds {', '.join(names[:6]) or 'nothing'}. Name a "
        "repository with a language model in transformers format."
    )


def _offline_reason() -> str | None:
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{name} is set; unset it to download (before the kernel's first import)."
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE was set when huggingface_hub was imported; restart without it."
    return None


def _network_reason(error: Exception) -> str:
    from huggingface_hub import constants

    first_line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return (
        f"no answer from {constants.ENDPOINT} ({first_line}); check the network, or name a folder "
        "or .gguf file that is here."
    )


def _refusal(error: Exception, repo: str, revision: str | None) -> ModelNotFoundError | None:
    """What the hub's answer means; None if it gave no answer about this model."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(
            f"{repo!r} is gated: ask for access at {page}, then set HF_TOKEN to a token of that "
            "account (or run `hf auth login`)."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo!r} has no revision {revision!r}; {page}/commits/main lists commits and tags."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"there is no model {repo!r}: neither a local path nor, for your account, on the hub. "
            "Check the spelling; if it is private, set HF_TOKEN to a token that may read it."
            f"{close_matches(repo)}"
        )
    if getattr(getattr(error, "response", None), "status_code", None) in {401, 403}:
        return ModelNotFoundError(
            f"the hub refuses access to {repo!r} ({str(error).splitlines()[0]}); HF_TOKEN may be "
            "wrong or expired: make a new one at https://huggingface.co/settings/tokens."
        )
    return None


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(Path(constants.HF_HUB_CACHE).expanduser())
