"""Blocks in an object store (S3, GCS, Azure), packed, found by an index that is the names of the packs.

**What is stored.** The blocks of one write are one object, a *pack*: sealed values one after the other, all of one
length. Its name says what is in it: `PREFIX/v1/STAMP/NAMESPACE/DIGESTS`, where STAMP is the time of writing, the
writer and a number, NAMESPACE the fingerprint, and DIGESTS eight bytes of XXH3-64 a key, base64url, up to 64 of them,
which fits the 1,024 bytes that all stores allow a name. A block that went bad is taken back by an empty object that
names the pack and the places in it; a pack of which nothing is left is deleted.

**Why the names.** Keys are hashes: the neighbours of a prompt fall into every bucket of any partition of the key
space, so an index by key means a request a block, or a record in every bucket a pack. An index by chain finds nothing
for the engine that holds the first half of a prefix itself. And any index that must be asked answers in tens of
milliseconds, when an engine waits five. So every instance holds the whole index in memory, 90 to 240 bytes a block,
and a lookup is no request at all, hit or miss. A pack and its index entry are one request and appear and vanish
together. What others wrote comes by a background listing in the order of time, from where the last one ended: one
request for up to 1,000 packs, every `refresh` seconds, whatever number of engines writes. Listing is never on the path
of a lookup.

**Who deletes.** Any instance, the oldest packs first, when the packs of all namespaces under the prefix reach 15/16 of
the capacity, down to 7/8. Two that delete at once choose the same victims in the same order, and deleting what is gone
is no error. Between two listings an instance writes at most its share of the free room, so that the sum stays below
the capacity unless the number of writers doubles within one `refresh`.

**Two writers of one block** make two packs; the later name wins, the other copy leaves with its age.
"""
