"""What a person sees in a notebook: the magics, the panel, and latency plotted live.

It draws what the library knows and holds no numbers of its own; it knows nothing of torch.
"""
