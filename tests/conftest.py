"""Servers that tests share: started once a session, when the first test asks for one."""

from object_fixtures import _moto, _swift, moto_s3, swift_s3  # noqa: F401 - found by their names
from server_fixtures import _valkey, _valkey_cluster, valkey, valkey_cluster  # noqa: F401 - found by their names
