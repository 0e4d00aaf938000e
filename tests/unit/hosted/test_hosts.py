"""A host counts as one of this network only if all that it can be is in this network; a bad address is refused."""

from __future__ import annotations

import socket

import pytest

from telco_nb.hosted import hosts
from telco_nb.hosted.api import HostedModel, ProviderError, hosted_model_from
from telco_nb.hosted.hosts import AddressError, parse_address


def model(url: str) -> HostedModel:
    return HostedModel("openai-compatible", "own", url)


@pytest.fixture
def resolver(monkeypatch):
    """A resolver without a network: `found[name]` are the addresses of a name."""
    found: dict[str, list[str]] = {}

    def getaddrinfo(host, *_, **__):
        if host not in found:
            raise socket.gaierror("no such name")
        return [(None, None, None, "", (address, 0)) for address in found[host]]

    monkeypatch.setattr(hosts.socket, "getaddrinfo", getaddrinfo)
    return found


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "127.8.8.8", "[::1]:8000", "[::ffff:127.0.0.1]"])
def test_a_loopback_address_is_this_machine(host):
    address = parse_address(f"http://{host}/v1")
    assert address.reach == "machine" and address.netloc == host and address.url == f"http://{host}/v1"


@pytest.mark.parametrize("host", ["10.1.2.3:8000", "172.16.0.1", "192.168.1.1", "[fd00::1]"])
def test_a_private_address_is_this_network(host):
    assert parse_address(f"http://{host}/v1").reach == "network"


ODD = [
    "134744072", "2130706433", "0x08080808", "0x7f000001", "0177.0.0.1", "01002004010", "127.1", "8.8", "1.0x7f",
    "evil。com", "evil．com", "８.８.８.８", "１３４７４４０７２", "ｅvil.com", "8.8.8.8",
    "169.254.169.254", "0.0.0.0", "192.0.2.1",
    "100.64.0.1", "224.0.0.1", "172.32.0.1", "[fe80::1]", "[::]", "[::ffff:8.8.8.8]", "[64:ff9b::a00:1]",
    "[2002:a00:1::]", "localhost.evil.com", "127.0.0.1.evil.com", "evil.com.", "münchen.example",
    "own.internal.evil.com",
]  # fmt: skip


@pytest.mark.parametrize("found", [["127.0.0.1"], []], ids=["a resolver that calls it this machine", "none"])
@pytest.mark.parametrize("host", ODD)
def test_every_other_address_number_and_name_is_remote_and_needs_https_and_consent(host, found, monkeypatch):
    monkeypatch.setattr(
        hosts.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (address, 0)) for address in found]
    )
    assert parse_address(f"https://{host}/v1").reach == "remote"
    assert not model(f"https://{host}/v1").is_local
    with pytest.raises(ProviderError, match="needs https"):
        model(f"http://{host}/v1")


def test_a_host_is_named_and_asked_in_one_spelling():
    assert model("https://EVIL。com/v1").url == "https://evil.com/v1"
    assert model("https://münchen.example").host == "xn--mnchen-3ya.example"
    assert model("http://１２７.0.0.1:8000/v1").url == "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize("name", ["localhost", "gpu-box", "gpu.local", "gpu.internal", "gpu.lan", "gpu.home.arpa"])
@pytest.mark.parametrize(
    ("addresses", "reach"),
    [
        (["127.0.0.1", "::1"], "machine"),
        (["10.0.0.7"], "network"),
        (["10.0.0.7", "127.0.0.1"], "network"),
        (["10.0.0.7", "8.8.8.8"], "remote"),
        (["127.0.0.1", "2001:4860:4860::8888"], "remote"),
        (["fe80::1%eth0"], "remote"),
        ([], "remote"),
    ],
)
def test_a_name_is_local_only_if_every_address_of_it_is(name, addresses, reach, resolver):
    resolver[name] = addresses
    assert parse_address(f"https://{name}/v1").reach == reach


def test_a_name_that_does_not_resolve_or_has_a_public_domain_is_remote(resolver):
    resolver["models.example.com"] = ["10.0.0.1"]
    assert {parse_address(f"https://{name}").reach for name in ("nobody", "no.local", "models.example.com")} == {
        "remote"
    }


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [("127.0.0.1", {"machine", "network", "remote"}), ("10.0.0.7", {"network", "remote"}), ("8.8.8.8", {"remote"})],
)
def test_a_connection_may_lead_nearer_than_agreed_and_never_farther(peer, allowed):
    assert {reach for reach in hosts.REACHES if hosts.is_within(peer, reach)} == allowed


def test_a_name_is_resolved_once_for_an_address_so_that_what_was_agreed_to_stays(resolver):
    resolver["gpu-box"] = ["10.0.0.7"]
    address = parse_address("http://gpu-box/v1")
    assert address.reach == "network"
    resolver["gpu-box"] = ["8.8.8.8"]
    assert address.reach == "network" and parse_address("https://gpu-box/v1").reach == "remote"


BAD = [
    "http://127.0.0.1:0/v1", "http://127.0.0.1:99999/v1", "http://127.0.0.1:port/v1", "http://127.0.0.1:/v1",
    "http://127.0.0.1:-1", "ftp://127.0.0.1/v1", "file:///etc/passwd", "127.0.0.1:8000", "nonsense", "http://",
    "https:///v1",
    "http://[::1", "http://u:p@127.0.0.1", "http://u@127.0.0.1", "https://a.example/v1?key=1", "https://a.example/v1#x",
    "http://127.0.0.1\\@evil.com", "http://127.0.0.1%2f@evil.com", "http://%31%32%37.0.0.1",
    "http://127.0.0.1 .evil.com",
    "http://127.0.0.1\n.evil.com", "http://a..b", "http://" + "a" * 64, "http://[fe80::1%25eth0]",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD)
def test_a_bad_port_scheme_or_host_is_refused_when_the_parameters_are_read_and_no_secret_is_repeated(url):
    with pytest.raises(AddressError):
        parse_address(url)
    settings = {
        "model": "own",
        "endpoint": url,
        "max_tokens": 9,
        "temperature": None,
        "structured": "native",
        "timeout_s": 9,
    }
    values = {"judge_kind": "openai-compatible"} | {f"judge_{name}": value for name, value in settings.items()}
    with pytest.raises(ProviderError, match="judge_endpoint") as refused:
        hosted_model_from(values, "judge")
    assert "u:p" not in str(refused.value) and "key=1" not in str(refused.value)


@pytest.mark.parametrize("setting", [{"timeout_s": float("nan")}, {"timeout_s": float("inf")}, {"max_tokens": 0}])
def test_a_limit_of_a_request_is_a_finite_number_above_0(setting):
    with pytest.raises(ProviderError, match=next(iter(setting))):
        HostedModel("anthropic", "claude-sonnet-4-5", **setting)
