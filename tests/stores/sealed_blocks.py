"""Single blocks, sealed; and sealers that pretend to be of another namespace."""

from kvtier.stores.integrity.encrypted_sealer import EncryptedSealer
from kvtier.stores.integrity.header import BlockHeaders, header_checksum
from kvtier.stores.integrity.plain_sealer import PlainSealer


def header_of(sealer, key, payload, slot=0):
    """Return the header of a payload that a plain sealer seals."""
    return sealer.seal([key], [memoryview(payload)], [slot]).headers[0]


def encrypt(sealer, key, payload, slot=0):
    """Return header and stored bytes of a payload."""
    (stored,), (header,) = sealer.seal([key], [memoryview(payload)], [slot])
    return header, bytes(stored)


def plain_impostor(fingerprint, namespace, authenticator=None):
    """Return a sealer whose headers are of the namespace with this fingerprint."""
    sealer = PlainSealer(namespace, authenticator)
    sealer.headers = BlockHeaders(fingerprint)
    return sealer


def encrypting_impostor(fingerprint, cipher):
    """Return a sealer whose headers are of the namespace with this fingerprint."""
    sealer = EncryptedSealer(cipher)
    sealer.headers = BlockHeaders.encrypted(fingerprint)
    return sealer


def resigned(header):
    """Return a header whose own checksum is right again."""
    return header[:120] + header_checksum(header).to_bytes(8, "little")
