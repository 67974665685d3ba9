"""Binder links: an address that opens a notebook of a public git repository, ready to run.

Asks the git of the working directory, and, where it may, the repository's host whether it lets
anyone read it. The address has the form

    https://mybinder.org/v2/PROVIDER/REPOSITORY/REF?urlpath=lab/tree/PATH

of BinderHub, with the provider ``gh`` for GitHub, ``gl`` for GitLab and ``git`` for any other host.
"""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import quote, urlsplit

from inferkit.errors import OptionError, first_line
from inferkit.experiments.environment import notebook_name
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.player import player_of, reasons_against
from inferkit.html import listed

__all__ = ["BinderLink", "binder_link"]

_BINDER = "https://mybinder.org"
_PLAYER = "a notebook that plays it is written by exp.export('name.playback.ipynb')"
_GIT_SECONDS = 10
_LOOK_SECONDS = 5
_SHOWN = 3  # files that a warning names

# What git says of a repository that is not there for whoever has no credentials; hosts tell no one
# whether it is there for others. Not what a proxy says.
_REFUSED = re.compile(
    r"could not read (?:Username|Password)|Authentication failed|repository '.*' not found"
    r"|requested URL returned error: 40[134]"
)

# A name as GitHub and GitLab allow it: neither "." nor "..".
_NAME = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9_.-]+"
_OWNER_AND_NAME = re.compile(rf"{_NAME}/{_NAME}")
_PATH_OF_NAMES = re.compile(rf"{_NAME}(?:/{_NAME})+")
_SSH_FORM = re.compile(r"(?:[^@/\s]+@)?(?P<host>[^:/@\s]+):(?P<path>[^\s]+)")  # git@host:path
_SCHEMES = ("https", "http", "ssh", "git")
_SAME_HOST = {"www.github.com": "github.com", "ssh.github.com": "github.com"}
_SAME_HOST |= {"www.gitlab.com": "gitlab.com", "altssh.gitlab.com": "gitlab.com"}

# What git forbids in a ref, and what git would take for an option or an expression.
_NO_REF = re.compile(r"^[-/]|[\s\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/$|^$")

# Binder installs what one of these says, and without any only Jupyter.
_BUILD_FILES = {
    *("binder", ".binder", "requirements.txt", "environment.yml", "pyproject.toml"),
    *("setup.py", "Pipfile", "Dockerfile"),
}


@dataclass(frozen=True, repr=False)
class BinderLink:
    """A link that opens a notebook on Binder. Shown as a badge to click, with what may be amiss.

    Attributes:
        url: The address; also what ``str`` gives.
        warnings: Why it may not open what is meant.
    """

    url: str
    warnings: tuple[str, ...] = ()

    @property
    def markdown(self) -> str:
        """A badge for a README."""
        return f"[![Binder]({_BINDER}/badge_logo.svg)]({self.url})"

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return "\n".join([self.url, *(f"  - {warning}" for warning in self.warnings)])

    def _repr_html_(self) -> str:
        badge = f'<img src="{_BINDER}/badge_logo.svg" alt="Open in Binder">'
        link = f'<a href="{escape(self.url)}" target="_blank" rel="noopener">{badge}</a>'
        notes = "".join(f"<li>{escape(warning)}</li>" for warning in self.warnings)
        below = f'<ul style="opacity:.7;font-size:90%;margin:4px 0">{notes}</ul>' if notes else ""
        return f'<div class="inferkit">{link}{below}</div>'


def binder_link(
    repo: str | None = None,
    ref: str | None = None,
    notebook: str | os.PathLike[str] | None = None,
    *,
    experiment: Experiment | None = None,
    check_public: bool = True,
) -> BinderLink:
    """Make a link that opens a notebook on mybinder.org; nothing is uploaded.

    Args:
        repo: ``"owner/name"`` on GitHub, or the address of a git repository, as ``git clone`` takes
            it. None: the remote "origin" of the working directory. Names, passwords and tokens in
            an address are left out.
        ref: Branch, tag or commit. None: the present commit of the working directory.
        notebook: Path in the repository, or from the working directory. None: the notebook that
            runs this, or else JupyterLab's start page; of an ``experiment`` that Binder could not
            run again, the notebook beside its file that plays it (NAME.playback.ipynb), if it is
            there.
        experiment: What the notebook shows; warns where its file is not in that version, and where
            Binder could not run it again.
        check_public: Ask the repository's host whether it can be read without credentials, as
            Binder does, for at most 5 s. Where HF_HUB_OFFLINE is set, nothing is asked.

    Returns:
        The link. Its ``warnings`` say what stands against its opening what is here.

    Raises:
        OptionError: There is no repository or remote to take it from, or an argument makes no
            sense.
    """
    for name, value in (("repo", repo), ("ref", ref)):
        if value is not None and not isinstance(value, str):
            raise OptionError(f"{name}= takes text, not {value!r}.")
    if not isinstance(experiment, Experiment | None):
        raise OptionError(f"experiment= takes what ik.record and ik.open give, not {experiment!r}.")
    clone, why_not = _Clone.here()
    if repo is None:
        if clone is None:
            raise OptionError(f"{why_not}: give repo='owner/name', ref='main' and notebook='path'.")
        remote: str | None = "origin"
        place = _place(clone.address_of("origin"), "the remote 'origin'")
    else:
        place = _given(repo.strip())
        remote = None if clone is None else clone.remote_of(place)
    if clone is None or remote is None:
        return _unseen(place, ref, notebook, experiment, clone, check_public)

    version = clone.version(ref, remote)
    path, unplaced = clone.path_of(notebook)
    file, homeless = clone.file_of(experiment)
    plays = clone.player_of(experiment, file) if notebook is None else None
    if plays is not None:
        path, unplaced = plays, []
    warnings = [
        *place.warnings,
        *version.warnings,
        *unplaced,
        *homeless,
        *clone.missing(version, path, file),
        *clone.uncommitted(version, file),
        *_experiment_warnings(experiment, plays),
        *_public(place, check_public),
    ]
    return BinderLink(_url(place, version.ref, path), tuple(warnings))


def _unseen(
    place: _Place,
    ref: str | None,
    notebook: str | os.PathLike[str] | None,
    experiment: Experiment | None,
    clone: _Clone | None,
    check_public: bool,
) -> BinderLink:
    """The link to a repository of which there is no clone here, so that nothing can be checked."""
    if ref is None:
        here = "in no git repository" if clone is None else "no clone of it"
        raise OptionError(
            f"Which version of {place.name}? The working directory is {here}, so name one: "
            "ref='main', a tag or a commit."
        )
    path = None if notebook is None else _inside(_text(notebook))
    file = experiment.path.name if experiment is not None and experiment.path is not None else None
    within = " and ".join(name for name in (path, file) if name is not None)
    unchecked = f"There is no clone of {place.name} here: whether it has {_checked(ref)!r}"
    unchecked += f" and {within} in it was not checked." if within else " was not checked."
    found = [*place.warnings, unchecked, *_experiment_warnings(experiment, None)]
    return BinderLink(_url(place, ref, path), (*found, *_public(place, check_public)))


def _url(place: _Place, ref: str, path: str | None) -> str:
    # Quoted twice: Binder reads the parameter and takes what it finds for the path of an address,
    # in which a "?" or "%" of a file's name must still be quoted.
    target = "lab" if path is None else f"lab/tree/{quote(os.fsencode(path))}"
    return f"{_BINDER}/v2/{place.provider}/{place.quoted}/{quote(ref)}?urlpath={quote(target)}"


def _public(place: _Place, check: bool) -> Iterator[str]:
    """That Binder cannot open the repository, or that nobody looked."""
    asks = check and os.environ.get("HF_HUB_OFFLINE", "") in ("", "0")
    public = _readable_by_anyone(place.address) if asks else None
    if public is None:
        yield (
            f"Binder can only open public repositories; whether {place.name} is one was not "
            "checked."
        )
    elif not public:
        yield (
            f"Binder can only open public repositories, and {place.name} is not there for whoever "
            "has no credentials: make it public, or correct its name."
        )


def _readable_by_anyone(address: str) -> bool | None:
    """Whether a repository can be read without credentials; None where that cannot be asked."""
    # Without anybody's settings: they may hold credentials, or turn the address into one for ssh.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "HOME": os.devnull}
    env.pop("XDG_CONFIG_HOME", None)
    env.pop("SSH_ASKPASS", None)
    words = ["-c", "credential.helper=", "ls-remote", "--quiet", address]
    with tempfile.TemporaryDirectory() as nowhere:
        found, reason = _ask(words, Path(nowhere), env, _LOOK_SECONDS)
    if found is not None:
        return True
    return False if _REFUSED.search(reason) else None


def _experiment_warnings(experiment: Experiment | None, plays: str | None) -> Iterator[str]:
    """Why it cannot be run again there, and what shows it then: the notebook ``plays``, or none."""
    if experiment is None:
        return
    shows = f"{plays}, which plays it, is opened" if plays else _PLAYER
    for reason in reasons_against(experiment):
        yield f"{reason}: it cannot be run again there; {shows}."


# -- the repository, from outside -----------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where Binder gets a repository from: provider, and the name or address there."""

    provider: str
    name: str
    warnings: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """As ``git clone`` takes it."""
        hosts = {"gh": "https://github.com/", "gl": "https://gitlab.com/"}
        return hosts.get(self.provider, "") + self.name

    @property
    def quoted(self) -> str:
        return quote(self.name, safe="/" if self.provider == "gh" else "")

    def is_at(self, other: _Place) -> bool:
        return (self.provider, self.name.lower()) == (other.provider, other.name.lower())


def _given(repo: str) -> _Place:
    """The place that a user names: as `_place`, and "owner/name" on GitHub."""
    if _OWNER_AND_NAME.fullmatch(repo):
        return _Place("gh", repo.removesuffix(".git"))
    return _place(repo, "repo")


def _place(address: str, what: str) -> _Place:
    """The place that an address names; keeps nothing that is secret in it.

    Args:
        address: As ``git clone`` takes it.
        what: What messages call it.

    Raises:
        OptionError: It is none, or Binder cannot reach it.
    """
    scheme, host, port, path = _parts(address, what)
    host = _SAME_HOST.get(host, host)
    if host in ("github.com", "gitlab.com"):
        name = path.removesuffix(".git")
        fits = _OWNER_AND_NAME if host == "github.com" else _PATH_OF_NAMES
        if not fits.fullmatch(name) or "/-/" in name:
            raise OptionError(
                f"{what} is {_shown(address)!r}, which is no repository's address on {host}: give "
                f"https://{host}/owner/name, and branch and notebook as ref= and notebook=."
            )
        return _Place("gh" if host == "github.com" else "gl", name)
    if not _reachable(host):
        raise OptionError(
            f"{what} is on the host {host!r}, which Binder cannot reach: give the public address "
            "of the repository, or 'owner/name' on GitHub, as repo=."
        )
    if scheme in ("http", "git"):
        return _Place("git", f"{scheme}://{host}{port}/{path}")
    public = f"https://{host}{port if scheme == 'https' else ''}/{path}"
    guess = f"{what} is read by ssh, which Binder cannot: the link has {public} in its place."
    return _Place("git", public, () if scheme == "https" else (guess,))


def _parts(address: str, what: str) -> tuple[str, str, str, str]:
    """Scheme, host, ":port" or "", and path of an address. No user, password or query."""
    with suppress(ValueError):  # a port that is no number
        if "://" in address:
            url = urlsplit(address)
            scheme, host, path = url.scheme, url.hostname or "", url.path
            port = f":{url.port}" if url.port else ""
        elif match := _SSH_FORM.fullmatch(address):
            scheme, host, path, port = "ssh", match["host"].lower(), match["path"], ""
        else:
            scheme = host = path = port = ""
        path = path.strip("/")
        # Where a password holds a "/", what follows it has its "@" in the path.
        if scheme in _SCHEMES and host and path and "@" not in path:
            return scheme, host, port, path
    raise OptionError(
        f"{what} is {_shown(address)!r}, which Binder cannot open: it takes 'owner/name' on GitHub "
        "or an address such as https://gitlab.com/owner/name. Give one as repo=."
    )


def _shown(address: str) -> str:
    """An address for a message: without user, password, query and fragment."""
    without_user = re.sub(r"^([a-z+]+://)?.*@", r"\1", address, flags=re.IGNORECASE | re.DOTALL)
    return re.split(r"[?#]", without_user, maxsplit=1)[0]


def _reachable(host: str) -> bool:
    """Whether a host may be on the internet: no local name, no private number."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_global
    return "." in host and not host.endswith((".local", ".localhost", ".internal"))


def _checked(ref: str) -> str:
    if _NO_REF.search(ref):
        raise OptionError(
            f"ref={ref!r} is no name of a branch, tag or commit: give one as git shows it, such as "
            "'main', 'v1.0' or the commit of `git rev-parse HEAD`."
        )
    return ref


def _text(notebook: str | os.PathLike[str]) -> str:
    text = os.fspath(notebook) if isinstance(notebook, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise OptionError(
            f"notebook={notebook!r} is no path: give one from the root of the repository, such as "
            "'notebooks/01-quickstart.ipynb', or leave it out."
        )
    return text


def _inside(text: str) -> str:
    """A path, as it is in a repository."""
    path = os.path.normpath(text)
    if os.path.isabs(path) or path == "." or PurePath(path).parts[0] == "..":
        raise OptionError(
            f"notebook={text!r} is no file inside of the repository: give its path from the "
            "repository's root, such as 'notebooks/01-quickstart.ipynb'."
        )
    return PurePath(path).as_posix()


# -- the repository, from inside ------------------------------------------------------------------


@dataclass(frozen=True)
class _Version:
    """What the link opens: the ref in it, and the commit that this is here, if it is known."""

    ref: str
    commit: str | None
    warnings: tuple[str, ...] = ()


class _Clone:
    """The git repository around the working directory. Only asks, and no network."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def here(cls) -> tuple[_Clone | None, str]:
        """The clone; or None, and the reason why there is none."""
        try:
            folder = Path.cwd()
        except FileNotFoundError:
            return None, "The working directory is no longer there"
        found, words = _ask(["rev-parse", "--show-toplevel"], folder)
        if found:
            return cls(Path(found).resolve()), ""
        reason = words.split("\n", 1)[0]
        return None, f"The working directory is in no git repository that can be read ({reason})"

    def git(self, *words: str) -> str | None:
        """What git says; None where it says no."""
        return _ask(words, self.root)[0]

    # -- where it came from ---------------------------------------------------------------------

    def address_of(self, remote: str) -> str:
        """The address of a remote, with whatever is secret in it."""
        address = self.git("remote", "get-url", remote)
        if address is None:
            others = (self.git("remote") or "").splitlines()
            lacks = f"remote {remote!r}, only {listed(others)}" if others else "remote"
            raise OptionError(
                f"This git repository has no {lacks}: give repo='owner/name' or the public address "
                "of the repository."
            )
        return address

    def remote_of(self, place: _Place) -> str | None:
        """The remote that is at a place."""
        for remote in (self.git("remote") or "").splitlines():
            with suppress(OptionError):  # a remote that is nothing for Binder
                if _place(self.address_of(remote), remote).is_at(place):
                    return remote
        return None

    # -- which version --------------------------------------------------------------------------

    @cached_property
    def head(self) -> str | None:
        return self.git("rev-parse", "--verify", "--quiet", "HEAD^{commit}")

    def version(self, ref: str | None, remote: str) -> _Version:
        """What ``ref`` is here, and whether the remote was seen to have it."""
        if ref is None:
            if self.head is None:
                raise OptionError(
                    "This git repository has no commit yet: commit the notebook and push it, or "
                    "name a branch that the remote has, such as ref='main'."
                )
            return _Version(self.head, self.head, self._unpublished(self.head, remote))
        if self._commit(f"refs/remotes/{_checked(ref)}"):  # "origin/main" is a name of this clone's
            ref = ref.removeprefix(f"{remote}/")
        there, here = (self._commit(f"refs/{r}/{ref}") for r in (f"remotes/{remote}", "heads"))
        if there is not None:
            behind = here is not None and self._unpublished(here, remote)
            return _Version(ref, there, self._behind(ref, remote) if behind else ())
        if here is not None:
            lacking = f"The branch {ref!r} was never seen on {remote!r}: git push {remote} {ref}"
            return _Version(ref, here, (f"{lacking} puts it there.",))
        return self._tag_or_commit(ref, remote)

    def _tag_or_commit(self, ref: str, remote: str) -> _Version:
        tag = self._commit(f"refs/tags/{ref}")
        if tag is not None:
            unseen = f"Whether {remote!r} has the tag {ref!r} cannot be told without network: "
            unseen += f"git push {remote} {ref} puts it there."
            return _Version(ref, tag, (*self._unpublished(tag, remote), unseen))
        commit = self._commit(ref)
        if commit is None:
            unknown = f"The clone here knows no {ref!r}: git fetch, if it is new; or correct it."
            return _Version(ref, None, (unknown,))
        if commit.startswith(ref.lower()):  # in full, as the provider "git" needs it
            ref = commit
        return _Version(ref, commit, self._unpublished(commit, remote))

    def _commit(self, name: str) -> str | None:
        return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")

    def _unpublished(self, commit: str, remote: str) -> tuple[str, ...]:
        holders = self.git("branch", "-r", "--format=%(refname)", "--contains", commit) or ""
        if any(name.startswith(f"refs/remotes/{remote}/") for name in holders.splitlines()):
            return ()
        return (
            f"Commit {commit[:9]} is on no branch of {remote!r} that was seen here: push it, for "
            "Binder cannot open it before.",
        )

    def _behind(self, ref: str, remote: str) -> tuple[str, ...]:
        return (
            f"The branch {ref!r} has commits that {remote!r} lacks: push them, for the link opens "
            "the branch as it is there.",
        )

    # -- which notebook -------------------------------------------------------------------------

    def path_of(self, notebook: str | os.PathLike[str] | None) -> tuple[str | None, list[str]]:
        """Path of a notebook from the root, and what there is to say about it."""
        if notebook is None:
            return self._running()
        text = _text(notebook)
        whole = os.path.expanduser(text)
        for base in (self.root, Path.cwd()):
            path = self._from_root(base / whole)
            if path is not None and os.path.exists(self.root / path):
                return path, []
        return _inside(whole), []

    def _from_root(self, path: Path) -> str | None:
        """A path of this machine as it is in the repository; None where it is outside of it."""
        path = Path(os.path.normpath(path))
        # Only its folder is resolved: a link to a file has a name of its own in a repository.
        path = Path(os.path.realpath(path.parent)) / path.name
        return path.relative_to(self.root).as_posix() if self.root in path.parents else None

    def _running(self) -> tuple[str | None, list[str]]:
        name = notebook_name()
        if name is None:
            return None, []
        here = Path.cwd() / name  # a kernel starts in its notebook's folder
        if here.is_file() and here.is_relative_to(self.root):
            return here.relative_to(self.root).as_posix(), []
        tracked = (self.git("ls-files", "-z", "--full-name") or "").split("\0")
        places = [path for path in tracked if PurePath(path).name == name]
        if len(places) == 1:
            return places[0], []
        number = f"{len(places)} files" if places else "no file"
        lost = f"The repository has {number} of the name {name}: the link opens JupyterLab's start "
        return None, [lost + "page. Give the path as notebook=."]

    # -- which experiment -----------------------------------------------------------------------

    def file_of(self, experiment: Experiment | None) -> tuple[str | None, list[str]]:
        """Path of an experiment's file from the root, and what there is to say about it."""
        if experiment is None:
            return None, []
        if experiment.path is None:
            return None, [f"{experiment.name!r} is in no file: save it in the repository."]
        path = self._from_root(Path.cwd() / experiment.path)
        if path is None:
            outside = f"{experiment.path.name} is outside of the repository: save it in there, too."
            return None, [outside]
        return path, []

    def player_of(self, experiment: Experiment | None, file: str | None) -> str | None:
        """The notebook beside an experiment's file that plays it, where Binder cannot run it."""
        if experiment is None or file is None or not any(reasons_against(experiment)):
            return None
        path = player_of(PurePosixPath(file)).as_posix()
        return path if (self.root / path).is_file() else None

    # -- what the version lacks -----------------------------------------------------------------

    def missing(self, version: _Version, *paths: str | None) -> Iterator[str]:
        """Whether the files, and what installs inferkit, are in the version."""
        if version.commit is None:
            return
        name = f"commit {version.commit[:9]}"
        for path in filter(None, paths):
            if not self._has(version.commit, path):
                does = "is not in" if (self.root / path).exists() else "is neither here nor in"
                yield f"{path} {does} {name}: add it to git, commit and push."
        top = (self.git("ls-tree", "-z", "--name-only", version.commit) or "").split("\0")
        if _BUILD_FILES.isdisjoint(top):
            yield (
                f"Nothing in {name} tells Binder what to install: put jupyter-inferkit into "
                "binder/requirements.txt."
            )

    def _has(self, commit: str, path: str) -> bool:
        return self.git("cat-file", "-e", f"{commit}:{path}") is not None

    def uncommitted(self, version: _Version, file: str | None = None) -> Iterator[str]:
        """Changes that the link leaves out, where it opens what is checked out here.

        Where it opens something else, of this ``file`` alone.
        """
        branch = self.git("symbolic-ref", "--quiet", "--short", "HEAD")
        if version.commit not in (None, self.head) and version.ref != branch:
            if file is not None and self._has(version.commit, file):
                yield from self._other(version.commit, file)
            return
        status = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=no")
        changed = [line[3:] for line in (status or "").split("\0") if line]
        if changed:
            more = len(changed) - _SHOWN
            names = ", ".join(changed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
            yield f"Changes in {names} are not committed: the link opens the files without them."

    def _other(self, commit: str, path: str) -> Iterator[str]:
        """That a file is another one in a commit."""
        if self.git("diff", "--quiet", commit, "--", path) is None:
            yield f"{path} is another one in commit {commit[:9]}: the link opens that."


def _ask(
    words: Sequence[str],
    folder: Path,
    env: Mapping[str, str] = os.environ,
    seconds: float = _GIT_SECONDS,
) -> tuple[str | None, str]:
    """What git answers in a folder, or None and its reason."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=folder,
            # In English, for the reason is shown; and without locks, for someone may be committing.
            env={**env, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        return None, "git is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, first_line(error)
    reason = done.stderr.strip() or f"git's exit status {done.returncode}"
    return (done.stdout.rstrip("\n") if done.returncode == 0 else None), reason
