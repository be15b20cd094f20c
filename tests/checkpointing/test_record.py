"""A checkpoint's record of its training, and the uses of it that are refused."""

import dataclasses
import json

import pytest
import tiny

from diffusion_t5x.checkpointing.record import Record, describe, in_words
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.beam_search import BeamSearchDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.drafts import DraftingDecoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.resizing import ResizingDecoder
from diffusion_t5x.decoding.self_speculation import SelfSpeculationDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import OtherModel, UserError
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.distillation import Distillation
from diffusion_t5x.objectives.joint import Joint
from diffusion_t5x.objectives.joint_drafts import JointDrafts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.resizing import Resizing
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.training.agreement import Agreement
from diffusion_t5x.training.lora import Lora

UNIFORM = Block(4, noise="uniform", weighting="uniform")
UNIFORM_DECODER = BlockDecoder(4, SundaeDecoder(num_steps=4, num_samples=1))
SETTING = "infer.infer.allow_mismatch"
FORCE = r"\(To do it anyway: --gin\.infer\.infer\.allow_mismatch=True\.\)$"


def agreement(objective, model=tiny.RELATIVE, allowed=False, **more):
    """The agreement of a checkpoint whose record was written and read again."""
    written = Record.of(model, tiny.VOCABULARY.describe(), objective, **more).metadata()
    return Agreement("DIR", Record.read(json.loads(json.dumps(written)), "DIR"), SETTING, allowed)


@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's objective, which declares nothing."""

    strength: float = 0.5


def test_a_record_is_read_as_it_was_written():
    lora = Lora(rank=2).describe()
    more = {"lora": lora, "dataset": {"task_feature_lengths": {"targets": 3}}, "inputs_end": True}
    record = Record.of(tiny.RELATIVE, tiny.VOCABULARY.describe(), Joint(Masked()), **more)
    again = Record.read(json.loads(json.dumps(record.metadata())), "DIR")
    assert again == record and again.modes == (Mode("bidirectional", None, "mask"), Mode("causal"))
    assert again.decoder == describe(MaskedDecoder()) and again.versions["jax"] and again.trained_by == "Joint"
    assert in_words(again.decoder) == repr(MaskedDecoder()).replace("()", "[]")  # JSON has no tuples
    nested = describe(BlockDecoder(3))
    assert in_words(nested) == repr(BlockDecoder(3)).replace("()", "[]") and nested["inner"]["class"].endswith(
        ".masked.MaskedDecoder"
    )


@pytest.mark.parametrize(
    "record", [{}, {"modes": [{"attention": "causal", "odd": 1}]}, {"modes": 3}, [], {"modes": []}]
)
def test_a_damaged_record_is_a_message(record):
    with pytest.raises(UserError, match="DIR: the record of its training is damaged"):
        Record.read({"record": record}, "DIR")


@pytest.mark.parametrize(
    ("objective", "decoders", "expected"),
    [
        (Autoregressive(), [], AutoregressiveDecoder()),
        (Autoregressive(prefix=True), [], AutoregressiveDecoder(prefix=True)),
        (Autoregressive(), [BeamSearchDecoder(num_beams=2)], BeamSearchDecoder(num_beams=2)),
        (Sundae(), [SundaeDecoder(num_steps=3)], SundaeDecoder(num_steps=3)),
        (Sundae(), [MaskedDecoder()], SundaeDecoder()),
        (Block(8), [], BlockDecoder(8)),
        (UNIFORM, [], UNIFORM_DECODER),
        (Distillation(block_size=2), [], BlockDecoder(2)),
        (Joint(Block(4)), [SelfSpeculationDecoder(BlockDecoder(4))], SelfSpeculationDecoder(BlockDecoder(4))),
        (Mine(), [], None),
        (Mine(), [SundaeDecoder()], SundaeDecoder()),
    ],
)
def test_the_decoder_is_the_evaluation_s_or_the_objective_s(objective, decoders, expected):
    assert Record.of(tiny.RELATIVE, {}, objective, decoders).decoder == describe(expected)


@pytest.mark.parametrize(
    ("objective", "user"),
    [
        (Autoregressive(), AutoregressiveDecoder()),
        (Autoregressive(prefix=True), BeamSearchDecoder(prefix=True)),
        (Sundae(), SundaeDecoder()),
        (Masked(), MaskedDecoder()),
        (Resizing(), MaskedDecoder()),
        (Resizing(), ResizingDecoder()),
        (Block(8), BlockDecoder(8)),
        (Block(8, stages=((0, 2), (5, 8))), BlockDecoder(8)),
        (Distillation(block_size=8), BlockDecoder(8)),
        (UNIFORM, UNIFORM_DECODER),
        (Joint(Masked()), MaskedDecoder()),
        (Joint(Masked()), AutoregressiveDecoder()),
        (Joint(Block(4)), SelfSpeculationDecoder(BlockDecoder(4))),
        (Joint(Masked()), Autoregressive()),
        (JointDrafts(8), DraftingDecoder(8)),
        (JointDrafts(8), DraftingDecoder(4)),
        (JointDrafts(8), AutoregressiveDecoder()),
        (Joint(Masked()), Masked(schedule="cosine")),
        (Mine(), MaskedDecoder()),
        (Masked(), Mine()),
        (Masked(), None),
    ],
)
def test_uses_that_a_model_was_trained_for(objective, user):
    agreement(objective).check(tiny.RELATIVE, [user])


@pytest.mark.parametrize(
    ("objective", "user", "remedy"),
    [
        (Masked(), AutoregressiveDecoder(), r"Give --gin_file=decoding/masked\.gin\."),
        (Sundae(), AutoregressiveDecoder(), r"Give --gin_file=decoding/sundae\.gin\."),
        (Sundae(), MaskedDecoder(), r"Give --gin_file=decoding/sundae\.gin\."),
        (Masked(), SundaeDecoder(), r"Give --gin_file=decoding/masked\.gin\."),
        (Resizing(), AutoregressiveDecoder(), r"Give --gin_file=decoding/resizing\.gin\."),
        (Masked(), ResizingDecoder(), r"is for holes of unknown length.*Give --gin_file=decoding/masked\.gin\."),
        (Autoregressive(), MaskedDecoder(), r"Give --gin_file=decoding/autoregressive\.gin\."),
        (Autoregressive(), SundaeDecoder(), r"Give --gin_file=decoding/autoregressive\.gin\."),
        (Autoregressive(), BlockDecoder(4), r"Give --gin_file=decoding/autoregressive\.gin\."),
        (Autoregressive(prefix=True), MaskedDecoder(), r"gin --gin\.AutoregressiveDecoder\.prefix=True\."),
        (Autoregressive(prefix=True), AutoregressiveDecoder(), r"Set --gin\.AutoregressiveDecoder\.prefix=True\."),
        (Autoregressive(), BeamSearchDecoder(prefix=True), r"Set --gin\.BeamSearchDecoder\.prefix=False\."),
        (JointDrafts(4), DraftingDecoder(8), r"Set --gin\.BLOCK_SIZE=4\."),
        (Block(4), BlockDecoder(8), r"Set --gin\.BLOCK_SIZE=4\."),
        (Block(8), BlockDecoder(4), r"Set --gin\.BLOCK_SIZE=8\."),
        (Block(4), UNIFORM_DECODER, r"Give --gin_file=decoding/block\.gin --gin\.BLOCK_SIZE=4\."),
        (UNIFORM, BlockDecoder(4), r"Give --gin_file=decoding/block_uniform\.gin --gin\.BLOCK_SIZE=4\."),
        (Block(4), MaskedDecoder(), r"Give --gin_file=decoding/block\.gin --gin\.BLOCK_SIZE=4\."),
        (Masked(), BlockDecoder(4), r"Give --gin_file=decoding/masked\.gin\."),
        (
            Block(4),
            SelfSpeculationDecoder(BlockDecoder(4)),
            r"Give --gin_file=decoding/block\.gin --gin\.BLOCK_SIZE=4\.",
        ),
        (Distillation(block_size=2), AutoregressiveDecoder(), r"decoding/block\.gin --gin\.BLOCK_SIZE=2\."),
        (Sundae(), Masked(), r"Give --gin_file=objectives/sundae\.gin\."),
        (Masked(), Autoregressive(), r"Give --gin_file=objectives/masked\.gin\."),
        (Autoregressive(prefix=True), Autoregressive(), r"Set --gin\.Autoregressive\.prefix=True\."),
    ],
)
def test_uses_that_it_was_not_trained_for(objective, user, remedy, caplog):
    with pytest.raises(UserError, match=rf"^DIR: the model is trained for [^\n]+{remedy} {FORCE}"):
        agreement(objective).check(tiny.RELATIVE, [None, user])
    agreement(objective, allowed=True).check(tiny.RELATIVE, [user])


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (tiny.RELATIVE, {"activation": "silu"}),
        (tiny.RELATIVE, {"attention_scale": 0.5}),
        (tiny.RELATIVE, {"logits_scale": 1.0}),
        (tiny.RELATIVE, {"relative_max_distance": 64}),
        (tiny.RELATIVE, {"causal_buckets": True}),
        (tiny.RELATIVE, {"norm_epsilon": 1e-5}),
        (tiny.RELATIVE, {"embedding_scale": 4.0}),
        (tiny.RELATIVE, {"attention_softcap": 50.0}),
        (tiny.RELATIVE, {"logits_softcap": 30.0}),
        (tiny.RELATIVE, {"norm_offset": True}),
        (tiny.RELATIVE, {"local_layers": (True, False), "window": 4}),
        (tiny.ROTARY, {"rotary_base": 500_000.0}),
        (tiny.ROTARY, {"rotary_factor": 2.0}),
        (tiny.ENCODER_DECODER, {"activation": "silu"}),
    ],
)
def test_another_function_of_the_same_parameters(model, changed):
    other = dataclasses.replace(model, **changed)
    for trained, now in ((model, other), (other, model)):
        use = agreement(Autoregressive(), trained)
        for check in (use.check, lambda m, use=use: use.check_resumed(m, Autoregressive(), None), use.check_model):
            with pytest.raises(OtherModel, match=rf"model has ModelConfig\.{next(iter(changed))} = .*{FORCE}"):
                check(now)
        dataclasses.replace(use, allowed=True).check(now)


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (tiny.RELATIVE, {"dropout_rate": 0.1, "dtype": "bfloat16", "scan_unroll": True, "remat": "full"}),
        (tiny.RELATIVE, {"attention_backend": "xla", "max_length": 99, "vocab_size": 64}),
        (tiny.RELATIVE, {"rotary_base": 1.0, "window": 3, "num_kv_heads": 4, "logits_scale": 0.25}),
        (tiny.ROTARY, {"relative_buckets": 64, "causal_buckets": True, "rotary_stretched": (4.0, 8.0)}),
        (tiny.RELATIVE, {"local_layers": (False, False), "window": 3, "local_rotary_base": 9.0}),
    ],
)
def test_the_same_function(model, changed):
    agreement(Autoregressive(), model).check(dataclasses.replace(model, **changed))


def test_a_model_of_another_size_is_one_line():
    with pytest.raises(OtherModel) as error:
        agreement(Autoregressive(), tiny.ROTARY).check(dataclasses.replace(tiny.ROTARY, embed_dim=8, num_heads=2))
    assert str(error.value) == (
        "DIR: The checkpoint's model has ModelConfig.embed_dim = 16 (here 8), num_heads = 4 (here 2). Set the same."
    )
    assert error.value.settings["embed_dim"] == 16


def test_what_is_not_known_is_not_compared():
    for metadata in ({"vocabulary": {}}, {"config": "A = 1\n"}, {"config": "train.train.objective = @mine.Mine()\n"}):
        unknown = Record.read(metadata, "DIR")
        assert unknown.modes == () and unknown.decoder is None and unknown.objective is None
        use = Agreement("DIR", unknown, SETTING)
        use.check(tiny.RELATIVE, [MaskedDecoder(), Sundae()])
        use.check_resumed(tiny.RELATIVE, Sundae(), None)


@pytest.mark.parametrize("trained", [False, True])
def test_a_shifted_model_is_read_shifted(trained):
    models = {shifted: dataclasses.replace(tiny.RELATIVE, shifted=shifted) for shifted in (False, True)}
    for objective, user in ((Masked(), MaskedDecoder()), (Block(4), BlockDecoder(4)), (Mine(), SundaeDecoder())):
        use = agreement(objective, models[trained])
        use.check(models[trained], [user])
        with pytest.raises(
            UserError, match=rf"trained with ModelConfig\.shifted = {trained}; here it is {not trained}"
        ):
            use.check(models[not trained], [user])
    both = agreement(Joint(Masked()), models[trained])
    both.check(models[not trained], [AutoregressiveDecoder(), BeamSearchDecoder(), Autoregressive(), None])
    agreement(Autoregressive(), models[trained]).check_initial(models[not trained], Masked())
    with pytest.raises(UserError, match="shifted"):
        both.check_initial(models[not trained], Masked())


@pytest.mark.parametrize(
    ("trained", "now"),
    [
        (Sundae(), Masked()),
        (Masked(), Joint(Masked())),
        (Block(4), Block(8)),
        (Block(4), Distillation(block_size=4)),
        (Autoregressive(), Autoregressive(prefix=True)),
        (Autoregressive(), Mine()),
    ],
)
def test_a_run_goes_on_by_its_objective_and_a_new_one_may_start_by_another(trained, now):
    use = agreement(trained)
    with pytest.raises(UserError, match=rf"^DIR was trained by {type(trained).__name__} .*INITIAL_CHECKPOINT_PATH=DIR"):
        use.check_resumed(tiny.RELATIVE, now, None)
    use.check_initial(tiny.RELATIVE, now)
    dataclasses.replace(use, allowed=True).check_resumed(tiny.RELATIVE, now, None)


def test_harmless_settings_of_an_objective_may_change_on_the_way():
    agreement(Masked()).check_resumed(tiny.RELATIVE, Masked(weighting="uniform", anneal_steps=3), None)
    agreement(Block(4)).check_resumed(tiny.RELATIVE, Block(4, stages=((0, 1), (9, 4))), None)
    with pytest.raises(UserError, match=r"was trained with train\.lora = None, but here it is {'rank': 2"):
        agreement(Masked()).check_resumed(tiny.RELATIVE, Masked(), Lora(rank=2))
