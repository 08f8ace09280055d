import pytest

from contracts.pods import NO_POD, PodName, in_log_folder, pod_name, shown_name, workload

UID = "3b1f0c1a-5d3e-4a53-8f0e-1234567890ab"


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        ("web-6d4cf56db6-8xk2p", "web"),
        ("web-front-6d4cf56db6-8xk2p", "web-front"),
        ("agent-x7k2p", "agent"),
        ("node-exporter-9zs2x", "node-exporter"),
        ("backup-28791360-x7k2p", "backup"),
        ("db-0", "db"),
        ("db-12", "db"),
        ("kafka-broker-3", "kafka-broker"),
        ("etcd-node1", "etcd-node1"),
        ("kube-proxy", "kube-proxy"),  # vowels and y are in no generated name
        ("shell", "shell"),
        ("a-00", "a-00"),  # no ordinal
        ("x7k2p", "x7k2p"),
        ("my.app-x7k2p", "my.app"),
    ],
)
def test_workload(pod: str, expected: str) -> None:
    assert workload(pod) == expected
    assert pod_name(shown_name("default", pod)) == PodName("default", pod, expected)


@pytest.mark.parametrize(
    "name",
    ["", "web", "web.1", "/web", "web/", "a/b/c", "k worker/0", "kworker/0:1[17]", "Web/db", "_a/b", "net:[4026532000]",
     "a/b\n", "a" * 64 + "/b"],
)  # fmt: skip
def test_other_containers_are_no_pods(name: str) -> None:
    assert pod_name(name) is NO_POD


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (f"default_web-0_{UID}", ("default", "web-0", UID)),
        ("kube-system_etcd-node1_" + "0f" * 16, ("kube-system", "etcd-node1", "0f" * 16)),
        (f"default_my.app_{UID}", ("default", "my.app", UID)),
        (UID, None),  # the folders of Kubernetes before 1.14
        (f"default_web_{UID}.tmp", None),
        (f"_web_{UID}", None),
        ("default_web_1", None),
        ("lost+found", None),
    ],
)
def test_names_in_the_log_folder(entry: str, found: tuple[str, str, str] | None) -> None:
    assert in_log_folder(entry) == found
