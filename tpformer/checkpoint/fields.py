"""Reading a config.json to its last field: what is not understood might change the numbers, and is said."""

import math
from typing import Any

from tpformer.layers.rope import RopeScaling

# what transformers writes into any config.json, and what has no part in a forward pass
_HARMLESS = frozenset(
    """
    architectures attention_implementation attn_implementation bos_token_id eos_token_id pad_token_id sep_token_id
    cls_token_id decoder_start_token_id dtype torch_dtype finetuning_task id2label label2id problem_type prefix
    is_decoder is_encoder_decoder output_attentions output_hidden_states output_scores pretraining_tp return_dict
    return_dict_in_generate task_specific_params tokenizer_class torchscript transformers_version transformers.js_config
    use_bfloat16 use_cache use_return_dict tf_legacy_loss gradient_checkpointing chunk_size_feed_forward
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_past remove_invalid_values
    repetition_penalty suppress_tokens temperature top_k top_p typical_p
    unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905
)
_REQUIRED = object()


class Fields:
    """The fields of a config.json; each is taken once, `check()` complains of what is wrong and what is left.

    A family takes what it knows, with the value that transformers gives to a missing field.
    """

    def __init__(self, table: dict[str, Any]):
        self._left = {name: value for name, value in table.items() if name[:1] != "_" and name not in _HARMLESS}
        self.problems: list[str] = []

    def take(self, name: str, default: Any = _REQUIRED, kind: type = int, *, null: bool = False) -> Any:
        """A field of this type; a wrong or missing one is noted, and the default given.

        null: it may be null, which is None, as it may be anyway where that is the default.
        """
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            self.problems.append(f"{name} is missing")
            return 1
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind or (value is None and (null or default is None)):
            return value
        self.problems.append(f"{name} ({value!r}) must be of type {kind.__name__}")
        return 1 if default is _REQUIRED else default

    def choose(self, name: str, choices: dict[Any, Any], default: Any) -> Any:
        """What the choices make of a field's value; any other value is not supported."""
        value = self._left.pop(name, default)
        if not isinstance(value, list | dict) and value in choices:
            return choices[value]
        self.problems.append(f"{name} ({value!r}) is not supported, only {', '.join(map(repr, choices))}")
        return choices[default]

    def expect(self, name: str, value: Any) -> None:
        """A field that must have this one value, or be missing."""
        found = self._left.pop(name, value)
        if found != value:
            self.problems.append(f"{name} ({found!r}) is not supported, only {value!r}")

    def ignore(self, *names: str) -> None:
        """Fields of this family that do not change the model."""
        for name in names:
            self._left.pop(name, None)

    def part(self, *names: str) -> "Fields":
        """The object in the first of these fields that there is, as fields whose problems are noted here."""
        table: Any = {}
        for name in reversed(names):
            table = self._left.pop(name, None) or table
        if not isinstance(table, dict):
            self.problems.append(f"{names[0]} ({table!r}) must be an object")
            table = {}
        inner = Fields({})
        inner._left, inner.problems = dict(table), self.problems
        return inner

    def check(self, where: str = "") -> None:
        """Note every field that nobody took."""
        self.problems += [f"{where}{name} ({value!s:.60}) is not known" for name, value in self._left.items()]


def read_rope(fields: Fields, max_seq_len: int) -> tuple[float, RopeScaling]:
    """theta and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    theta = fields.take("rope_theta", 10000.0, float)
    fields.expect("partial_rotary_factor", 1.0)
    rope = fields.part("rope_scaling", "rope_parameters")
    theta = rope.take("rope_theta", theta, float)
    rope.expect("partial_rotary_factor", 1.0)
    older = rope.take("type", "default", str)
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    kind = rope.choose("rope_type", kinds, older if older in kinds else "default")
    if older not in kinds:
        fields.problems.append(f"rope type ({older!r}) is not supported, only {', '.join(kinds)}")
    values: dict[str, Any] = {}
    if kind != "none":
        values["factor"] = rope.take("factor", kind=float)
    if kind in ("llama3", "yarn"):
        values["original_max_seq_len"] = rope.take("original_max_position_embeddings", max_seq_len)
    if kind == "llama3":
        values |= {name: rope.take(name, kind=float) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values |= _read_yarn(rope, values["factor"])
    rope.check("rope: ")
    if fields.problems:
        return theta, RopeScaling()
    return theta, RopeScaling(kind, **values)


def _read_yarn(rope: Fields, factor: float) -> dict[str, Any]:
    values = {
        "beta_fast": rope.take("beta_fast", None, float) or 32.0,
        "beta_slow": rope.take("beta_slow", None, float) or 1.0,
        "attention_factor": rope.take("attention_factor", None, float),
    }
    rope.expect("truncate", True)
    numerator, denominator = rope.take("mscale", None, float), rope.take("mscale_all_dim", None, float)
    if values["attention_factor"] is None and numerator and denominator:
        more = 0.1 * math.log(max(factor, 1.0))
        values["attention_factor"] = (more * numerator + 1) / (more * denominator + 1)
    return values


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """The fields by which any version of transformers knows it."""
    if scaling.kind == "none":
        return {"rope_theta": theta}
    table: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = scaling.original_max_seq_len
    extra = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "attention_factor")}
    values = {name: getattr(scaling, name) for name in extra.get(scaling.kind, ())}
    table |= {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": table}
