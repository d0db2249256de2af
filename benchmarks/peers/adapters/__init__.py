"""One module a peer, and in it one function a mode: from a task to what scores a list of examples.

Lines between ``# user code: MODES`` and ``# end`` are what a user of the peer has to write, and are counted; loading
the model, sorting and padding are shared by all (``benchmarks.peers.task``), and are not, nor are imports.
"""
