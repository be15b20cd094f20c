"""The arguments of verbs that read no gin files."""

from diffusion_t5x.command_line.flags import Parser


def add_report(parser: Parser) -> None:
    """Adds the runs, and what to write."""
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folder that a verb wrote, or a folder of such folders")
    add("--checkpoint", metavar="DIR", help="a MODEL_DIR or a checkpoint: the run it belongs to")
    add("--output", default="report.html", metavar="FILE", help=".html, .md or .svg (default: %(default)s)")
    add("--example", type=int, default=0, metavar="N", help="which traced example an .svg shows, counted from 0")


def add_ar2diff(parser: Parser) -> None:
    """Adds the model, the data, and what is made of them."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="on the Hub, a folder, a GGUF file, a T5X checkpoint or one of ours")
    add("--data", nargs="+", metavar="FILE", help="text: .txt, .md, .jsonl (also gzipped), .parquet; or a pattern")
    add(
        "--prompts",
        nargs="+",
        metavar="FILE",
        help='instead of --data: {"inputs": …, "targets": …} (JSON lines, Parquet)',
    )
    add("--chat", nargs="+", metavar="FILE", help='instead of --data: {"messages": […]} (JSON lines, Parquet)')
    add("--output", required=True, metavar="DIR", help="folder for all output")
    add("--tokens", type=int, metavar="N", help="tokens to train on")
    add("--minutes", type=float, metavar="N", help="instead of --tokens: minutes of training (default: 60)")
    add("--route", metavar="NAME", help="see docs/ar2diff.md (default: shifted; sundae for encoder-decoders)")
    add("--tokenizer", metavar="FILE", help="SentencePiece model of a T5X checkpoint")
    add("--plan", action="store_true", help="import the model, print the plan and stop")


def add_checkpoints(parser: Parser) -> None:
    """Adds the subcommands: `command` is "list", "show", "verify" or "diff"."""
    commands = parser.add_subparsers(required=True, dest="command", metavar="{list,show,verify,diff}")
    add = commands.add_parser("list", help="steps, sizes, dates; which are intact, newest, best")
    add.add_argument("path", metavar="RUN")
    add = commands.add_parser("show", help="arrays, vocabulary, metadata and config")
    add.add_argument("path", metavar="CHECKPOINT")
    add = commands.add_parser("verify", help="read every file and compare checksums")
    add.add_argument("path", metavar="CHECKPOINT|RUN")
    add = commands.add_parser("diff", help="arrays, metadata and config that differ")
    add.add_argument("first", metavar="A")
    add.add_argument("second", metavar="B")


FORMS = ("auto", "causal", "diffusion", "sdar", "a2d-qwen3", "a2d-qwen2", "a2d-llama", "Dream", "llada")


def add_convert(parser: Parser) -> None:
    """Adds the subcommands: `source` is "from_hf", "from_gguf", "to_hf", "push", "from_t5x" or "from_llama2c"."""
    names = "{from_hf,from_gguf,to_hf,push,from_t5x,from_llama2c}"
    sources = parser.add_subparsers(required=True, dest="source", metavar=names)
    from_hf = sources.add_parser("from_hf", help="a model in Hugging Face format")
    where = "a local folder; or ORG/NAME[@REVISION], a model on the Hub, which is downloaded once"
    from_hf.add_argument("path", metavar="MODEL", help=where)
    from_gguf = sources.add_parser("from_gguf", help="a llama.cpp GGUF file, quantized or not")
    from_gguf.add_argument("path", metavar="FILE.gguf")
    for source, keys in ((from_hf, "keys of config.json"), (from_gguf, "metadata keys")):
        source.add_argument(
            "--ignore_keys",
            default=(),
            type=lambda text: text.split(","),
            metavar="KEY,KEY",
            help=f"{keys} to read as if they were absent",
        )
        bits = "quantize the matrices of layers: int8 or nf4 (default: float32)"
        source.add_argument("--frozen_dtype", choices=("int8", "nf4"), metavar="DTYPE", help=bits)
    mask = "id of MASK, for a diffusion model whose files do not name it"
    from_hf.add_argument("--mask_id", type=int, metavar="ID", help=mask)
    blocks = "block size of a block diffusion model, if config.json does not give it"
    from_hf.add_argument("--block_size", type=int, metavar="TOKENS", help=blocks)
    only = "read no weights and write no checkpoint: model.gin for a dry run"
    from_hf.add_argument("--config_only", action="store_true", help=only)
    to_hf = sources.add_parser("to_hf", help="export a model, as what it is now or was imported as")
    to_hf.add_argument("checkpoint", metavar="CHECKPOINT")
    to_hf.add_argument("--like", metavar="DIR", help="what from_hf wrote, if CHECKPOINT is not in it")
    forms = "auto: what the model is (default); causal: the autoregressive model; or sdar, a2d-qwen3, a2d-qwen2, "
    forms += "a2d-llama, Dream, llada; diffusion: the autoregressive layout with MASK and diffusion settings"
    to_hf.add_argument("--as", default="auto", dest="form", choices=FORMS, metavar="FORMAT", help=forms)
    dtypes = "dtype of all tensors: F32, BF16 or F16 (default: the original ones)"
    to_hf.add_argument("--dtype", choices=("F32", "BF16", "F16"), metavar="DTYPE", help=dtypes)
    push = sources.add_parser("push", help="upload what to_hf wrote to the Hugging Face Hub")
    push.add_argument("folder", metavar="DIR", help="a folder that to_hf wrote")
    push.add_argument("name", metavar="ORG/NAME", help="the model on the Hub; created if it does not exist")
    push.add_argument("--public", action="store_true", help="if the model is created, make it public")
    from_t5x = sources.add_parser("from_t5x", help="a T5 1.1 checkpoint of T5X in its own format (before Orbax)")
    add = from_t5x.add_argument
    add("path", metavar="FOLDER")
    add("--tokenizer", required=True, dest="tokenizer_file", metavar="FILE", help="its SentencePiece model")
    add("--activation", default="gelu", choices=("gelu", "silu"), help="activation of the gates (default: gelu)")
    distance = "distance at which the last bucket of the bias begins (default: 128)"
    add("--max_distance", default=128, type=int, metavar="TOKENS", help=distance)
    from_llama2c = sources.add_parser("from_llama2c", help="a checkpoint of llama2.c (export version 0)")
    from_llama2c.add_argument("model_file", metavar="MODEL.bin")
    from_llama2c.add_argument("--tokenizer", required=True, dest="tokenizer_file", metavar="TOKENIZER.bin")
    for source in (from_hf, from_gguf, to_hf, from_t5x, from_llama2c):
        output = "a folder that is empty or does not exist yet"
        source.add_argument("--output", required=True, dest="output_folder", metavar="DIR", help=output)


def add_nothing(parser: Parser) -> None:
    """Adds nothing."""


def add_tasks(parser: Parser) -> None:
    """Adds the word to look for."""
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="only names that contain it")


def add_completion(parser: Parser) -> None:
    """Adds the shell."""
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell")
