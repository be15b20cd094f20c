import functools

import seqio
from t5.data.preprocessors import parse_tsv

from diffusion_t5x.evaluation import metrics

vocabulary = seqio.ByteVocabulary()  # or seqio.SentencePieceVocabulary("my.model", extra_ids=100)
seqio.TaskRegistry.add(
    "my_task",
    source=seqio.TextLineDataSource({"train": "my_data/train.tsv", "validation": "my_data/validation.tsv"}),
    preprocessors=[
        functools.partial(parse_tsv, field_names=["inputs", "targets"]),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={"inputs": seqio.Feature(vocabulary), "targets": seqio.Feature(vocabulary)},
    metric_fns=[metrics.bleu, metrics.exact_match],
)
