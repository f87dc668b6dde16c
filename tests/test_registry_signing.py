"""Who signed a release: the manifest, the pinned fingerprint, and every way in which it does not fit."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from released import KEY, OTHER, OTHER_PIN, PIN, write_release

from wardround.errors import CheckpointError, ConfigError
from wardround.registry import release, signing
from wardround.registry.source import release_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release", "lungs", 1)


def check(folder: Path, trust: str | None = None, name: str = "lungs") -> str | None:
    return signing.check(folder, release.file_hashes(folder), name, trust)


def test_a_signed_release_names_its_signer_and_passes_where_that_one_is_pinned(folder: Path) -> None:
    assert check(folder) == check(folder, PIN) == check(folder, f"{OTHER_PIN}, {PIN}") == PIN
    assert release.signer(folder) == PIN
    assert release.check(folder).keys() == {"model.safetensors", "config.json", "provenance.json", "manifest.json"}


def test_another_signer_and_none_are_refused_where_one_is_pinned(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"is signed by {PIN.replace('+', '.')}, expected"):
        check(folder, OTHER_PIN)
    bare = write_release(tmp_path / "bare", "lungs", 1, key=None)
    assert check(bare) is None
    with pytest.raises(CheckpointError, match="is not signed, expected SHA256:"):
        check(bare, PIN)


def rewrite(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        said = json.loads((folder / "manifest.json").read_bytes())
        change(said)
        (folder / "manifest.json").write_text(json.dumps(said))

    return harm


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "added.py").write_text("import this"), "'added.py' is not as it was signed"),
        (lambda folder: (folder / "config.json").write_text("{}"), "'config.json' is not as it was signed"),
        (lambda folder: (folder / "config.json").unlink(), "'config.json' is not as it was signed"),
        (rewrite(lambda said: said.update(name="hearts")), "is not what its key signed"),
        (rewrite(lambda said: said["files"].pop("config.json")), "is not what its key signed"),  # type: ignore[attr-defined]
        (rewrite(lambda said: said.pop("key")), "cannot be read"),
        (rewrite(lambda said: said.update(key="ssh-ed25519 AAAA")), "cannot be read"),
        (rewrite(lambda said: said.update(signature="?")), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_what_was_changed_after_it_was_signed_is_refused_whoever_is_pinned(
    folder: Path, harm: Callable[[Path], None], words: str
) -> None:
    harm(folder)
    for trust in (None, PIN):
        with pytest.raises(CheckpointError, match=words) as caught:
            check(folder, trust)
        assert "\n" not in str(caught.value)


def test_a_manifest_that_another_key_signed_anew_is_that_keys(folder: Path) -> None:
    hashes = {name: value for name, value in release.file_hashes(folder).items() if name != signing.MANIFEST}
    signing.write_manifest(folder, "lungs", hashes, OTHER)
    assert check(folder) == OTHER_PIN
    with pytest.raises(CheckpointError, match="refused"):
        check(folder, PIN)


def test_a_release_of_one_name_is_none_of_another(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="was signed as a release of 'lungs', not of 'hearts'; refused"):
        check(folder, PIN, name="hearts")


@pytest.mark.parametrize("text", ["SHA256:short", "MD5:" + "a" * 43, f"{PIN}x", "yes"])
def test_what_is_no_fingerprint_pins_nothing_and_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no fingerprint; expected SHA256:"):
        signing.pins(text)


def test_the_line_on_an_origin_claims_no_more_than_is_known() -> None:
    assert signing.origin(PIN, PIN) == f"origin verified: signed by {PIN}, which is pinned."
    assert signing.origin(PIN, None).startswith(f"origin not verified: signed by {PIN}, and no key is pinned.")
    assert signing.origin(None, None) == "origin not verified: nobody signed this release."


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "release.key"
    made = signing.release_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing.release_key(path).private_bytes_raw() == made.private_bytes_raw()
    path.write_text("no key")
    with pytest.raises(ConfigError, match="is no unencrypted private key; put the original back"):
        signing.release_key(path)
    with pytest.raises(ConfigError, match=r"has no release.key; 'wardround provision"):
        signing.kit_key(tmp_path / "elsewhere")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_fingerprint_is_what_ssh_keygen_prints(tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    shown = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] == PIN


def taken(source: Path, trust: str | None = None) -> Path:
    with release_folder(source, trust=trust) as folder:
        return folder


def test_a_folder_is_verified_against_the_pin_where_there_is_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "protocol.json").write_text("{}")
    shutil.copytree(folder, run / "release")
    for source in (folder, run):
        assert taken(source) == taken(source, PIN) == taken(source, f"{OTHER_PIN},{PIN}")
        with pytest.raises(CheckpointError, match=rf"is signed by {PIN.replace('+', '.')}, expected"):
            taken(source, OTHER_PIN)
    with pytest.raises(ConfigError, match="trust 'yes': is no fingerprint"):
        taken(folder, "yes")
    monkeypatch.setenv("WARDROUND_TRUST", OTHER_PIN)
    with pytest.raises(CheckpointError, match="is signed by"):
        taken(folder)
    assert taken(folder, PIN) == folder, "what is given goes before the environment"


def test_a_pin_refuses_a_folder_with_a_file_more_than_was_signed(folder: Path) -> None:
    (folder / "added.py").write_text("import this")
    assert taken(folder) == folder
    with pytest.raises(CheckpointError, match=r"'added.py' is not as it was signed"):
        taken(folder, PIN)


def test_a_folder_without_a_signature_is_refused_where_a_key_is_pinned_and_the_line_says_what_to_do(
    tmp_path: Path,
) -> None:
    bare = write_release(tmp_path / "bare", "lungs", 1, key=None)
    assert taken(bare) == bare
    with pytest.raises(CheckpointError, match=r"expected SHA256:.*leave out --trust and WARDROUND_TRUST"):
        taken(bare, PIN)
