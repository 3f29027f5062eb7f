"""Readers of published data sets, from raw files to ``Sample``; one file per data-set family.

A reader is a frozen dataclass of options with two methods (``base.Source``). ``shards()`` returns units of work that
can be read in any order and in parallel. ``read(shard)`` yields one ``Sample`` or one ``Skipped`` for every record, so
that kept + dropped = read. Both are deterministic. A reader opens only regular files under the folders that its options
name. It never unpacks an archive. It returns images as encoded bytes and does not check whether they can be decoded; a
later stage does.

A new family is one module and one row in ``registry.SOURCES``.
"""
