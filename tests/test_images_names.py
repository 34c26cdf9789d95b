"""Names of images, credentials, skopeo's complaints, archives: pure."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path

import pytest

from node.archives import read_archive
from node.containers_storage import big_data_file, parse_config, parse_time
from node.interface import ImageFault
from node.registry import (
    Reference,
    auth_file,
    classify,
    parse_reference,
    plain_http,
    pull_fault,
    store_names,
)

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("name", "tagged", "familiar"),
    [
        ("web", "docker.io/library/web:latest", "web:latest"),
        ("web:1", "docker.io/library/web:1", "web:1"),
        ("me/web", "docker.io/me/web:latest", "me/web:latest"),
        ("index.docker.io/web:1", "docker.io/library/web:1", "web:1"),
        ("localhost/web", "localhost/web:latest", "localhost/web:latest"),
        ("localhost:5000/a/b:2", "localhost:5000/a/b:2", "localhost:5000/a/b:2"),
        ("quay.io/a/b", "quay.io/a/b:latest", "quay.io/a/b:latest"),
        ("[::1]:5000/a:2", "[::1]:5000/a:2", "[::1]:5000/a:2"),
        (f"web:1@{DIGEST}", "docker.io/library/web:1", f"web:1@{DIGEST}"),
        (f"web@{DIGEST}", "docker.io/library/web:latest", f"web@{DIGEST}"),
    ],
)
def test_names_are_normalised_as_docker_does(name: str, tagged: str, familiar: str) -> None:
    reference = parse_reference(name)
    assert (reference.tagged, reference.familiar) == (tagged, familiar)
    assert parse_reference(reference.familiar) == reference


@pytest.mark.parametrize("name", ["", "Web", "web:", "web@sha256:12", "a//b", "-x", "web:1:2", "a b", "x/../y"])
def test_a_bad_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(ImageFault, match="invalid image name") as caught:
        parse_reference(name)
    assert caught.value.kind == "invalid"


def test_a_short_name_is_also_looked_for_as_podman_names_it() -> None:
    assert store_names(parse_reference("web")) == ("docker.io/library/web:latest", "localhost/web:latest")
    assert store_names(parse_reference("quay.io/web")) == ("quay.io/web:latest",)


@pytest.mark.parametrize(
    ("domain", "plain"),
    [
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("[::1]:5000", True),
        ("docker.io", False),
        ("10.0.0.1:5000", False),
        ("lab:5000", True),
        ("lab", False),
        ("named", True),
        ("named:443", True),
    ],
)
def test_only_own_and_named_registries_go_without_tls(domain: str, plain: bool) -> None:
    assert plain_http(domain, frozenset({"lab:5000", "named"})) is plain


def test_credentials_become_an_auth_file() -> None:
    given = base64.urlsafe_b64encode(json.dumps({"username": "u", "password": "p?>"}).encode()).decode().rstrip("=")
    entry = json.loads(auth_file("r.example", given))["auths"]["r.example"]
    assert base64.b64decode(entry["auth"]) == b"u:p?>"


@pytest.mark.parametrize("given", ["%%%", base64.b64encode(b"[]").decode(), base64.b64encode(b"x").decode()])
def test_bad_credentials_are_told(given: str) -> None:
    with pytest.raises(ImageFault, match="invalid registry credentials"):
        auth_file("r", given)


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        (
            'time="x" level=fatal msg="reading manifest 1 in r/x: manifest unknown: manifest unknown"',
            "not_found",
        ),
        ('time="x" level=fatal msg="unable to retrieve auth token: invalid username/password: unauthorized"', "denied"),
        ('level=fatal msg="pinging \\"r\\": dial tcp: lookup r: no such host"', "unreachable"),
        ('level=warning msg="slow"\nlevel=fatal msg="writing blob: write /x: no space left on device"', "no_space"),
        ('level=fatal msg="no image found in manifest list for architecture amd64"', "invalid"),
        ("something else", "failed"),
        ("", "failed"),
    ],
)
def test_complaints_of_skopeo_become_kinds(stderr: str, kind: str) -> None:
    assert classify(stderr)[0] == kind
    fault = pull_fault(Reference("r", "x", "1"), stderr)
    assert fault.kind == kind
    assert str(fault).startswith("cannot pull r/x:1: ")
    assert "\n" not in str(fault)


def test_image_configurations() -> None:
    text = json.dumps({"config": {"Cmd": ["a"], "Entrypoint": None, "Volumes": {"/b": {}, "/a": {}}, "User": "u"}})
    config = parse_config(text)
    assert (config.cmd, config.entrypoint, config.volumes, config.user) == (("a",), (), ("/a", "/b"), "u")
    assert parse_config("{}").cmd == ()


def test_times_and_file_names_of_the_store() -> None:
    assert parse_time("2026-11-23T21:06:11.7690322Z") == pytest.approx(1795467971.769, abs=0.001)
    assert parse_time("nonsense") == 0
    assert big_data_file(Path("/s"), "i", "manifest").name == "manifest"
    assert big_data_file(Path("/s"), "i", "sha256:1").name == "=c2hhMjU2OjE="


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8bbroken"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ImageFault, match=r"it is not an image archive") as caught:
        read_archive(tmp_path / "x.tar")
    assert caught.value.kind == "invalid"


def test_a_tar_without_an_index_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("file"))
    with pytest.raises(ImageFault, match="neither"):
        read_archive(tmp_path / "x.tar")
