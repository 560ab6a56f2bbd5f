"""From scheduled PrimFuncs to CUDA source, PTX, and a host program on the CUDA driver API."""
