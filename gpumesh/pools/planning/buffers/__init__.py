"""The size of llama.cpp's compute buffers: a model of its graph of operations, and of where ggml puts their results."""
