"""Servers that tests share: started once a session, when the first test asks for one."""

from object_fixtures import (  # noqa: F401 - found by their names
    _azurite,
    _moto,
    _swift,
    azure,
    moto_s3,
    swift_s3,
)
from server_fixtures import _valkey, _valkey_cluster, valkey, valkey_cluster  # noqa: F401 - found by their names
