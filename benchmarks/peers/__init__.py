"""The other ways to run the same Llama, each a driver of an installed package in a file of its own.

What a driver offers (plain, dtensor, fsdp2, huggingface_tp, megatron, megatron_layers, torchtitan, picotron):

    NAME, AXIS               how the table calls it, and the degree that it splits over
    version()                of the installed package; raises ImportError with one line if there is none
    gemm_backend(device)     what multiplies its matrices
    build(shape, degree, device, weights) -> Step
                             the same model with tpformer's weights, on a process group of `degree` ranks that the
                             caller has made; a step takes the same (b, s) tokens and targets on every rank
"""
