"""SeqIO tasks and mixtures, one module per family."""

from diffusion_t5x.data.seqio_source import libraries

libraries()  # before a task's module imports TensorFlow in its own, noisier way
