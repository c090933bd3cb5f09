"""Certificates, keys and the TLS contexts made of them: who may say what to whom.

Each cluster has its own authority. A certificate's role and cluster are in its DNS name, `<role>.<cluster>.herder`, and
its holder's name (of a node, a user) in the common name; addresses are in neither, so machines may move. An *identity*
is a folder with `cert.pem`, `key.pem` and `ca.pem`. Both sides of a connection always show a certificate, TLS is 1.3 or
nothing, and certificates begin a day in the past because the clocks of clusters are what they are.

`cryptography` is imported where certificates are made only: connecting needs the standard library alone, and starts
faster.
"""

from __future__ import annotations

import os
import secrets
import ssl
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from herder_shared import issued
from herder_shared.errors import ConfigError, Unauthorized
from herder_shared.ids import ClusterId
from herder_shared.issued import Issued
from herder_shared.limits import NAME_CHARS_MAX
from herder_shared.wire.messages import Role
from herder_shared.wire.session import Peer

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

CERTIFICATE = "cert.pem"
KEY = "key.pem"
AUTHORITY_CERTIFICATE = "ca.pem"
AUTHORITY_KEY = "ca.key"
#: The key that belongs to a request, until its certificate is installed.
_REQUESTED_KEY = "key.pem.requested"

DAYS_AGENT = 30
DAYS = 365
_DAYS_AUTHORITY = 3650
#: How far in the past certificates begin, for peers whose clocks are slow.
_BACKDATED_HOURS = 24
_DOMAIN = "herder"
_PEM_BYTES_MAX = 256 * 1024
_COMMON_NAME_CHARS_MAX = 64


def create_authority(folder: Path, cluster: ClusterId) -> None:
    """Make a cluster's authority: `ca.pem` and `ca.key` in `folder`, which is made when it is not there.

    Raises:
        ConfigError: there is an authority already, or the folder cannot be written.
    """
    from cryptography import x509

    if (folder / AUTHORITY_KEY).exists():
        raise ConfigError(f"{folder} holds an authority already: its certificates would all become void")
    _make_folder(folder)
    key = _new_key()
    subject = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, "Herder authority"),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, cluster),
        ]
    )
    builder = (
        _builder(subject, subject, key.public_key(), _DAYS_AUTHORITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write(folder / AUTHORITY_KEY, _key_pem(key), 0o600, is_irreplaceable=True)
    _write(folder / AUTHORITY_CERTIFICATE, _sign(builder, key), 0o644, is_irreplaceable=True)


def issue(authority: Path, folder: Path, role: Role, name: str, days: int | None = None) -> None:
    """Make an identity in `folder`: a new key, a certificate for `role` and `name`, the authority's certificate.

    An identity that is there is replaced. `days` defaults to 30 for agents and a year for others.

    Raises:
        ConfigError: the authority cannot be read, or the folder not written.
    """
    request = new_request(folder, name)
    certificate = sign_request(authority, request, role, name, days)
    install_certificate(folder, certificate, _read(authority / AUTHORITY_CERTIFICATE))


def new_request(folder: Path, name: str) -> bytes:
    """Make a key in `folder` and give the request (PEM) for its certificate: the key itself never travels.

    An identity in use stays as it is until `install_certificate`.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    _make_folder(folder)
    key = _new_key()
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name)).sign(key, hashes.SHA256())
    _write(folder / _REQUESTED_KEY, _key_pem(key), 0o600)
    return request.public_bytes(serialization.Encoding.PEM)


def sign_request(authority: Path, request_pem: bytes, role: Role, name: str, days: int | None = None) -> bytes:
    """The certificate (PEM, with its chain below the root) for a request. Role and name are the signer's choice;
    what the request says of itself is not believed.

    What is signed stands in the authority's list (`issued.py`), so that it can be revoked.

    Raises:
        ConfigError: the request is not sound, or the authority cannot be read, or its list not written.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    if role not in get_args(Role):
        raise ConfigError(f"{role!r} is not a role; the roles are {', '.join(get_args(Role))}")
    try:
        request = x509.load_pem_x509_csr(request_pem)
        public_key = request.public_key()
        sound = request.is_signature_valid and isinstance(public_key, ec.EllipticCurvePublicKey)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"the certificate request of {name!r} cannot be read: {error}") from error
    if not sound or not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"the certificate request of {name!r} is not signed by its own elliptic-curve key")
    ca, ca_key = _load_authority(authority)
    builder = _leaf_builder(ca, public_key, role, name, days or (DAYS_AGENT if role == "agent" else DAYS))
    certificate = _sign(builder, ca_key)
    issued.add(authority, issued.describe(x509.load_pem_x509_certificate(certificate), role, name))
    return certificate


def install_certificate(folder: Path, certificate_pem: bytes, ca_pem: bytes) -> None:
    """Complete the identity whose key `new_request` made.

    Raises:
        ConfigError: there is no such key, or the certificate belongs to another one.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    requested = folder / _REQUESTED_KEY
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(_read_secret(requested), None)
    except ValueError as error:
        raise ConfigError(f"the certificate for {folder} cannot be read: {error}") from error
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"the certificate for {folder} belongs to another key: request one again")
    _write(folder / AUTHORITY_CERTIFICATE, ca_pem, 0o644)
    _write(folder / CERTIFICATE, certificate_pem, 0o644)
    os.replace(requested, folder / KEY)


def server_context(identity: Path) -> ssl.SSLContext:
    """The context of a program that accepts connections. Peers must show a certificate of the same authority.

    Raises:
        ConfigError: as `check_identity`, or the certificate and key do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Sessions last for hours and are resumed by our own protocol: tickets would be bytes for nothing.
    context.num_tickets = 0
    return _load(context, identity)


def client_context(identity: Path) -> ssl.SSLContext:
    """The context of a program that connects; use it with `server_name(cluster)`.

    Raises:
        ConfigError: as `server_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert context.check_hostname
    return _load(context, identity)


def server_name(cluster: ClusterId) -> str:
    """The name that a coordinator's certificate must have, whatever its address."""
    return _dns_name("coordinator", cluster)


def peer_of(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> Peer:
    """Who the other side is, by its verified certificate.

    Raises:
        Unauthorized: the certificate is not one of ours: it lacks role, cluster or name.
    """
    certificate: dict[str, Any] = ssl_object.getpeercert() or {}
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    common = [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    if len(names) != 1 or len(common) != 1:
        raise Unauthorized("the certificate has no Herder name: `herder init` and `herder up` make such ones")
    role, cluster = _parse_dns_name(names[0])
    return Peer(
        role=role, name=common[0], cluster=cluster, serial=str(certificate.get("serialNumber", "")).lower().lstrip("0")
    )


def own_peer(identity: Path) -> Peer:
    """What others see of this identity: its role, name, cluster and serial.

    Raises:
        ConfigError: the certificate cannot be read.
    """
    return _read_certificate(identity / CERTIFICATE)[1]


def describe(path: Path) -> Issued:
    """A certificate's line, as in the authority's list.

    Raises:
        ConfigError: it cannot be read.
    """
    certificate, peer = _read_certificate(path)
    return issued.describe(certificate, peer.role, peer.name)


def _read_certificate(path: Path) -> tuple[x509.Certificate, Peer]:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(_read(path))
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        (dns,) = extension.value.get_values_for_type(x509.DNSName)
        (common,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        role, cluster = _parse_dns_name(dns)
    except (ValueError, x509.ExtensionNotFound, Unauthorized) as error:
        raise ConfigError(f"{path} is not a Herder certificate, or cut short ({error}): issue it again") from error
    serial = f"{certificate.serial_number:x}"
    return certificate, Peer(role=role, name=str(common.value), cluster=cluster, serial=serial)


def cluster_of(identity: Path) -> ClusterId:
    """The cluster that this identity belongs to.

    Raises:
        ConfigError: its certificate cannot be read.
    """
    return own_peer(identity).cluster


def check_identity(identity: Path) -> None:
    """Check that an identity's files are all there and that nobody else can read or replace them.

    Raises:
        ConfigError: naming the file and the command that mends it.
    """
    for name in (CERTIFICATE, KEY, AUTHORITY_CERTIFICATE):
        if not (identity / name).exists():
            raise ConfigError(
                f"{identity / name} is missing: an identity is made by `herder init`, for a node by `herder up`"
            )
    _check_secret(identity / KEY)


# --- contexts --------------------------------------------------------------------------------------------------------


def _load(context: ssl.SSLContext, identity: Path) -> ssl.SSLContext:
    check_identity(identity)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for name in (CERTIFICATE, AUTHORITY_CERTIFICATE, KEY):
        _check_pem(identity / name)
    try:
        context.load_cert_chain(identity / CERTIFICATE, identity / KEY)
        context.load_verify_locations(identity / AUTHORITY_CERTIFICATE)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"the identity in {identity} cannot be used ({error}): a file is damaged, or certificate and key do not"
            " belong together; issue it again"
        ) from error
    return context


# --- certificates ----------------------------------------------------------------------------------------------------


def _dns_name(role: Role, cluster: ClusterId) -> str:
    return f"{role}.{cluster}.{_DOMAIN}"


def _parse_dns_name(name: str) -> tuple[Role, ClusterId]:
    role, _, rest = name.partition(".")
    cluster, _, domain = rest.rpartition(".")
    if domain != _DOMAIN or role not in get_args(Role) or not cluster or "." in cluster:
        raise Unauthorized(f"the certificate's name {name!r} is not of the form <role>.<cluster>.{_DOMAIN}")
    return role, ClusterId(cluster)  # type: ignore[return-value]  # checked against Role's values above


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _subject(name: str) -> x509.Name:
    from cryptography import x509

    if not name or len(name) > min(_COMMON_NAME_CHARS_MAX, NAME_CHARS_MAX) or not name.isprintable():
        raise ConfigError(
            f"{name!r} cannot be a certificate's name: 1 to {_COMMON_NAME_CHARS_MAX} printable characters"
        )
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    import datetime

    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=_BACKDATED_HOURS))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _leaf_builder(
    ca: x509.Certificate, public_key: EllipticCurvePublicKey, role: Role, name: str, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    organizations = ca.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
    if not organizations:
        raise ConfigError("the authority's certificate names no cluster: make a new profile with `herder init`")
    cluster = ClusterId(str(organizations[0].value))
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role in ("agent", "coordinator"):
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    ca_key_identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder(_subject(name), ca.subject, public_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_dns_name(role, cluster))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_key_identifier), critical=False
        )
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _sign(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import hashes, serialization

    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _load_authority(authority: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        certificate = x509.load_pem_x509_certificate(_read(authority / AUTHORITY_CERTIFICATE))
        key = serialization.load_pem_private_key(_read_secret(authority / AUTHORITY_KEY), None)
    except ValueError as error:
        raise ConfigError(f"the authority in {authority} is damaged ({error}): restore it from a copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority / AUTHORITY_KEY} is not an elliptic-curve key")
    return certificate, key


# --- files -----------------------------------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made a private folder for keys: {error}") from error


def _write(path: Path, content: bytes, mode: int, *, is_irreplaceable: bool = False) -> None:
    """Write a file that others never see half-written, nor for a moment with a wider mode.

    What can be issued again is not synced: a file that a power failure cuts short is refused with that advice.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if is_irreplaceable:
                file.flush()
                os.fsync(descriptor)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_PEM_BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _read_secret(path: Path) -> bytes:
    _check_secret(path)
    return _read(path)


def _check_secret(path: Path) -> None:
    """Refuse a secret that anybody else could have read, or put there."""
    try:
        status, folder = path.lstat(), path.parent.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    user = os.geteuid()
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"{path} is a link; a key must be a file of its own: replace it by a copy of its target")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a regular file; a key must be one")
    if status.st_uid != user:
        raise ConfigError(f"{path} belongs to user {status.st_uid}, not to {user}: run `chown {user} {path}`")
    if status.st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {status.st_mode & 0o777:04o}): run `chmod 600 {path}`")
    if folder.st_uid not in (user, 0):
        raise ConfigError(
            f"{path.parent} belongs to user {folder.st_uid}, not to {user}: run `chown {user} {path.parent}`"
        )
    if folder.st_mode & 0o077:
        raise ConfigError(
            f"{path.parent} is open to others (mode {folder.st_mode & 0o777:04o}): run `chmod 700 {path.parent}`"
        )


def _check_pem(path: Path) -> None:
    content = _read(path)
    if b"-----BEGIN " not in content or not content.rstrip().endswith(b"-----"):
        raise ConfigError(f"{path} is cut short or damaged: issue the identity again, or restore it from a copy")
