"""Binder links: what they open, what they warn of, and what never gets into them."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import nbformat
import pytest
from measured import small

from inferkit.errors import OptionError
from inferkit.experiments import player, sharing
from inferkit.experiments.experiment import Experiment
from inferkit.experiments.file import ModelEntry
from inferkit.experiments.sharing import BinderLink, binder_link

PUBLIC = "Binder can only open public repositories"
Git = Callable[..., str]


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No notebook runs this, and git reads nobody's settings."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, str(tmp_path / "no-config"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of github.com/owner/name with one pushed commit; the working directory."""
    folder = tmp_path / "clone"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "notebooks" / "first.ipynb").write_text("{}")
    (folder / "requirements.txt").write_text("jupyter-inferkit\n")
    monkeypatch.chdir(folder)
    run("init", "--quiet", "--initial-branch=main")
    run("remote", "add", "origin", "https://github.com/owner/name.git")
    commit()
    pushed()
    return folder


def run(*words: str) -> str:
    return subprocess.run(
        ["git", *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit() -> str:
    run("add", "--all")
    run("commit", "--quiet", "--allow-empty", "--message", "x")
    return run("rev-parse", "HEAD")


def pushed(remote: str = "origin", branch: str = "main") -> None:
    """As a push leaves it: the clone has seen its commit on the remote."""
    run("update-ref", f"refs/remotes/{remote}/{branch}", "HEAD")


def beside_public(link: BinderLink) -> list[str]:
    """The warnings, without the one that is always there."""
    assert sum(PUBLIC in warning for warning in link.warnings) == 1
    return [warning for warning in link.warnings if PUBLIC not in warning]


def opened(link: BinderLink) -> str:
    """The path that JupyterLab is told, taken out of the link in Binder's two steps."""
    (target,) = parse_qs(urlsplit(link.url).query, strict_parsing=True)["urlpath"]
    address = urlsplit(f"https://hub.example.org/user/x/{target}")
    assert (address.query, address.fragment) == ("", "")
    return unquote(address.path).removeprefix("/user/x/")


# -- the repository -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "start"),
    [
        ("owner/name", "gh/owner/name/"),
        ("owner/name.git", "gh/owner/name/"),
        ("o-w.n/n_a.me", "gh/o-w.n/n_a.me/"),
        ("https://github.com/owner/name", "gh/owner/name/"),
        ("https://github.com/owner/name.git", "gh/owner/name/"),
        ("https://www.GitHub.com/owner/name/", "gh/owner/name/"),
        ("git@github.com:owner/name.git", "gh/owner/name/"),
        ("ssh://git@github.com/owner/name.git", "gh/owner/name/"),
        ("ssh://git@ssh.github.com:443/owner/name.git", "gh/owner/name/"),
        ("https://gitlab.com/group/sub/name.git", "gl/group%2Fsub%2Fname/"),
        ("git@gitlab.com:group/name.git", "gl/group%2Fname/"),
        ("https://codeberg.org/o/n.git", "git/https%3A%2F%2Fcodeberg.org%2Fo%2Fn.git/"),
        ("https://git.example.org:8443/n", "git/https%3A%2F%2Fgit.example.org%3A8443%2Fn/"),
        ("http://git.example.org/n", "git/http%3A%2F%2Fgit.example.org%2Fn/"),
        ("git@codeberg.org:o/n.git", "git/https%3A%2F%2Fcodeberg.org%2Fo%2Fn.git/"),
        ("ssh://git@git.example.org:2222/o/n", "git/https%3A%2F%2Fgit.example.org%2Fo%2Fn/"),
    ],
)
def test_every_form_of_an_address_leads_to_its_provider(repo: str, start: str) -> None:
    link = binder_link(repo, "main")
    assert link.url == f"https://mybinder.org/v2/{start}main?urlpath=lab"


def test_an_address_for_ssh_alone_is_guessed_and_the_guess_is_told() -> None:
    link = binder_link("git@codeberg.org:o/n.git", "main")
    assert any("https://codeberg.org/o/n.git" in w and "ssh" in w for w in link.warnings)


@pytest.mark.parametrize(
    "repo",
    [
        "https://user:s3cret@github.com/owner/name.git",
        "https://s3cret@github.com/owner/name",
        "https://oauth2:s3cret@gitlab.com/group/name.git",
        "https://user:s3cret@codeberg.org:443/o/n?private_token=s3cret#s3cret",
        "ssh://user:s3cret@codeberg.org/o/n",
        "http://user:s3cret@git.example.org/n",
        "git://s3cret@git.example.org/n",
    ],
)
def test_credentials_get_neither_into_the_link_nor_into_what_is_shown(
    repo: str, clone: Path
) -> None:
    run("remote", "set-url", "origin", repo)
    for link in (binder_link(), binder_link(repo, "main")):
        shown = (link.url, link.markdown, str(link), repr(link), link._repr_html_(), link.warnings)
        assert "s3cret" not in repr(shown)
        assert "user" not in link.url


@pytest.mark.parametrize(
    "repo",
    [
        "https://user:s3c/ret@github.com/owner/name",  # git reads it differently, too
        "https://user:s3cret@github.com/owner",
        "https://user:s3cret@localhost/owner/name",
        "https://user:s3cret@host:port/owner/name",
        "ftp://user:s3cret@example.org/name",
    ],
)
def test_credentials_do_not_get_into_error_messages(repo: str) -> None:
    with pytest.raises(OptionError) as caught:
        binder_link(repo, "main")
    assert "s3c" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        ("", "owner/name"),
        ("name", "owner/name"),
        ("owner/..", "owner/name"),
        ("a/b/c", "owner/name"),
        ("owner/na me", "owner/name"),
        ("https://", "https://gitlab.com/owner/name"),
        ("https://github.com/owner", "https://github.com/owner/name"),
        ("https://github.com/owner/name/tree/main", "ref= and notebook="),
        ("https://gitlab.com/group/name/-/tree/main", "ref= and notebook="),
        ("/srv/git/name.git", "owner/name"),
        ("file:///srv/git/name.git", "owner/name"),
        ("git@work:owner/name.git", "'work', which Binder cannot reach"),
        ("https://localhost:8000/o/n", "'localhost', which Binder cannot reach"),
        ("https://192.168.0.7/o/n", "which Binder cannot reach"),
        ("https://git.corp.internal/o/n", "which Binder cannot reach"),
    ],
)
def test_a_repository_that_binder_cannot_open_is_refused(repo: str, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        binder_link(repo, "main")
    assert says in str(caught.value)
    assert "repo=" in str(caught.value) or "ref=" in str(caught.value)


@pytest.mark.parametrize(
    "ref", ["", " ", "a b", "-x", "/x", "x/", "a..b", "a~1", "HEAD^", "a:b", "a\nb", "@{u}"]
)
def test_a_ref_that_git_has_no_name_for_is_refused(ref: str) -> None:
    with pytest.raises(OptionError, match="branch, tag or commit"):
        binder_link("owner/name", ref)


@pytest.mark.parametrize(
    "notebook", ["", " ", ".", "..", "../x.ipynb", "a/../../x.ipynb", "/x.ipynb", "a\0b"]
)
def test_a_notebook_outside_of_the_repository_is_refused(notebook: str, clone: Path) -> None:
    for repo in ("owner/name", "owner/another"):
        with pytest.raises(OptionError, match="notebook="):
            binder_link(repo, "main", notebook)


@pytest.mark.parametrize("arguments", [{"repo": 1}, {"ref": 1}, {"notebook": 1}, {"experiment": 1}])
def test_arguments_of_a_wrong_type_are_refused(arguments: dict[str, object], clone: Path) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(arguments))}="):
        binder_link(**arguments)  # type: ignore[arg-type]


# -- from the working directory -------------------------------------------------------------------


def test_a_clean_clone_gives_its_present_commit_without_a_warning(clone: Path) -> None:
    link = binder_link(notebook="notebooks/first.ipynb")
    head = run("rev-parse", "HEAD")
    assert str(link) == link.url
    assert link.url == (
        f"https://mybinder.org/v2/gh/owner/name/{head}?urlpath=lab/tree/notebooks/first.ipynb"
    )
    assert beside_public(link) == []


def test_outside_of_a_repository_the_error_says_what_to_give() -> None:
    with pytest.raises(OptionError, match=r"no git repository .* give repo='owner/name', ref="):
        binder_link()
    with pytest.raises(OptionError, match="ref='main'"):
        binder_link("owner/name")


def test_in_a_working_directory_that_is_gone_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OptionError, match="working directory is no longer there: give repo="):
        binder_link()


def test_without_git_the_error_says_so(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OptionError, match="git is not installed"):
        binder_link()
    assert binder_link("owner/name", "main").url.endswith("gh/owner/name/main?urlpath=lab")


def test_without_a_remote_the_error_names_those_there_are(clone: Path) -> None:
    run("remote", "rename", "origin", "upstream")
    with pytest.raises(OptionError, match=r"no remote 'origin', only 'upstream': give repo="):
        binder_link()
    run("remote", "remove", "upstream")
    with pytest.raises(OptionError, match="no remote: give repo="):
        binder_link()


def test_a_remote_on_this_machine_is_no_repository_of_github(clone: Path) -> None:
    run("remote", "set-url", "origin", "owner/name")  # git means a folder
    with pytest.raises(OptionError, match="origin"):
        binder_link()


def test_without_a_commit_the_error_asks_for_one(clone: Path) -> None:
    run("checkout", "--quiet", "--orphan", "empty")
    with pytest.raises(OptionError, match="no commit yet"):
        binder_link()


def test_a_named_repository_is_checked_where_a_remote_is_that_repository(clone: Path) -> None:
    run("remote", "add", "fork", "git@github.com:Me/name.git")
    head = commit()
    pushed("fork")
    assert f"/gh/me/name/{head}?" in binder_link("me/name").url
    assert beside_public(binder_link("me/name")) == []
    assert any("'origin'" in w for w in binder_link("owner/name").warnings)
    with pytest.raises(OptionError, match="no clone of it"):
        binder_link("me/another")


# -- what it warns of -----------------------------------------------------------------------------


def test_uncommitted_changes_are_named_and_untracked_files_are_not(clone: Path) -> None:
    (clone / "untracked.txt").write_text("x")
    assert beside_public(binder_link()) == []
    (clone / "notebooks" / "first.ipynb").write_text("{ }")
    for ref in (None, "main"):
        (warning,) = beside_public(binder_link(ref=ref))
        assert "notebooks/first.ipynb" in warning
        assert "not committed" in warning


def test_a_commit_that_was_not_pushed(clone: Path) -> None:
    head = commit()
    (warning,) = beside_public(binder_link())
    assert head[:9] in warning
    assert "'origin'" in warning
    (warning,) = beside_public(binder_link(ref="main"))
    assert "'main' has commits that 'origin' lacks" in warning


def test_a_remote_that_is_ahead_is_no_reason_to_warn(clone: Path) -> None:
    commit()
    pushed()
    run("reset", "--quiet", "--hard", "HEAD~1")
    assert beside_public(binder_link()) == beside_public(binder_link(ref="main")) == []


def test_a_branch_that_was_not_pushed(clone: Path) -> None:
    run("branch", "topic")
    (warning,) = beside_public(binder_link(ref="topic"))
    assert "git push origin topic" in warning


def test_a_tag_may_not_be_on_the_remote(clone: Path) -> None:
    run("tag", "v1")
    (warning,) = beside_public(binder_link(ref="v1"))
    assert "git push origin v1" in warning


def test_a_ref_that_the_clone_does_not_know(clone: Path) -> None:
    (warning,) = beside_public(binder_link(ref="nowhere"))
    assert "'nowhere'" in warning


def test_a_shortened_commit_is_given_in_full(clone: Path) -> None:
    head = run("rev-parse", "HEAD")
    assert f"/gh/owner/name/{head}?" in binder_link(ref=head[:8]).url


def test_the_name_of_a_remote_branch_is_that_of_the_branch_there(clone: Path) -> None:
    assert "/gh/owner/name/main?" in binder_link(ref="origin/main").url


@pytest.mark.parametrize("known", [True, False])
def test_a_notebook_that_is_not_in_the_commit(known: bool, clone: Path) -> None:
    if known:
        (clone / "new.ipynb").write_text("{}")
    (warning,) = beside_public(binder_link(notebook="new.ipynb"))
    assert "new.ipynb" in warning
    assert ("neither here" in warning) != known


def test_a_commit_that_installs_nothing(clone: Path) -> None:
    run("rm", "--quiet", "requirements.txt")
    commit()
    pushed()
    (warning,) = beside_public(binder_link())
    assert "binder/requirements.txt" in warning


class Host(http.server.SimpleHTTPRequestHandler):
    """A host with a public repository, one that asks for a password, and one that it denies."""

    def do_GET(self) -> None:
        status = {"private": 401, "denied": 403}.get(self.path.split("/")[1])
        if status is None:
            super().do_GET()
            return
        self.send_response(status)
        self.send_header("WWW-Authenticate", "Basic realm=x")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    run("init", "--quiet", "--bare", str(tmp_path / "served" / "public"))
    run("-C", str(tmp_path / "served" / "public"), "update-server-info")
    handler = functools.partial(Host, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "public"), [("public", True), ("private", False), ("denied", False), ("gone", False)]
)
def test_the_host_is_asked_whether_anyone_can_read_the_repository(
    host: str,
    name: str,
    public: bool,
    clone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With credentials at hand that would open it, and must not be used."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine 127.0.0.1 login user password s3cret\n")
    helper = '[credential]\nhelper = "!echo username=user; echo password=s3cret; echo"\n'
    (home / ".gitconfig").write_text(helper)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
    assert sharing._readable_by_anyone(host + name) is public


def test_a_host_that_does_not_answer_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharing._readable_by_anyone("http://127.0.0.1:9/x") is None
    monkeypatch.setattr(sharing, "_LOOK_SECONDS", 0.001)
    assert sharing._readable_by_anyone("http://127.0.0.1:9/x") is None
    monkeypatch.setenv("PATH", "")
    assert sharing._readable_by_anyone("http://127.0.0.1:9/x") is None


@pytest.mark.parametrize("repo", [None, "owner/another"])
def test_a_repository_that_is_not_public(
    repo: str | None, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, bool | None] = {"said": True}
    asked: list[str] = []

    def answer(address: str) -> bool | None:
        asked.append(address)
        return answers["said"]

    monkeypatch.setattr(sharing, "_readable_by_anyone", answer)
    binder_link(repo, "main")
    assert asked == []  # HF_HUB_OFFLINE is set for all tests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not any("public" in warning for warning in binder_link(repo, "main").warnings)
    assert asked == [f"https://github.com/{repo or 'owner/name'}"]
    answers["said"] = False
    assert "no credentials: make it public" in binder_link(repo, "main").warnings[-1]
    answers["said"] = None
    assert "was not checked" in binder_link(repo, "main").warnings[-1]
    asked.clear()
    assert "was not checked" in binder_link(repo, "main", check_public=False).warnings[-1]
    assert asked == []


def experiment(devices: list[str], weights: int) -> Experiment:
    """One that ran on the CPU's or another model, while another one stood by."""
    made = small()
    (mode,) = made.file.modes
    made.file.models = [
        ModelEntry(name="idle", ref="i", kind="hub", devices=["cuda:7"], parameters_bytes=10**12),
        ModelEntry(name="m", ref="m", kind="hub", devices=devices, parameters_bytes=weights),
    ]
    mode.model = 1
    for one in made.file.requests:
        one.model = 1
    return made


@pytest.mark.parametrize("repo", [None, "owner/another"])
@pytest.mark.parametrize(
    ("devices", "weights", "words"),
    [
        (["cpu"], 10**9, None),
        (["cpu", "disk"], 10**9, None),
        (["cuda:0", "cpu"], 10**9, "ran on cuda:0, and Binder has no GPU"),
        (["mps"], 10**9, "ran on mps, and Binder has no GPU"),
        (["cpu"], 2 * 10**9, "1.9 GiB, more than Binder's 2 GB"),
    ],
)
def test_an_experiment_that_binder_could_not_run_again(
    devices: list[str], weights: int, words: str | None, repo: str | None, clone: Path
) -> None:
    link = binder_link(repo, "main", experiment=experiment(devices, weights))
    said = [warning for warning in link.warnings if "cannot be run again" in warning]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_the_link_to_an_experiment_that_binder_cannot_run_opens_the_notebook_that_plays_it(
    clone: Path,
) -> None:
    exp = experiment(["cuda:0"], 10**9)
    exp.save(clone / "notebooks" / "e.inferkit.json")
    assert any(
        "exp.export('name.playback.ipynb')" in w for w in binder_link(experiment=exp).warnings
    )
    path = player.beside(exp)
    assert path == clone / "notebooks" / "e.playback.ipynb"
    commit()
    pushed()
    link = binder_link(experiment=exp)
    assert opened(link) == "lab/tree/notebooks/e.playback.ipynb"
    (warning,) = beside_public(link)
    assert warning.endswith("notebooks/e.playback.ipynb, which plays it, is opened.")
    given = binder_link(notebook="notebooks/first.ipynb", experiment=exp)
    assert opened(given) == "lab/tree/notebooks/first.ipynb"


def test_what_binder_can_run_needs_no_notebook_that_plays_it(clone: Path) -> None:
    exp = experiment(["cpu"], 10**9)
    exp.save(clone / "e.inferkit.json")
    assert player.beside(exp) is None
    assert player.beside(experiment(["cuda:0"], 10**9)) is None  # it is in no file


def test_a_notebook_that_plays_an_experiment_is_a_valid_one_and_is_not_written_over(
    clone: Path,
) -> None:
    exp = experiment(["cuda:0"], 10**9)
    with pytest.raises(OptionError, match="in no file"):
        exp.export("p.ipynb")
    exp.save(clone / "notebooks" / "it's.json")
    made = exp.export("p.ipynb")
    read = nbformat.read(made, as_version=4)
    nbformat.validate(read)
    assert """ik.open("notebooks/it's.json")""" in read.cells[1].source
    assert "recorded" in read.cells[0].source
    with pytest.raises(OptionError, match="exists already"):
        exp.export("p.ipynb")
    mine = player.beside(exp)
    assert mine is not None
    mine.write_text("mine")
    assert player.beside(exp) == mine
    assert mine.read_text() == "mine"


def test_an_experiment_whose_file_is_not_in_the_commit(clone: Path, tmp_path: Path) -> None:
    exp = small()
    assert "is in no file: save it" in beside_public(binder_link(experiment=exp))[0]
    exp.save(tmp_path / "e.json")
    (warning,) = beside_public(binder_link(experiment=exp))
    assert warning == "e.json is outside of the repository: save it in there, too."
    exp = small()
    exp.save(clone / "notebooks" / "e.json")
    (warning,) = beside_public(binder_link(experiment=exp))
    assert warning.startswith("notebooks/e.json is not in commit")
    commit()
    pushed()
    assert beside_public(binder_link(experiment=exp)) == []
    unseen = binder_link("owner/another", "main", "a.ipynb", experiment=exp)
    assert any("a.ipynb and e.json in it was not checked" in w for w in unseen.warnings)


def test_an_experiment_whose_file_is_another_one_in_the_commit(clone: Path) -> None:
    exp = small()
    exp.save(clone / "e.json")
    former = commit()
    pushed()
    exp.file.notes.append("x")
    exp.save(clone / "e.json", overwrite=True)
    (warning,) = beside_public(binder_link(experiment=exp))
    assert warning.startswith("Changes in e.json are not committed")
    commit()
    pushed()
    assert beside_public(binder_link(experiment=exp)) == []
    (warning,) = beside_public(binder_link(ref=former, experiment=exp))
    assert warning == f"e.json is another one in commit {former[:9]}: the link opens that."


# -- the notebook ---------------------------------------------------------------------------------


def test_a_path_from_the_working_directory_is_found(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone / "notebooks")
    for name in ("first.ipynb", "notebooks/first.ipynb", clone / "notebooks" / "first.ipynb"):
        assert opened(binder_link(notebook=name)) == "lab/tree/notebooks/first.ipynb"


def test_the_notebook_that_runs_is_found(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/someone/clone/notebooks/first.ipynb")
    for folder in (clone, clone / "notebooks"):
        monkeypatch.chdir(folder)
        link = binder_link()
        assert opened(link) == "lab/tree/notebooks/first.ipynb"
        assert beside_public(link) == []


def test_a_notebook_of_which_there_are_two_is_asked_for(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "first.ipynb")
    (clone / "other").mkdir()
    (clone / "other" / "first.ipynb").write_text("{}")
    commit()
    pushed()
    link = binder_link()
    assert opened(link) == "lab"
    (warning,) = beside_public(link)
    assert "2 files of the name first.ipynb" in warning
    assert "notebook=" in warning


@pytest.mark.parametrize(
    "name",
    [
        "My notebook.ipynb",
        "50% off.ipynb",
        "what?.ipynb",
        "a#b&c=d+e.ipynb",
        "naïve – ü.ipynb",
        "a:b (1) [2].ipynb",
        "%41.ipynb",
        '"quoted" <b>\'s.ipynb',
    ],
)
def test_any_name_of_a_notebook_survives(name: str, clone: Path) -> None:
    (clone / name).write_text("{}")
    commit()
    pushed()
    link = binder_link(notebook=name)
    assert opened(link) == f"lab/tree/{name}"
    assert beside_public(link) == []
    assert not set(link.url) & set(" \"'<>()[]")  # neither Markdown nor HTML ends it early
    assert link.url.isascii()


@pytest.mark.parametrize("ref", ["feature/a", "a#b", "v1.0+x", "50%", "ü"])
def test_any_name_of_a_branch_survives(ref: str, clone: Path) -> None:
    run("checkout", "--quiet", "-b", ref)
    pushed(branch=ref)
    link = binder_link(ref=ref)
    assert unquote(urlsplit(link.url).path) == f"/v2/gh/owner/name/{ref}"
    assert beside_public(link) == []


# -- how it is shown ------------------------------------------------------------------------------


class Links(HTMLParser):
    """The links and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_is_shown_as_a_badge_with_its_warnings_and_nothing_in_them_is_markup() -> None:
    link = binder_link("owner/name", "<script>", "<img src=x>.ipynb")
    page = Links(link._repr_html_())
    assert page.links == [link.url]
    assert set(page.tags) == {"div", "a", "img", "ul", "li"}
    assert page.tags.count("img") == 1
    for warning in link.warnings:
        assert warning in page.text
        assert warning in repr(link)


def test_the_badge_in_markdown() -> None:
    link = binder_link("owner/name", "v1", "a b.ipynb")
    assert link.markdown == (
        "[![Binder](https://mybinder.org/badge_logo.svg)]"
        "(https://mybinder.org/v2/gh/owner/name/v1?urlpath=lab/tree/a%2520b.ipynb)"
    )


# -- the badge of this project --------------------------------------------------------------------

BADGE = Path(__file__).parents[1] / "binder" / "badge.py"


def make_badge(*repo: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # nobody is asked whether it is public
    command = [sys.executable, str(BADGE), *repo]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_badge_of_a_clone_takes_its_place_in_the_readme_and_leaves_the_rest(
    clone: Path,
) -> None:
    whole = (BADGE.parents[1] / "README.md").read_text(encoding="utf-8")
    for _ in range(2):
        (clone / "README.md").write_text(whole, encoding="utf-8")
        made = make_badge()
        assert made.returncode == 0, made.stderr
        assert PUBLIC in made.stdout
        whole = (clone / "README.md").read_text(encoding="utf-8")
        assert whole.count("mybinder.org/badge_logo.svg") == 1
    target = "https://mybinder.org/v2/gh/owner/name/HEAD?urlpath=lab/tree/notebooks/01-quickstart"
    badge = f"[![Binder](https://mybinder.org/badge_logo.svg)]({target}.ipynb)\n"
    assert f"<!-- badge -->\n{badge}<!-- end of badge -->\n" in whole
    assert make_badge("other/one").returncode == 0
    assert "gh/other/one/HEAD" in (clone / "README.md").read_text(encoding="utf-8")


def test_a_badge_that_cannot_be_made_changes_nothing_and_says_what_to_do(clone: Path) -> None:
    (clone / "README.md").write_text("# Mine\n", encoding="utf-8")
    assert "<!-- badge -->" in make_badge().stderr
    run("remote", "remove", "origin")
    made = make_badge()
    assert made.returncode == 1
    assert "no remote" in made.stderr
    assert "make badge REPO=owner/name" in made.stderr
    assert (clone / "README.md").read_text(encoding="utf-8") == "# Mine\n"
