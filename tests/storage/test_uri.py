"""URIs: what opens which store, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadStoreURI
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.s3 import S3Options, S3Store
from storage.stores.uri import open_store


def test_paths_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("store", str(tmp_path / "store"), tmp_path / "store", f"file://{tmp_path}/store"):
        store = open_store(uri)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path / "store"
        assert store.uri == f"file://{tmp_path}/store"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("s3//bucket/x", "s3://bucket/x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("s3:/bucket", "s3://bucket"),
        ("S3:/bucket", "s3://bucket"),
        ("s3;//bucket", "s3://bucket"),
        ("gs:bucket", "gs://bucket"),
        ("file:store", "file://store"),
        ("https:/example.org/models", "https://example.org/models"),
        ("HTTP//example.org", "http://example.org"),
    ],
)
def test_a_slip_of_the_pen_is_no_folder(slip: str, meant: str) -> None:
    told = f"store '{slip}': '://' must stand behind the scheme; write '{meant}', or ./{slip} for a folder"
    with pytest.raises(BadStoreURI) as caught:
        open_store(slip)
    assert str(caught.value) == told


@pytest.mark.parametrize("folder", ["s3", "s3/x", "./s3//x", "files//x", "my-s3//x", "/s3//x", "file", "memories:x"])
def test_a_folder_that_only_looks_a_little_like_it_is_one(folder: str) -> None:
    assert isinstance(open_store(folder), LocalStore)


@pytest.mark.parametrize("uri", ["http://[bad", "s3://[::1/x", "s3://bucket?endpoint_url=http://[bad"])
def test_brackets_that_do_not_close_are_one_line(uri: str) -> None:
    with pytest.raises(BadStoreURI, match=r"not a URI \(Invalid IPv6 URL\)$"):
        open_store(uri)


@given(st.text(max_size=60) | st.text(alphabet="s3:/[]@?&=#%.abhtpfile", max_size=40))
def test_any_text_is_a_store_or_one_line(text: str) -> None:
    try:
        open_store(text)
    except BadStoreURI as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - what else is raised fails the test


def test_a_path_with_blanks_survives_the_round_trip(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a b#c%20")
    store.put("k", b"x", mode="create")
    assert open_store(store.uri).get("k") == b"x"


def test_memory_is_shared_by_name() -> None:
    assert open_store("memory://one") is open_store("memory://one")
    assert open_store("memory://one") is not open_store("memory://two")
    assert isinstance(open_store("memory://one"), MemoryStore)


def test_s3_parameters() -> None:
    uri = (
        "s3://bucket/some/prefix/?endpoint_url=http%3A%2F%2F127.0.0.1%3A9000&region=eu-1&addressing_style=path&profile=me"
        "&retry_mode=adaptive&max_attempts=3&checksum=when_supported&connect_timeout_s=1.5&read_timeout_s=2&multipart_bytes=9"
    )
    store = open_store(uri)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix, store.uri) == ("bucket", "some/prefix/", uri)
    assert store.options == S3Options(
        endpoint_url="http://127.0.0.1:9000",
        region="eu-1",
        addressing_style="path",
        profile="me",
        retry_mode="adaptive",
        max_attempts=3,
        checksum="when_supported",
        connect_timeout_s=1.5,
        read_timeout_s=2.0,
        multipart_bytes=9,
    )


def test_s3_options_reach_the_client() -> None:
    store = open_store(
        "s3://bucket?endpoint_url=http://127.0.0.1:9&region=eu-1&addressing_style=virtual&max_attempts=3&checksum=when_supported"
    )
    assert isinstance(store, S3Store)
    config: Any = store.client.meta.config
    assert store.client.meta.endpoint_url == "http://127.0.0.1:9"
    assert config.region_name == "eu-1"
    assert config.retries == {"mode": "standard", "total_max_attempts": 3}
    assert config.s3 == {"addressing_style": "virtual"}
    assert config.request_checksum_calculation == config.response_checksum_validation == "when_supported"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "empty"),
        ("s4://bucket", "unknown scheme 's4'; did you mean 's3'?"),
        ("s3:bucket", "write 's3://bucket'"),
        ("s3://", "'' is no bucket name"),
        ("s3://Bucket", "'Bucket' is no bucket name"),
        ("s3://bucket?regoin=x", "unknown parameter 'regoin'; did you mean 'region'?"),
        ("s3://bucket?zzz=x", "unknown parameter 'zzz'; known are endpoint_url, region,"),
        ("s3://bucket?region=a&region=b", "'region' is given twice"),
        ("s3://bucket?region=", "region='': empty"),
        ("s3://bucket?endpoint_url=localhost:9000", "expected http://host:port or https://host"),
        ("s3://bucket?addressing_style=pth", "expected one of auto, path, virtual; did you mean 'path'?"),
        ("s3://bucket?max_attempts=0", "expected a number above 0"),
        ("s3://bucket?read_timeout_s=inf", "expected a number above 0"),
        ("s3://bucket#x", "'#' is not part of"),
        ("memory://x?region=a", "memory:// takes no parameters"),
        ("file://", "no path behind 'file://'; write file:///path, or . for the folder"),
        ("file://localhost", "no path behind 'file://'"),
        ("file://relative/path", "write 'file:///relative/path'"),
    ],
)
def test_mistakes_are_told(uri: str, message: str) -> None:
    with pytest.raises(BadStoreURI) as caught:
        open_store(uri)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/prefix",
        "s3://bucket?aws_secret_access_key=hunter2",
        "s3://bucket?session_token=hunter2",
        "s3://bucket?endpoint_url=http://me:hunter2@host",
    ],
)
def test_secrets_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(BadStoreURI, match="no credentials in") as caught:
        open_store(uri)
    assert "hunter2" not in str(caught.value)


def test_missing_credentials_and_endpoint_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.errors import AccessDenied, StoreUnavailable

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(AccessDenied, match="GET k in s3://bucket: no credentials found; set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket?endpoint_url=http://127.0.0.1:9&region=x").get("k")
    with pytest.raises(AccessDenied, match=r"profile .nobody. could not be found"):
        open_store("s3://bucket?profile=nobody").get("k")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(
        StoreUnavailable, match=r"GET k in s3://bucket: cannot connect; check that http://127\.0\.0\.1:9 is up"
    ):
        open_store("s3://bucket?endpoint_url=http://127.0.0.1:9&region=x&max_attempts=1").get("k")
