"""Policies and exits go to the hub and come back, against a hub that is a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from encoders import tiny_encoder
from huggingface_hub.errors import RepositoryNotFoundError

from adaptive import Exits, Policy, Threshold, attach_exits
from adaptive._classifier_exits import ClassifierExits, untrained_exits
from adaptive.calibration import CertificateError
from adaptive.policies import ProbeScore

POLICY = Policy(ProbeScore(), Threshold(0.75), stages=(0, 1), mode="propagate")


class _Hub:
    """Repositories as folders, one per branch; it takes the calls that the hub's client takes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def api(self, *, token: Any = None, **_: Any) -> _Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def create_repo(self, repo_id: str, *, private: Any, exist_ok: bool) -> Any:
        assert exist_ok
        self.calls.append(("create_repo", {"repo_id": repo_id, "private": private}))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo_id / branch).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        revision: str | None,
        create_pr: bool,
    ) -> Any:
        branch = revision or "main"
        target = self.root / repo_id / branch
        assert branch == "main" or target.is_dir(), "the hub refuses unknown branches"
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        self.calls.append(("upload", {"message": commit_message, "create_pr": create_pr}))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{branch}")

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: Any = None,
        allow_patterns: list[str],
        cache_dir: Any = None,
    ) -> str:
        self.calls.append(("download", {"token": token, "cache_dir": cache_dir}))
        source = self.root / repo_id / (revision or "main")
        if not source.is_dir():
            raise RepositoryNotFoundError(
                f"404: no {repo_id}", response=SimpleNamespace(headers={}, request=None)
            )
        snapshot = self.root / "cache" / repo_id.replace("/", "--") / (revision or "main")
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir(parents=True)
        for name in allow_patterns:
            if (source / name).is_file():
                shutil.copy(source / name, snapshot)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    made = _Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return made


def test_the_fake_takes_what_the_client_takes() -> None:
    """Every argument used here is one of the real functions'."""
    import inspect

    real = huggingface_hub.HfApi
    pairs = [
        (_Hub.create_repo, real.create_repo),
        (_Hub.create_branch, real.create_branch),
        (_Hub.upload_folder, real.upload_folder),
        (_Hub.snapshot_download, huggingface_hub.snapshot_download),
    ]
    for fake, genuine in pairs:
        assert set(inspect.signature(fake).parameters) <= {
            "self",
            *inspect.signature(genuine).parameters,
        }


def test_a_policy_comes_back(hub: _Hub) -> None:
    address = POLICY.push_to_hub("me/policy", private=True, token="secret", commit_message="first")
    assert address == "https://hub/me/policy/main"
    assert hub.calls[:2] == [
        ("token", {"token": "secret"}),
        ("create_repo", {"repo_id": "me/policy", "private": True}),
    ]
    assert hub.calls[2] == ("upload", {"message": "first", "create_pr": False})
    assert [path.name for path in (hub.root / "me/policy/main").iterdir()] == ["policy.json"]
    assert Policy.from_pretrained("me/policy", token="secret", cache_dir="here") == POLICY
    assert hub.calls[-1] == ("download", {"token": "secret", "cache_dir": "here"})


def test_branches_hold_what_was_pushed_to_them(hub: _Hub) -> None:
    other = POLICY.member(0.5)
    POLICY.push_to_hub("me/policy")
    other.push_to_hub("me/policy", revision="fast")
    assert Policy.from_pretrained("me/policy") == POLICY
    assert Policy.from_pretrained("me/policy", revision="fast") == other
    with pytest.raises(CertificateError, match="404"):
        Policy.from_pretrained("me/policy", revision="slow")


def test_exits_come_back_and_fit_their_model(hub: _Hub, helpers: Any) -> None:
    model = helpers.tiny("llama")
    exits = attach_exits(model, (2, 3), rank=2)
    with torch.no_grad():
        exits.probe_bias += 0.5
    exits.push_to_hub("me/model-exits")
    POLICY.push_to_hub("me/model-exits")  # one repository may hold both
    again = Exits.from_pretrained("me/model-exits")
    assert again.layers == (2, 3)
    assert again.record == exits.record
    for name, value in exits.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert attach_exits(model, "me/model-exits").layers == (2, 3)
    assert Policy.from_pretrained("me/model-exits") == POLICY


def test_exits_of_a_classifier_come_back(hub: _Hub) -> None:
    model = tiny_encoder("distilbert")
    exits = untrained_exits(model, (1, 3))
    with torch.no_grad():
        exits.probe_bias += 0.5
    exits.push_to_hub("me/judge", revision="v2")
    again = ClassifierExits.from_pretrained("me/judge", revision="v2")
    assert again.fingerprint() == exits.fingerprint()
    assert again.record == exits.record
    again.attach(model)
    with pytest.raises(CertificateError, match="404"):
        ClassifierExits.from_pretrained("me/judge")


def test_what_is_on_disk_comes_first(hub: _Hub) -> None:
    POLICY.save_pretrained("me/policy")
    POLICY.member(0.5).push_to_hub("me/policy")
    assert Policy.from_pretrained("me/policy") == POLICY
    assert not [name for name, _ in hub.calls if name == "download"]


@pytest.mark.parametrize("name", [Path("me/policy"), "policy", "/me/policy", "a/b/c", "../policy"])
def test_paths_are_not_looked_for_on_the_hub(hub: _Hub, name: str | Path) -> None:
    POLICY.push_to_hub("me/policy")
    with pytest.raises(CertificateError, match="no policy at"):
        Policy.from_pretrained(name)
    with pytest.raises(CertificateError, match="no exits in"):
        Exits.from_pretrained(name)


def test_nowhere_and_without_network_is_one_error() -> None:
    """With the real client, which the tests keep offline."""
    with pytest.raises(CertificateError, match="'me/nothing' is neither a path here nor"):
        Policy.from_pretrained("me/nothing")


def test_a_repository_without_a_policy_is_refused(hub: _Hub) -> None:
    (hub.root / "me/empty/main").mkdir(parents=True)
    with pytest.raises(CertificateError, match="no policy at"):
        Policy.from_pretrained("me/empty")
