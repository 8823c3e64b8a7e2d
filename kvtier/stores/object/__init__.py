"""The store of tier type `object`: blocks in packs in S3, GCS or Azure; the names of the packs are the index.

**Packs.** The blocks of one write are one object, a *pack*: sealed values of equal length, one after the other. Its
name says what it contains: `PREFIX/v1/STAMP/NAMESPACE/DIGESTS`. STAMP is the time of writing, the writer and a number;
NAMESPACE is the fingerprint; DIGESTS are up to 64 hashes of keys (XXH3-64, base64url), which fit the 1,024 bytes that
all object stores allow for a name. To delete a block, an empty object is written that names the pack and the block's
place in it. A pack without remaining blocks is deleted.

**Why an index in names.** Keys are hashes, so the blocks of a prompt are spread over any partition of the key space: an
index by key would need one request per block. An index of whole prefixes would not help an engine that holds the first
half of a prefix itself. And any index that must be asked over the network takes tens of milliseconds, too long for a
lookup. So each instance holds the whole index in memory, in 90 to 240 bytes per block, and a lookup makes no request. A
pack and its index entry appear and disappear with one request. A background thread lists the packs of other writers
every `refresh` seconds, in the order of time from where it ended last: one request per 1,000 packs, however many
engines write.

**Deletion.** When the packs of all namespaces under the prefix reach 15/16 of the capacity, an instance deletes the
oldest ones, down to 7/8. Instances that delete at the same time choose the same packs in the same order, and deleting
an absent pack is no error. Each instance spares what its own `keep` was asked for, which the others do not know.
Between two listings, an instance writes at most its share of the free room. So the sum stays below the capacity unless
the number of writers doubles within one `refresh`.

**Two writers of one block** make two packs. The later one counts; the other copy is deleted when it is the oldest.
"""
