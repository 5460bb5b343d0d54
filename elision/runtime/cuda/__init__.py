"""Running on a GPU: machine code from the artefact, launched through the driver; neither a compiler nor triton is needed."""
