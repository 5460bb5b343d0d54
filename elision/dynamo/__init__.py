"""The backend of `torch.compile`: graphs that Dynamo captures run on programs that the frontend raised.

A graph of Dynamo is that of one call: of its lengths, its flags, its way through the model's code. The module that it was
captured from is raised once, for all lengths, by the frontend that `elision.compile` uses; every graph is then bound to that
program by the names of its inputs, and by its values: the first call of a graph runs both, and only a graph whose results the
program reproduces is replaced. Everything else runs as Dynamo captured it, eagerly or through Inductor, and the report says why.

The values of one call prove little, so a graph is taken for a module's forward only if its frame is that forward, to its end, and
asks for nothing but its defaults (`elision.dynamo.call`); later calls look whether weights are still those that were compiled
(`elision.dynamo.weights`, which says what it does not see).
"""

from __future__ import annotations
