"""Servers that tests share: started once a session, when the first test asks for one."""

from server_fixtures import _valkey, _valkey_cluster, valkey, valkey_cluster  # noqa: F401 - found by their names
