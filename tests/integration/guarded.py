"""A broker with everything locked: certificates, SCRAM users, tokens and ACLs; and the keys to it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from forecaster.devkafka import DevKafka

ISSUER, AUDIENCE = "https://identity.test", "kafka"
SCRAM_USERS = {"alice": "wonder-8431-land", "bob": "builder-8431-house"}
MECHANISMS = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}
_SASL = "org.apache.kafka.common.security"


class Identity:
    """An identity provider's signing key; the broker knows its public half."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)

    def keys(self) -> str:
        """What the broker trusts (JWKS)."""
        public = self._key.public_key().public_numbers()
        n, e = (_b64(number.to_bytes((number.bit_length() + 7) // 8, "big")) for number in (public.n, public.e))
        return json.dumps({"keys": [{"kty": "RSA", "kid": "one", "use": "sig", "alg": "RS256", "n": n, "e": e}]})

    def token(self, subject: str, lifetime_s: int = 600) -> str:
        """A signed token for a user."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "scope": "kafka", "iat": now, "exp": now + lifetime_s}
        head = {"alg": "RS256", "kid": "one", "typ": "JWT"}
        text = ".".join(_b64(json.dumps(part).encode()) for part in (head, claims))
        return f"{text}.{_b64(self._key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Keys:
    """The authority, and what it has signed, as files."""

    def __init__(self, directory: Path) -> None:
        authority, stranger = trustme.CA(), trustme.CA()
        self.cafile = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(self.cafile))
        self.other_cafile = directory / "other-ca.pem"
        stranger.cert_pem.write_to_path(str(self.other_cafile))
        self.broker = _pem(authority.issue_cert("127.0.0.1"), directory / "broker.pem")
        self.elsewhere = _pem(authority.issue_cert("192.0.2.1"), directory / "elsewhere.pem")
        self.server = _pair(authority.issue_cert("127.0.0.1"), directory / "server")
        self.certfile, self.keyfile = _pair(
            authority.issue_cert("alice.test", common_name="alice"), directory / "alice"
        )
        self.other_certfile, self.other_keyfile = _pair(
            stranger.issue_cert("alice.test", common_name="alice"), directory / "mallory"
        )
        self.locked_keyfile = directory / "alice-locked.key"
        self.locked_keyfile.write_bytes(_pkcs8(self.keyfile.read_bytes(), b"open-8431-sesame"))


def _pair(leaf: trustme.LeafCert, stem: Path) -> tuple[Path, Path]:
    certificate, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
    leaf.cert_chain_pems[0].write_to_path(str(certificate))
    leaf.private_key_pem.write_to_path(str(key))
    return certificate, key


def _pem(leaf: trustme.LeafCert, path: Path) -> Path:
    """Key and chain in one file, as Kafka takes them."""
    path.write_bytes(_pkcs8(leaf.private_key_pem.bytes()) + b"".join(each.bytes() for each in leaf.cert_chain_pems))
    return path


def _pkcs8(pem: bytes, password: bytes | None = None) -> bytes:
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    key = serialization.load_pem_private_key(pem, None)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


class Guarded:
    """The broker and the keys to it. Its plain listener is for the test itself: it may do everything."""

    def __init__(self, broker: DevKafka, keys: Keys, identity: Identity) -> None:
        self.broker, self.keys, self.identity = broker, keys, identity
        self.bootstrap_servers = broker.bootstrap_servers

    def kafka(self, listener: str, **changes: Any) -> dict[str, Any]:
        """The [kafka] section that reaches a listener and trusts its certificate."""
        protocol = "SASL_SSL" if listener == "SASL" else "SSL"
        address = self.broker.addresses[listener]
        return {
            "bootstrap_servers": address,
            "security_protocol": protocol,
            "ssl_cafile": str(self.keys.cafile),
        } | changes


@contextmanager
def guarded_broker(directory: Path, properties: Mapping[str, str] | None = None) -> Iterator[Guarded]:
    """A broker of one's own with listeners SASL, TLS, MTLS and ELSEWHERE (whose certificate is another host's)."""
    keys, identity = Keys(directory), Identity()
    jwks = directory / "jwks.json"
    jwks.write_text(identity.keys())
    settings = {
        "sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        "sasl.oauthbearer.jwks.endpoint.url": jwks.as_uri(),
        # With the default one a stranger's token was taken.
        "sasl.oauthbearer.jwt.validator.class": f"{_SASL}.oauthbearer.BrokerJwtValidator",
        "sasl.oauthbearer.expected.audience": AUDIENCE,
        "sasl.oauthbearer.expected.issuer": ISSUER,
        "listener.name.sasl.oauthbearer.sasl.server.callback.handler.class": (
            f"{_SASL}.oauthbearer.OAuthBearerValidatorCallbackHandler"
        ),
        "listener.name.sasl.oauthbearer.sasl.jaas.config": f"{_SASL}.oauthbearer.OAuthBearerLoginModule required;",
        "listener.name.mtls.ssl.client.auth": "required",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "true",
    }
    for mechanism in MECHANISMS:
        place = f"listener.name.sasl.{mechanism.lower()}.sasl.jaas.config"
        settings[place] = f"{_SASL}.scram.ScramLoginModule required;"
    listeners = {"SASL": "SASL_SSL", "TLS": "SSL", "MTLS": "SSL", "ELSEWHERE": "SSL"}
    for name in listeners:
        place = f"listener.name.{name.lower()}.ssl"
        settings |= {
            f"{place}.keystore.type": "PEM",
            f"{place}.keystore.location": str(keys.elsewhere if name == "ELSEWHERE" else keys.broker),
            f"{place}.truststore.type": "PEM",
            f"{place}.truststore.location": str(keys.cafile),
        }
    broker = DevKafka(directory / "kafka", listeners=listeners, properties=settings | dict(properties or {}))
    with pytest.MonkeyPatch.context() as patch:
        # Kafka reads keys only from where its administrator said so.
        patch.setenv("JAVA_TOOL_OPTIONS", f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={jwks.as_uri()}")
        with broker:
            _create_users(broker.bootstrap_servers)
            yield Guarded(broker, keys, identity)


def _create_users(bootstrap_servers: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    for mechanism in MECHANISMS.values():  # a user's credentials change one at a time
        scram = ScramCredentialInfo(mechanism, 4_096)
        users = [UserScramCredentialUpsertion(user, scram, word.encode()) for user, word in SCRAM_USERS.items()]
        for done in admin.alter_user_scram_credentials(users).values():
            done.result(30)
