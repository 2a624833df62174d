"""Where a bucket of S3 is reached, and with what credentials: what AWS's own tools would find, found by botocore."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.errors import OptionError, StoreAccessError
from actcache.store.lazy import lazy

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_ANYWHERE = "us-east-1"
_METADATA = "http://169.254.169.254"
_METADATA_WAIT_S = 0.3
_REGION_WAIT_S = 5.0
_YES = {"1", "true", "yes", "on"}


class Aws:
    """Endpoint, region and credentials for one bucket, each given or found where AWS's tools look.

    Nothing is read or asked before it is needed. Threads may share one; a fork may not.
    """

    def __init__(
        self, bucket: str, *, endpoint: str | None, region: str | None, profile: str | None, anonymous: bool | None
    ) -> None:
        self._bucket = bucket
        self._given_endpoint = endpoint
        self._region = region
        self._profile = profile
        self._anonymous = _yes(os.environ.get("AWS_SKIP_SIGNATURE")) or None if anonymous is None else anonymous
        self._shown: Any = None

    @lazy
    def _session(self) -> Any:
        import botocore.session

        return botocore.session.Session(profile=self._profile)

    def _configured(self) -> Mapping[str, Any]:
        """What the files say of the profile in force."""
        import botocore.exceptions

        try:
            found: Mapping[str, Any] = self._session.get_scoped_config()
        except botocore.exceptions.BotoCoreError as error:
            raise StoreAccessError(
                f"cannot read AWS's configuration: {error}. Check AWS_PROFILE, or profile=."
            ) from None
        return found

    @lazy
    def endpoint(self) -> str | None:
        """The URL of the server; None: that of AWS."""
        return checked_endpoint(self._given_endpoint or self._found_endpoint() or None)

    def _found_endpoint(self) -> str | None:
        configured = self._configured()
        ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") or configured.get(
            "ignore_configured_endpoint_urls"
        )
        if _yes(ignored):
            return None
        for variable in ENDPOINT_VARIABLES:
            if os.environ.get(variable):
                return os.environ[variable]
        services = self._session.full_config.get("services", {}).get(configured.get("services"), {})
        of_s3 = services.get("s3", {})
        return (of_s3.get("endpoint_url") if isinstance(of_s3, Mapping) else None) or configured.get("endpoint_url")

    @property
    def region(self) -> str:
        """The region for which requests are signed."""
        if self._region is None:
            self._configured()
            self._region = (
                os.environ.get("AWS_REGION")
                or self._session.get_config_variable("region")
                or (self.endpoint and _ANYWHERE)
                or self._asked_region()
                or _ANYWHERE
            )
        return self._region

    def other_region(self) -> bool:
        """Ask the server where the bucket is; whether that is another region than was thought. From now on it is."""
        found = self._asked_region()
        if not found or found == self._region:
            return False
        self._region = found
        return True

    def _asked_region(self) -> str | None:
        base = (self.endpoint or "https://s3.amazonaws.com").rstrip("/")
        request = urllib.request.Request(f"{base}/{urllib.parse.quote(self._bucket)}", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_REGION_WAIT_S) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:
            # The region stands in refusals too.
            with error:
                headers = error.headers
        except (OSError, ValueError):
            return None
        found: str | None = headers.get("x-amz-bucket-region")
        return found

    @lazy
    def authorities(self) -> bytes | None:
        """The file of certificate authorities that AWS's tools are told to trust; None: those of this machine."""
        path = os.environ.get("AWS_CA_BUNDLE") or self._configured().get("ca_bundle")
        if not path:
            return None
        try:
            return Path(path).expanduser().read_bytes()
        except OSError as error:
            raise OptionError(f"AWS_CA_BUNDLE (or ca_bundle) is {path!r}, which cannot be read: {error}") from error

    @lazy
    def hashes_bodies(self) -> bool:
        """Whether what is put is hashed, so that the signature covers it too."""
        of_s3 = self._configured().get("s3")
        said = of_s3.get("payload_signing_enabled") if isinstance(of_s3, Mapping) else None
        if said is not None:
            return _yes(said)
        # As AWS's tools have it: with TLS what arrives is what was sent. And to this machine nothing travels.
        where = urllib.parse.urlsplit(self.endpoint or "https://")
        return where.scheme != "https" and not _is_here(where.hostname or "")

    @lazy
    def _credentials(self) -> Any:
        """What botocore found; None: nothing, or nothing is wanted."""
        if self._anonymous:
            return None
        found = self._without_metadata() or (self._metadata_answers() and self._session.get_credentials()) or None
        if found is None and self._anonymous is False:
            raise StoreAccessError(
                f"no credentials were found for s3://{self._bucket}. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or pass anonymous=True where everybody may read."
            )
        return found

    def _without_metadata(self) -> Any:
        # A session remembers what its providers are, so that this one has a session of its own.
        import botocore.session

        resolver = botocore.session.Session(profile=self._profile).get_component("credential_provider")
        resolver.remove("iam-role")
        return resolver.load_credentials()

    def _metadata_answers(self) -> bool:
        """Whether a service that knows the credentials of this machine is there; botocore would wait for it longer."""
        if _yes(os.environ.get("AWS_EC2_METADATA_DISABLED")):
            return False
        where = urllib.parse.urlsplit(
            os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
            or self._session.get_config_variable("ec2_metadata_service_endpoint")
            or _METADATA
        )
        with contextlib.suppress(OSError, ValueError):
            address = where.hostname or "", where.port or (443 if where.scheme == "https" else 80)
            with socket.create_connection(address, timeout=_METADATA_WAIT_S):
                return True
        return False

    def refresh(self) -> Any:
        """The credentials of this moment (access_key, secret_key, token), renewed where they are about to expire.

        None: requests are not signed.

        Raises StoreAccessError: there are some, and they cannot be had now; it says why.
        """
        import botocore.exceptions

        try:
            found = self._credentials
            self._shown = None if found is None else found.get_frozen_credentials()
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise StoreAccessError(
                f"cannot get credentials for s3://{self._bucket}: {error}. Log in again (aws sso login), or choose "
                "others with AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from None
        return self._shown

    def provide(self) -> dict[str, Any]:
        """The credentials that `refresh` saw last, as obstore wants them."""
        shown = self._shown
        return {
            "access_key_id": shown.access_key,
            "secret_access_key": shown.secret_key,
            "token": shown.token,
            # Whoever uses them asks `refresh` before each request.
            "expires_at": None,
        }

    def secrets(self) -> list[str]:
        """What must not be shown to anybody."""
        shown = self._shown
        return [] if shown is None else [secret for secret in (shown.secret_key, shown.token) if secret]

    @property
    def is_signing(self) -> bool:
        """Whether requests are signed."""
        return self._shown is not None

    @property
    def signs(self) -> str:
        """Whether requests are signed, and with what, for people."""
        if self._shown is None:
            return "Requests were not signed: " + (
                "anonymous access was asked for." if self._anonymous else
                "no credentials were found in the environment, AWS's files, or from this machine."
            )  # fmt: skip
        method = getattr(self._credentials, "method", None) or "elsewhere"
        return f"The credentials are those of access key {self._shown.access_key[:4]}... (found by: {method})."


def checked_endpoint(endpoint: str | None) -> str | None:
    """`endpoint` without "/" at its end; OptionError where it is no http or https URL of a server alone."""
    if endpoint is None:
        return None
    try:
        parts = urllib.parse.urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        good = good and not parts.query and not parts.fragment and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        # What was given may hold a password.
        raise OptionError("the endpoint is no URL of a server: expected one such as https://s3.example.org:9000.")
    return endpoint.rstrip("/")


def _is_here(host: str) -> bool:
    """Whether a host is this machine, by its name or number alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _yes(value: Any) -> bool:
    return str(value or "").strip().lower() in _YES
