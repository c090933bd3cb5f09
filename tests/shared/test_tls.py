"""Certificates and keys: who they name, how they are kept, what is refused and how to mend it."""

from __future__ import annotations

import datetime
import os
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from herder_shared import tls
from herder_shared.errors import ConfigError, Unauthorized
from herder_shared.wire.secure import SecurePipe
from support.links import CLUSTER, Authority


@pytest.fixture
def identity(authority: Authority, tmp_path: Path) -> Path:
    tls.issue(authority.folder / "authority", tmp_path / "identity", "agent", "n1")
    return tmp_path / "identity"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[SecurePipe, SecurePipe]:
    there = SecurePipe(server, server_side=True)
    here = SecurePipe(client, server_side=False, server_hostname=name)
    here.handshake()
    there.handshake(here.outgoing())
    here.handshake(there.outgoing())
    there.handshake(here.outgoing())
    assert there.is_secured
    assert here.is_secured
    return there, here


# --- what is made ----------------------------------------------------------------------------------------------------


def test_keys_are_private_files_in_private_folders(authority: Authority, identity: Path) -> None:
    assert mode_of(identity) == mode_of(authority.folder / "authority") == 0o700
    assert mode_of(identity / "key.pem") == mode_of(authority.folder / "authority" / "ca.key") == 0o600
    assert sorted(path.name for path in identity.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_keys_are_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        tls.create_authority(tmp_path / "authority", CLUSTER)
        tls.issue(tmp_path / "authority", tmp_path / "me", "client", "me")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "me" / "key.pem") == 0o600
    assert mode_of(tmp_path / "me") == 0o700


def test_a_certificate_names_role_cluster_and_holder(identity: Path) -> None:
    peer = tls.own_peer(identity)
    assert (peer.role, peer.name, peer.cluster) == ("agent", "n1", CLUSTER)
    assert tls.cluster_of(identity) == CLUSTER
    certificate = x509.load_pem_x509_certificate((identity / "cert.pem").read_bytes())
    assert peer.serial == f"{certificate.serial_number:x}"


@pytest.mark.parametrize(("role", "days"), [("agent", 30), ("client", 365), ("admin", 365), ("coordinator", 365)])
def test_certificates_begin_a_day_ago_and_last_as_long_as_their_role_says(
    authority: Authority, role: Any, days: int
) -> None:
    path = authority.identity(role, "n1") / "cert.pem"
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    minute = datetime.timedelta(minutes=1)
    assert abs(certificate.not_valid_before_utc - (now - datetime.timedelta(days=1))) < minute
    assert abs(certificate.not_valid_after_utc - (now + datetime.timedelta(days=days))) < minute


def test_both_ends_of_a_handshake_see_each_other_as_their_certificates_say(
    authority: Authority, identity: Path
) -> None:
    coordinator = authority.identity("coordinator", "coordinator")
    there, here = handshake(tls.server_context(coordinator), tls.client_context(identity), tls.server_name(CLUSTER))
    assert tls.peer_of(there.ssl_object) == tls.own_peer(identity)
    assert tls.peer_of(here.ssl_object) == tls.own_peer(coordinator)
    assert here.ssl_object.version() == "TLSv1.3"
    assert there.receive(here.send(b"x" * 100_000)) == (b"x" * 100_000, False)
    assert there.receive(here.end()) == (b"", True)


def test_an_agent_certificate_serves_both_directions(authority: Authority, identity: Path) -> None:
    other = authority.identity("agent", "n2")
    handshake(tls.server_context(identity), tls.client_context(other), f"agent.{CLUSTER}.herder")


@pytest.mark.parametrize("role", ["client", "admin"])
def test_a_user_certificate_cannot_serve(authority: Authority, identity: Path, role: Any) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(
            tls.server_context(authority.identity(role, "me")),
            tls.client_context(identity),
            f"{role}.{CLUSTER}.herder",
        )


def test_a_peer_without_a_certificate_is_refused(authority: Authority) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match=r"(?i)peer did not return a certificate"):
        handshake(tls.server_context(authority.identity("coordinator", "coordinator")), bare, "x")


def test_a_peer_that_offers_tls_1_2_is_refused(authority: Authority, identity: Path) -> None:
    old = tls.client_context(identity)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(tls.server_context(authority.identity("coordinator", "coordinator")), old, tls.server_name(CLUSTER))


def test_five_identities_take_less_than_a_second_in_all(tmp_path: Path) -> None:
    """LocalCluster makes them at each start; about 10 ms here."""
    started = time.perf_counter()
    tls.create_authority(tmp_path / "authority", CLUSTER)
    for n in range(5):
        tls.issue(tmp_path / "authority", tmp_path / str(n), "agent", f"n{n}")
    assert time.perf_counter() - started < 1.0


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_becomes_an_identity_without_its_key_leaving(authority: Authority, tmp_path: Path) -> None:
    request = tls.new_request(tmp_path / "node", "n7")
    assert b"PRIVATE" not in request
    assert not (tmp_path / "node" / "key.pem").exists()
    certificate = tls.sign_request(authority.folder / "authority", request, "agent", "n7")
    ca = (authority.folder / "authority" / "ca.pem").read_bytes()
    tls.install_certificate(tmp_path / "node", certificate, ca)
    assert tls.own_peer(tmp_path / "node").name == "n7"
    tls.client_context(tmp_path / "node")


def test_an_identity_in_use_stays_until_its_renewal_is_installed(authority: Authority, identity: Path) -> None:
    serial = tls.own_peer(identity).serial
    request = tls.new_request(identity, "n1")
    tls.client_context(identity)
    assert tls.own_peer(identity).serial == serial
    certificate = tls.sign_request(authority.folder / "authority", request, "agent", "n1")
    tls.install_certificate(identity, certificate, (identity / "ca.pem").read_bytes())
    assert tls.own_peer(identity).serial != serial
    tls.client_context(identity)


def test_the_signer_decides_role_and_name_whatever_the_request_says(authority: Authority, tmp_path: Path) -> None:
    request = tls.new_request(tmp_path / "node", "root")
    certificate = tls.sign_request(authority.folder / "authority", request, "agent", "n7")
    tls.install_certificate(tmp_path / "node", certificate, (authority.folder / "authority" / "ca.pem").read_bytes())
    peer = tls.own_peer(tmp_path / "node")
    assert (peer.role, peer.name) == ("agent", "n7")


def test_a_certificate_for_another_key_is_not_installed(authority: Authority, tmp_path: Path) -> None:
    request = tls.new_request(tmp_path / "one", "one")
    tls.new_request(tmp_path / "two", "two")
    certificate = tls.sign_request(authority.folder / "authority", request, "agent", "one")
    with pytest.raises(ConfigError, match="another key"):
        tls.install_certificate(tmp_path / "two", certificate, b"")


def test_requests_that_are_not_sound_are_refused(authority: Authority) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "n")])
    foreign = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
    for request in (b"", b"junk", foreign.public_bytes(Encoding.PEM), foreign.public_bytes(Encoding.PEM)[:200]):
        with pytest.raises(ConfigError, match="request"):
            tls.sign_request(authority.folder / "authority", request, "agent", "n")


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "a\0b", "\x1b[31m"])
def test_names_that_no_certificate_can_carry_are_refused(authority: Authority, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="printable"):
        tls.issue(authority.folder / "authority", tmp_path / "x", "agent", name)


def test_an_unknown_role_is_refused(authority: Authority, tmp_path: Path) -> None:
    role: Any = "king"
    with pytest.raises(ConfigError, match="agent"):
        tls.issue(authority.folder / "authority", tmp_path / "x", role, "n")


def test_an_authority_is_never_replaced(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="already"):
        tls.create_authority(authority.folder / "authority", CLUSTER)


def test_a_verified_certificate_without_our_names_is_unauthorized() -> None:
    class Foreign:
        def getpeercert(self) -> dict[str, Any]:
            return {"subject": ((("commonName", "www"),),), "subjectAltName": (("DNS", "www.example.org"),)}

    class Nameless:
        def getpeercert(self) -> dict[str, Any]:
            return {}

    for peer in (Foreign(), Nameless()):
        with pytest.raises(Unauthorized):
            tls.peer_of(peer)  # type: ignore[arg-type]  # a fake of the one method that is used


# --- what is refused -------------------------------------------------------------------------------------------------


def open_to_group(identity: Path) -> None:
    (identity / "key.pem").chmod(0o640)


def open_folder(identity: Path) -> None:
    identity.chmod(0o755)


def make_link(identity: Path) -> None:
    (identity / "key.pem").rename(identity.parent / "elsewhere.pem")
    (identity / "key.pem").symlink_to(identity.parent / "elsewhere.pem")


def make_fifo(identity: Path) -> None:
    (identity / "key.pem").unlink()
    os.mkfifo(identity / "key.pem", 0o600)


def cut_key(identity: Path) -> None:
    content = (identity / "key.pem").read_bytes()
    (identity / "key.pem").write_bytes(content[: len(content) // 2])


def empty_certificate(identity: Path) -> None:
    (identity / "cert.pem").write_bytes(b"")


def damage_certificate(identity: Path) -> None:
    content = (identity / "cert.pem").read_text()
    (identity / "cert.pem").write_text(content[:100] + "AAAA" + content[104:])


def lose_key(identity: Path) -> None:
    (identity / "key.pem").unlink()


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (open_to_group, r"chmod 600 .*key\.pem"),
        (open_folder, "chmod 700"),
        (make_link, "link"),
        (make_fifo, "regular file"),
        (cut_key, "cut short"),
        (empty_certificate, "cut short"),
        (damage_certificate, "issue it again"),
        (lose_key, r"key\.pem is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_identities_that_are_not_safe_or_whole_are_refused_with_the_fix(
    identity: Path, harm: Callable[[Path], None], text: str
) -> None:
    harm(identity)
    for make_context in (tls.server_context, tls.client_context):
        with pytest.raises(ConfigError, match=text):
            make_context(identity)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file to another user needs root")
def test_a_key_of_another_owner_is_refused(identity: Path) -> None:
    os.chown(identity / "key.pem", 12345, -1)
    with pytest.raises(ConfigError, match="chown 0"):
        tls.client_context(identity)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_a_folder_of_another_owner_is_refused(identity: Path) -> None:
    os.chown(identity, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        tls.client_context(identity)


def test_an_authority_whose_key_others_can_read_does_not_sign(tmp_path: Path) -> None:
    tls.create_authority(tmp_path / "authority", CLUSTER)
    (tmp_path / "authority" / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        tls.issue(tmp_path / "authority", tmp_path / "x", "agent", "n")


def test_key_and_certificate_of_two_identities_are_refused(authority: Authority, identity: Path) -> None:
    other = authority.identity("agent", "n2")
    (identity / "key.pem").write_bytes((other / "key.pem").read_bytes())
    with pytest.raises(ConfigError, match="belong together"):
        tls.client_context(identity)


def test_a_file_in_the_place_of_a_folder_is_a_config_error(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="folder"):
        tls.issue(authority.folder / "authority", tmp_path / "file", "agent", "n")
