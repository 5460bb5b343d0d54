"""Drafts: from tables, which read tokens that are there already and cost no forward pass, and grown by models (`growth`,
`model`).

A drafter proposes a tree for one row (`proposal`); how often its guesses of each kind come true is counted as it runs (`rates`);
several drafters' trees are merged and cut to the size that pays on this machine (`policy`), for the run of a batch (`run`).
"""
