"""Readers of published data sets: raw files -> ``Sample``; one file per data-set family.

A reader is a frozen dataclass of options with two methods (``base.Source``): ``shards()`` names units of work
that can be read in any order and in parallel, ``read(shard)`` yields one ``Sample`` or one ``Skipped`` for
every record, so that kept + dropped = read. Both are deterministic. A reader opens nothing but regular files
under the folders that its options name, never unpacks an archive, and leaves images as the bytes it found:
whether they decode is asked later.

A new family is one module and one row in ``registry.SOURCES``.
"""
