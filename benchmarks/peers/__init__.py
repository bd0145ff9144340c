"""How peers compute, re-created from public calls of torch, transformers, peft and numpy.

None of this is anybody's code: the released CoCoA code does not run (a syntax error, missing
classes), so its manner is written down again from what can be read. Each function says whose.
"""
