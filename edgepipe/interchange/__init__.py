"""What leaves edgepipe for other engines: the quantized graph in formats that they read."""
