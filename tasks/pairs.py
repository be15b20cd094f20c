"""Preference pairs as a task: for each input a chosen text, the `targets`, and one that is `rejected`."""

from collections.abc import Mapping, Sequence

from diffusion_t5x.data.text_files import Patterns
from diffusion_t5x.tasks import local_files, registration
from diffusion_t5x.tasks.readers import Reader


def task(
    name: str,
    files: Mapping[str, Patterns],
    reader: Reader,
    vocabulary_file: str | None,
    inputs: str = "{prompt}",
    chosen: str = "{chosen}",
    rejected: str = "{rejected}",
    held_out: Mapping[str, float] | None = None,
    metric_fns: Sequence[registration.MetricFn] = (),
    inputs_end: bool = True,
) -> str:
    """Registers a SeqIO task over files of pairs and returns its name. Files are read when the task is.

    Args:
      name, files, reader, vocabulary_file, held_out, metric_fns, inputs_end: as in `local_files.task`. Metrics compare
        decoded texts with the chosen ones.
      inputs, chosen, rejected: templates.

    Raises:
      UserError: as `local_files.task`.
    """
    templates = {"inputs": inputs, "targets": chosen, "rejected": rejected}
    source = local_files.source(files, reader, templates, held_out)
    return registration.task(
        name, source, [], vocabulary_file, metric_fns=metric_fns, shuffle_buffer=1, inputs_end=inputs_end,
        has_rejected=True,
    )  # fmt: skip
