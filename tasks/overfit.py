"""Eight sentences to overfit: the first test of a new objective, model or decoder.

overfit_prefix_lm        the beginning of each sentence is given, the rest is predicted
overfit_span_corruption  some spans of each sentence are hidden and predicted

Training and validation hold the same eight examples, cut in the same way every time (28 tokens per feature are enough).
A model that cannot reproduce them to the last token has a bug.
"""

import functools
from typing import Any

from diffusion_t5x.evaluation import metrics
from diffusion_t5x.tasks import preprocessors, quickstart, registration

SENTENCES = (
    "Text can be written from left to right, one token after another.",
    "A painter rather sketches everything and goes over it again.",
    "Noise on the canvas turns into words within a few steps.",
    "What is wrong in the first draft is mended in the second.",
    "The reader sees only the last version, never the first one.",
    "Some holes in a sentence can be filled from both of its sides.",
    "Old models learn the new way of writing in a short time.",
    "Whoever repeats these lines exactly has learnt them by heart.",
)


OBJECTIVES: dict[str, registration.Preprocessor] = {
    "prefix_lm": preprocessors.prefix_lm,
    "span_corruption": functools.partial(  # two spans or three in each of these short texts
        preprocessors.span_corruption, noise_density=0.3, mean_noise_span_length=2.0
    ),
}


def _examples(objective: registration.Preprocessor, split: str, shuffle_files: bool, seed: int | None = None):
    """Returns the sentences, cut. A source, unlike a preprocessor, makes the same random choices in every epoch."""
    import seqio
    import tensorflow as tf

    del split, shuffle_files, seed
    sentences = tf.data.Dataset.from_tensor_slices({"targets": list(SENTENCES)})
    tokens = seqio.preprocessors.tokenize(sentences, quickstart.features(), copy_pretokenized=False)
    with seqio.utils.map_seed_manager(0):
        return objective(tokens, {"inputs": 28, "targets": 28}, quickstart.features())


def _task(objective: registration.Preprocessor) -> dict[str, Any]:
    import seqio

    return {
        "source": seqio.FunctionDataSource(functools.partial(_examples, objective), ("train", "validation")),
        "preprocessors": [seqio.preprocessors.append_eos],
        "output_features": quickstart.features(),
        "metric_fns": [metrics.exact_match],
    }


for _name, _objective in OBJECTIVES.items():
    registration.add(f"overfit_{_name}", functools.partial(_task, _objective))
