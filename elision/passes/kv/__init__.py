"""Caches that hold less, and attention that reads less of them.

What a method saves is in the type of the cache, in what the allocator gives, and in the bytes that a step reads. Evictions run on
the clock, at multiples of a number of committed tokens, so that drafts change nothing. See "Compressed caches" in
`elision/passes/README.md`."""
