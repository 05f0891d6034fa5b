"""The Jobs API over a real HTTP server: what is refused, where the token goes, and that every wait ends."""

from __future__ import annotations

import io
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ray_head import TOKEN, RayHead, ray_head
from support.ray_hosts import self_signed

from cluster.job import ClusterError
from cluster.ray_jobs import RayJobs, parse_address, require_private
from cluster.ray_token import Token

RIGHT, WRONG = Token(TOKEN, "a test"), Token("canary-wrong-token", "RAY_AUTH_TOKEN")


@pytest.fixture
def head() -> Iterator[RayHead]:
    with ray_head() as found:
        yield found


def client(head: RayHead, token: Token | None = RIGHT, **more: object) -> RayJobs:
    return RayJobs(parse_address(head.url), token, **more)  # type: ignore[arg-type]


def failure(call: object, *args: object) -> ClusterError:
    """The error of a call. No text of it, and nothing that is chained to it, holds a token."""
    with pytest.raises(ClusterError) as caught:
        call(*args)  # type: ignore[operator]
    shown = "".join(traceback.format_exception(caught.value))
    assert "canary" not in shown
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://localhost:8265", "http://localhost:8265"),
        ("http://head", "http://head:8265"),
        ("https://head/", "https://head:443"),
        ("https://head:8443/ray/", "https://head:8443/ray"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(text: str, expected: str) -> None:
    assert str(parse_address(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "head:8265",
            "ray://head:10001",
            "ftp://head",
            "http://",
            "http://head:port",
            "https://head/?token=canary",
        ),
        *("http://head..ex:8265", "https://head/a b", "https://head/é"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    assert failure(parse_address, text).exit_code == 2


def test_a_password_in_an_address_is_not_repeated() -> None:
    for text in ("https://user:canary@head:8265", "user:canary@head:8265", "https:/user:canary@head"):
        assert "canary" not in str(failure(parse_address, text))


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://head", True),
        ("http://localhost", True),
        ("http://127.0.0.1", True),
        ("http://127.9.9.9", True),
        ("http://[::1]", True),
        ("http://10.0.0.1", False),
        ("http://head", False),
        ("http://localhost.evil.org", False),
        ("http://127.0.0.1.evil.org", False),
        ("http://0.0.0.0", False),
    ],
)
def test_plain_http_leaves_this_machine_only_on_request(url: str, private: bool) -> None:
    address = parse_address(url)
    require_private(address, insecure=True)
    if private:
        require_private(address, insecure=False)
        return
    with pytest.raises(ClusterError) as caught:
        require_private(address, insecure=False)
    assert "ssh -N -L" in caught.value.hint
    assert "--insecure" in caught.value.hint


def test_the_probe_sends_no_token_and_runs_nothing(head: RayHead) -> None:
    client(head).require_protected()
    assert head.requests == [("GET", "/api/jobs/", ""), ("POST", "/api/jobs/", "")]
    assert not head.jobs


def test_an_unprotected_cluster_is_refused_with_what_to_do() -> None:
    with ray_head(token=None) as head:
        e = failure(client(head).require_protected)
        assert (e.exit_code, head.jobs) == (2, {})
        assert "RAY_AUTH_MODE=token" in e.hint
        assert "CVE-2023-48022" in e.hint


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("POST", 400)])
def test_a_cluster_that_is_half_protected_is_refused(head: RayHead, method: str, status: int) -> None:
    head.open_to = method
    message = failure(client(head).require_protected).message
    assert f"does not ask for a token (it answered {status} without one)" in message


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/x?canary=1", "https://elsewhere.org/", "/login"])
def test_a_redirect_is_followed_by_nobody(target: str) -> None:
    with ray_head() as other, ray_head(redirect_to=target.replace("127.0.0.1:1", "OTHER")) as head:
        head.redirect_to = head.redirect_to.replace("http://OTHER", other.url)
        for call in (client(head).require_protected, client(head).ray_version):
            e = failure(call)
            assert e.exit_code == 2
            assert "redirects to" in e.message
        assert other.requests == []


def test_tokens_that_are_wrong_or_missing(head: RayHead) -> None:
    e = failure(client(head, WRONG).ray_version)
    assert e.exit_code == 2
    assert "refuses the token from RAY_AUTH_TOKEN (403)" in e.message
    e = failure(client(head, None).ray_version)
    assert e.exit_code == 2
    assert "none was found" in e.message
    assert "get-auth-token" in e.hint


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(500, 75, "RuntimeError: full"), (503, 75, "RuntimeError: full"), (400, 2, "RuntimeError: full"), (404, 2, "404")],
)
def test_answers_that_are_errors(head: RayHead, status: int, code: int, said: str) -> None:
    head.faults["GET", "/api/version"] = (status, f"Traceback\n  File x\nRuntimeError: full {TOKEN}\n")
    e = failure(client(head).ray_version)
    assert e.exit_code == code
    assert said in e.message


def test_a_server_that_is_no_dashboard(head: RayHead) -> None:
    head.faults["GET", "/api/version"] = (200, "<html>Welcome</html>")
    assert "does not answer as a Ray dashboard does" in failure(client(head).ray_version).message
    head.faults["GET", "/api/version"] = (200, "[]")
    assert "is not a Ray dashboard" in failure(client(head).ray_version).message


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    e = failure(RayJobs(parse_address(f"http://127.0.0.1:{port}"), WRONG).ray_version)
    assert e.exit_code == 75
    assert "cannot be reached: Connection refused" in e.message
    e = failure(RayJobs(parse_address("http://no-such-host.invalid"), WRONG).ray_version)
    assert e.exit_code == 75
    assert "there is no host" in e.message


def test_a_server_that_says_nothing_and_one_that_never_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        e = failure(RayJobs(parse_address(url), WRONG, timeout_s=0.5).ray_version)
        assert e.exit_code == 75
        assert "did not answer within 0.5 s" in e.message
        assert "--timeout-s" in e.hint
        assert time.monotonic() - began < 3
    with ray_head(drip_s=0.2) as head:
        began = time.monotonic()
        assert failure(client(head, timeout_s=0.7).ray_version).exit_code == 75
        assert time.monotonic() - began < 3


def test_packages_are_stored_once(head: RayHead) -> None:
    jobs = client(head)
    assert not jobs.has_package("_ray_pkg_1.zip")
    jobs.upload_package("_ray_pkg_1.zip", io.BytesIO(b"x" * 3_000_000), 3_000_000)
    assert jobs.has_package("_ray_pkg_1.zip")
    assert head.packages == {"_ray_pkg_1.zip": b"x" * 3_000_000}


def test_a_package_that_is_too_large_for_the_cluster(head: RayHead) -> None:
    head.max_body = 1000
    data = io.BytesIO(b"x" * 50_000_000)  # more than any socket buffers: the answer comes while it is being sent
    e = failure(client(head).upload_package, "_ray_pkg_1.zip", data, 50_000_000)
    assert e.exit_code == 2
    assert "50.0 MB (413)" in e.message
    assert "--shared" in e.hint


def test_jobs_from_submission_to_their_end(head: RayHead) -> None:
    jobs, job_id = client(head), "名 字's #1?-20260102-030405-abcd"
    assert jobs.job(job_id) is None
    jobs.submit(job_id, "exec true", {"env_vars": {}}, {"tunelaunch": "0.1.0"})
    job = jobs.job(job_id)
    assert job is not None
    assert job.state == "pending"
    assert job.started
    assert job.ended is None
    assert "already exists" in failure(jobs.submit, job_id, "exec true", {}, {}).message
    head.set_job(job_id, "FAILED", "one\n二\n", message="m", driver_exit_code=2, end_time=5000)
    job = jobs.jobs()[job_id]
    assert (job.state, job.message, job.exit_code, job.ended) == ("failed", "m", 2, 5.0)
    assert jobs.logs(job_id) == "one\n二\n"
    jobs.stop(job_id)
    assert head.jobs[job_id]["status"] == "STOPPED"


def test_certificates_are_checked(tmp_path: Path) -> None:
    trusted = self_signed("127.0.0.1", tmp_path)
    (tmp_path / "other").mkdir()
    stranger = self_signed("127.0.0.1", tmp_path / "other")
    with ray_head(certificate=trusted) as head:
        assert client(head, ca=str(trusted)).ray_version() == "2.60.0"
        for ca in (None, str(stranger)):
            e = failure(client(head, ca=ca).ray_version)
            assert e.exit_code == 2
            assert "is not trusted" in e.message
            assert "--ca" in e.hint
        assert [sent for *_, sent in head.requests] == [f"Bearer {TOKEN}"]
    with ray_head(certificate=self_signed("127.0.0.9", tmp_path / "other")) as head:  # of another host
        e = failure(client(head, ca=str(tmp_path / "other" / "proxy.pem")).ray_version)
        assert "is not trusted" in e.message
        assert not head.requests
    with pytest.raises(ClusterError, match="no certificates can be read"):
        RayJobs(parse_address("https://head"), None, ca=str(tmp_path / "none.pem"))
    (tmp_path / "not.pem").write_text("x", encoding="utf-8")
    with pytest.raises(ClusterError, match="no certificates can be read"):
        RayJobs(parse_address("https://head"), None, ca=str(tmp_path / "not.pem"))


def test_https_to_a_port_that_speaks_http(head: RayHead) -> None:
    e = failure(RayJobs(parse_address(head.url.replace("http:", "https:")), WRONG, timeout_s=3).ray_version)
    assert e.exit_code == 2
    assert "does not speak https" in e.message
