"""What the compilers of TPUs and GPUs say of the programs, on machines that have neither."""
