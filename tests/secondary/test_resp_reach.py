"""Ways to the server that need something of their own: certificates, a network to cut, a salt."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from certificates import Authority
from proxy import Proxy
from requirements import need_mounts, need_program
from valkey_server import ValkeyCluster, ValkeyServer

from kvtier.abc import TierContext
from kvtier.adapters.token_blocks import chain_keys, chain_root
from kvtier.errors import ConfigError
from kvtier.events import TierState
from kvtier.namespace import Namespace
from kvtier.secondary.resp import RespTierManager
from kvtier.stores.resp.options import RespOptions
from kvtier.testing.patience import wait_for
from kvtier.testing.stores import make_key
from kvtier.testing.tier_rig import SuiteSpec, TierRig
from kvtier.types import LookupResult

NAMESPACE = Namespace({"model": "reach"})


def make_rig(url, **options):
    rig = TierRig(TierContext(namespace=NAMESPACE))
    rig.spec = SuiteSpec(replace(rig.spec.tier_context, arena_fd=None))
    rig.attach(RespTierManager(rig.spec, rig.arena.view, "resp", url=url, **options))
    rig.tier.start()
    return rig


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost that signs itself."""
    need_program("openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return str(cert), str(key)


@pytest.fixture
def tls_proxy(valkey, certificate):
    proxy = Proxy(valkey.address, certificate)
    yield proxy
    proxy.close()


def test_blocks_over_tls(tls_proxy, certificate):
    rig = make_rig(tls_proxy.url, tls_ca_file=certificate[0])
    rig.wait_up()
    assert rig.store(range(16)).success
    assert rig.load(range(16))[1] == list(range(16))
    rig.close()


def test_a_server_that_cannot_prove_who_it_is_gets_nothing(tls_proxy, valkey):
    rig = make_rig(tls_proxy.url)
    rig.wait(lambda: rig.tier.state is TierState.DOWN, "the tier is down")
    assert "certificate" in rig.tier.state_reason.lower()
    assert not rig.store([1]).success
    assert valkey.command("DBSIZE") == 0
    rig.close()
    trusting = make_rig(tls_proxy.url, tls_verify=False)
    trusting.wait_up()
    assert trusting.store([1]).success
    trusting.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def proxies(valkey):
    made = []

    def make(*args):
        made.append(Proxy(valkey.address, *args))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_private_authority_vouches_for_a_server_by_address_and_by_name(authority, proxies, host):
    proxy = proxies(authority.issue("server", names=("127.0.0.1", "localhost")))
    rig = make_rig(f"rediss://{host}:{proxy.address[1]}", tls_ca_file=authority.file)
    rig.wait_up()
    assert rig.store(range(16)).success
    assert rig.load(range(16))[1] == list(range(16))
    rig.close()


def refused(url, valkey, said, **options):
    """The tier is down, says why in one line, and nothing has reached the server."""
    rig = make_rig(url, **options)
    rig.wait(lambda: rig.tier.state is TierState.DOWN, "the tier is down")
    reason = rig.tier.state_reason
    assert said in reason.lower()
    assert "\n" not in reason
    assert rig.tier.lookup(make_key(1), rig.request) is LookupResult.MISS
    assert not rig.store([1]).success
    assert valkey.command("DBSIZE") == 0
    rig.close()


@pytest.mark.parametrize(
    ("certificate_of", "said"),
    [
        ({"names": ("127.0.0.1",), "expired": True}, "expired"),
        ({"names": ("elsewhere.example",)}, "certificate"),
        ({"names": ("127.0.0.2",)}, "certificate"),
        ({}, "certificate"),
    ],
    ids=["expired", "for another name", "for another address", "for no name"],
)
def test_a_certificate_that_is_not_the_servers_is_refused(authority, proxies, valkey, certificate_of, said):
    proxy = proxies(authority.issue("wrong", **certificate_of))
    refused(f"rediss://127.0.0.1:{proxy.address[1]}", valkey, said, tls_ca_file=authority.file)


def test_another_authority_is_not_trusted(authority, proxies, valkey, tmp_path):
    other = Authority(tmp_path / "other", "another one")
    proxy = proxies(other.issue("server", names=("127.0.0.1",)))
    refused(f"rediss://127.0.0.1:{proxy.address[1]}", valkey, "certificate", tls_ca_file=authority.file)


def test_a_server_that_asks_for_a_certificate_gets_ours(authority, proxies, valkey):
    proxy = proxies(authority.issue("server", names=("127.0.0.1",)), authority.file)
    url = f"rediss://127.0.0.1:{proxy.address[1]}"
    refused(url, valkey, "", tls_ca_file=authority.file)
    ours, key = authority.issue("client")
    rig = make_rig(url, tls_ca_file=authority.file, tls_cert_file=ours, tls_key_file=key)
    rig.wait_up()
    assert rig.store(range(4)).success
    assert rig.load(range(4))[1] == list(range(4))
    rig.close()


def test_a_server_without_tls_is_no_server(valkey, authority):
    refused(f"rediss://127.0.0.1:{valkey.port}", valkey, "", tls_ca_file=authority.file)


@pytest.mark.parametrize("announced", ["node.invalid", "192.0.2.1"])
def test_a_node_at_an_address_that_cannot_be_reached_costs_its_own_blocks_only(announced, caplog):
    """A cluster behind address translation, or with names that only its own network knows."""
    cluster = ValkeyCluster()
    try:
        cluster.start()
        hidden = cluster.nodes[1]
        is_name = announced.endswith(".invalid")
        for node in cluster.nodes:
            node.configure("cluster-preferred-endpoint-type", "hostname" if is_name else "ip")
            if is_name:
                node.configure("cluster-announce-hostname", "localhost" if node is not hidden else announced)
        if not is_name:
            hidden.configure("cluster-announce-ip", announced)

        def told(node):
            return announced in str(node.command("CLUSTER SLOTS"))

        wait_for(lambda: told(cluster.nodes[0]) and told(cluster.nodes[2]), "the others know the address")
        rig = make_rig([cluster.nodes[0].url, cluster.nodes[2].url], cluster=True, connect_timeout=0.3, timeout=2.0)
        rig.wait_up()
        numbers = list(range(32))
        result = rig.store(numbers)
        stored = sum(node.command("DBSIZE") for node in cluster.nodes)
        assert 0 < stored < 32
        assert hidden.command("DBSIZE") == 0
        assert not result.success
        assert len(rig.load(numbers)[1]) == stored
        assert rig.tier.state is TierState.UP
        (line,) = [line for line in caplog.messages if "lost a node" in line and announced in line]
        assert "address_map" in line
        rig.close()
    finally:
        cluster.close()


def test_a_cluster_of_which_no_node_can_be_reached_where_it_says_is_down_and_says_where():
    cluster = ValkeyCluster()
    try:
        cluster.start()
        for node in cluster.nodes:
            node.configure("cluster-preferred-endpoint-type", "hostname")
            node.configure("cluster-announce-hostname", "node.invalid")

        def told(node):
            return all("node.invalid" in str(shard[2][0]) for shard in node.command("CLUSTER SLOTS"))

        wait_for(lambda: all(map(told, cluster.nodes)), "every node knows the others' names")
        rig = make_rig(cluster.urls, cluster=True, connect_timeout=0.3, timeout=2.0)

        def is_down():
            for number in range(32):  # of all nodes
                rig.tier.lookup(make_key(number), rig.request)
            return rig.tier.state is TierState.DOWN

        rig.wait(is_down, "the tier is down")
        assert "node.invalid" in rig.tier.state_reason
        rig.close()
    finally:
        cluster.close()


@pytest.mark.parametrize("with_ports", [True, False])
def test_a_cluster_that_names_addresses_of_another_network_is_reached_where_the_map_says(with_ports):
    cluster = ValkeyCluster()
    try:
        cluster.start()
        inside = [f"node{number}.invalid" for number in range(3)]
        for node, name in zip(cluster.nodes, inside, strict=True):  # addresses would cut the nodes off from each other
            node.configure("cluster-preferred-endpoint-type", "hostname")
            node.configure("cluster-announce-hostname", name)

        def told(node):
            return {shard[2][0].decode() for shard in node.command("CLUSTER SLOTS")} == set(inside)

        wait_for(lambda: all(map(told, cluster.nodes)), "every node knows the others' names")
        pairs = zip(inside, cluster.nodes, strict=True)
        reached = {f"{at}:{node.port}": f"127.0.0.1:{node.port}" for at, node in pairs}
        address_map = reached if with_ports else dict.fromkeys(inside, "127.0.0.1")
        rig = make_rig(cluster.nodes[0].url, cluster=True, address_map=address_map)
        rig.wait_up()
        assert rig.store(range(32)).success
        assert rig.load(range(32))[1] == list(range(32))
        assert all(node.command("DBSIZE") for node in cluster.nodes)
        slot = cluster.slots_of(0)[0]
        cluster.move_slot(slot, 1)  # MOVED names such an address, too
        rig.load(range(32))
        assert rig.tier.state is TierState.UP
        rig.close()
    finally:
        cluster.close()


@pytest.mark.parametrize(
    "address_map",
    [
        {"10.0.0.1:6379": "db"},
        {"10.0.0.1": "db:6379"},
        {"10.0.0.1:0": "db:1"},
        {"10.0.0.1:70000": "db:1"},
        {"redis://10.0.0.1": "db"},
        {"": "db"},
        {"10.0.0.1": "user:pw@db"},
    ],
)
def test_an_address_map_that_makes_no_sense_is_refused(address_map):
    options = RespOptions.read({"url": "redis://127.0.0.1:1", "cluster": True, "address_map": address_map})
    with pytest.raises(ConfigError, match="address_map") as raised:
        options.check(4096, {})
    assert "pw" not in str(raised.value)


def test_an_address_map_is_for_clusters():
    options = RespOptions.read({"url": "redis://127.0.0.1:1", "address_map": {"a": "b"}})
    with pytest.raises(ConfigError, match="cluster: true"):
        options.check(4096, {})


def test_a_cluster_over_tls(certificate):
    """Each node behind a proxy that speaks TLS, and announced as that."""
    cluster = ValkeyCluster()
    proxies = []
    try:
        cluster.start()
        for node in cluster.nodes:
            proxies.append(Proxy(node.address, certificate))
            node.configure("cluster-announce-port", proxies[-1].address[1])
        ports = {proxy.address[1] for proxy in proxies}

        def announced(node):
            return {int(shard[2][1]) for shard in node.command("CLUSTER SLOTS")} == ports

        wait_for(lambda: all(map(announced, cluster.nodes)), "every node knows the others' proxies")
        rig = make_rig(proxies[0].url, cluster=True, tls_ca_file=certificate[0])
        rig.wait_up()
        assert rig.store(range(16)).success
        assert rig.load(range(16))[1] == list(range(16))
        assert all(proxy.num_connections for proxy in proxies)
        rig.close()
    finally:
        for proxy in proxies:
            proxy.close()
        cluster.close()


def test_prompts_of_different_salts_never_meet(valkey):
    rig = make_rig(valkey.url)
    rig.wait_up()
    tokens = list(range(64))
    ours, theirs = (chain_keys(tokens, 16, chain_root(NAMESPACE, salt)) for salt in ("tenant a", "tenant b"))
    assert not set(ours) & set(theirs)
    rig.finish(rig.submit(ours, range(4), load=False))

    def answers(keys):
        found = [rig.tier.lookup(key, rig.request) for key in keys]
        return None if LookupResult.RETRY in found else found

    for keys, expected in ((ours, LookupResult.HIT), (theirs, LookupResult.MISS)):
        rig.wait(lambda keys=keys: answers(keys), "the lookups are answered")
        assert answers(keys) == [expected] * 4
    assert not rig.finish(rig.submit(theirs, range(8, 12), load=True)).successful_keys
    rig.close()


class Networks:
    """Two network namespaces and a cable between them; nothing else is on it."""

    def __init__(self):
        self.near, self.far = f"kvt-near-{os.getpid()}", f"kvt-far-{os.getpid()}"
        self.address = "198.18.77.2"
        try:
            for name in (self.near, self.far):
                self._ip("netns", "add", name)
            peer = ("peer", "name", "cable", "netns", self.far)
            self._ip("link", "add", "cable", "netns", self.near, "type", "veth", *peer)
            for name, address in ((self.near, "198.18.77.1"), (self.far, self.address)):
                self.inside(name, "addr", "add", f"{address}/30", "dev", "cable")
                self.inside(name, "link", "set", "cable", "up")
                self.inside(name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise RuntimeError(f"no network namespaces here: {error}") from error

    def inside(self, name, *words):
        self._ip("-n", name, *words)

    def partition(self, cut):
        self.inside(self.far, "link", "set", "cable", "down" if cut else "up")

    def reject(self, on):
        self.inside(self.near, "route", "add" if on else "del", "prohibit", f"{self.address}/32")

    def close(self):
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks():
    need_program("ip")
    need_mounts()
    try:
        made = Networks()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield made
    made.close()


ENGINE = """
import json, sys
from kvtier.abc import TierContext
from kvtier.namespace import Namespace
from kvtier.secondary.resp import RespTierManager
from kvtier.testing.tier_rig import TierRig

rig = TierRig(TierContext(namespace=Namespace({"model": "partition"})))
rig.attach(RespTierManager(rig.spec, rig.arena.view, "resp", url=sys.argv[1], timeout=0.4, connect_timeout=0.4))
rig.tier.start()
for order in sys.stdin:
    state, numbers = order.split()[0], [int(word) for word in order.split()[1:]]
    def reached():
        rig.lookup(99)
        return rig.tier.state.value == state
    rig.wait(reached, state)
    stored = rig.store(numbers).success
    loaded = rig.load(numbers)[1]
    print(json.dumps([rig.tier.state.value, rig.tier.state_reason, stored, loaded]), flush=True)
rig.close()
"""


@pytest.mark.root
def test_a_partition_and_a_rejection_between_networks(networks):
    """The engine in one network, the server in another: packets vanish, later they are refused at once."""
    server = ValkeyServer(host=networks.address, namespace=networks.far, protected_mode="no").start()
    command = ["ip", "netns", "exec", networks.near, sys.executable, "-c", ENGINE, server.url]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())

    def order(state):
        engine.stdin.write(f"{state} 1 2 3\n")
        engine.stdin.flush()
        return json.loads(engine.stdout.readline())

    try:
        assert order("up")[2:] == [True, [1, 2, 3]]
        for cut in (networks.partition, networks.reject):
            cut(True)
            _, reason, stored, loaded = order("down")
            assert (stored, loaded) == (False, [])
            assert reason
            cut(False)
            assert order("up")[2:] == [True, [1, 2, 3]]
    finally:
        engine.stdin.close()
        wait_for(lambda: engine.poll() is not None, "the engine's end")
        engine.stdout.close()
        server.close()


def end_connections(server, user):
    """Let no connection of a user outlive a change of its rights, as an operator would."""
    server.command("CLIENT", "KILL", "USER", user)


def rotate(folder, version, password):
    """Switch the file `password` as Kubernetes switches a secret: by the link of the folder that it lies in."""
    (folder / version).mkdir()
    (folder / version / "password").write_text(password)
    (folder / "next").symlink_to(version)
    (folder / "next").rename(folder / "current")


def test_a_password_that_is_rotated_and_a_user_that_is_locked_out_for_a_while(tmp_path, caplog):
    server = ValkeyServer().start()
    rotate(tmp_path, "v1", "first")
    file = tmp_path / "password"
    file.symlink_to("current/password")
    server.command(
        "ACL", "SETUSER", "kvtier", "on", ">first", "~kvtier:*", "+get", "+set", "+exists", "+unlink", "+ping"
    )
    rig = make_rig(server.url, username="kvtier", password_file=str(file))

    def is_served():
        return rig.tier.state is TierState.UP and rig.load(range(4))[1] == list(range(4))

    try:
        rig.wait_up()
        assert rig.store(range(4)).success
        server.command("ACL", "SETUSER", "kvtier", "resetpass", ">second")
        rotate(tmp_path, "v2", "second")
        end_connections(server, "kvtier")
        rig.wait(is_served, "the new password opens the server")

        server.command("ACL", "SETUSER", "kvtier", "off")
        end_connections(server, "kvtier")
        assert rig.load(range(4))[1] == []
        rig.wait(lambda: rig.tier.state is TierState.DOWN, "the tier is down")
        assert server.name in rig.tier.state_reason
        server.command("ACL", "SETUSER", "kvtier", "on")
        rig.wait(is_served, "the user is let in again")
        rig.assert_each_job_answered_once()
        assert "second" not in caplog.text.replace("seconds", "")
    finally:
        rig.close()
        server.close()
