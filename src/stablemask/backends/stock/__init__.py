"""Stock kernels: what differs between them, masks in tiles, and the operators that add the sink."""
