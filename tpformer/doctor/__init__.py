"""What a run stands on, and what of it is known to be bad: the command `tpformer doctor`."""
