"""The other ways to run the same Llama: plain PyTorch, and PyTorch's own tensor parallelism."""
