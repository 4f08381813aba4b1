"""The front door: ``SpeculativeGenerator``, a drop-in for ``model.generate()``.

Everything ``generate()`` prepares (inputs, positions, caches, processors, criteria, encoder) is prepared by the
target's own ``generate()``, entered through its public door ``custom_generate``; our loop runs behind it. What
that door would drop in silence is closed over here; what we do not honour is refused by name in
``options.py``. Models, configs and the user's objects stay as they were. Read next: ``options.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.call import Request, run_call
from specdec.layouts.compiled import compiled_steps
from specdec.length import DraftLength
from specdec.length.adaptive import ASSUMED_COST, Adaptive, Memory
from specdec.length.cost import Assumed
from specdec.length.fixed import Fixed
from specdec.options import (
    SELF,
    WORDS,
    build_proposer,
    check_compile,
    check_constructor,
    check_options,
    check_prompt,
    check_seed,
    check_tenant,
    with_stop_strings,
)
from specdec.proposers.fallback import Fallback
from specdec.proposers.prediction import Prediction, read_predictions
from specdec.records import Stats
from specdec.sampling import Sampling, sampling_for


class SpeculativeGenerator:
    """Generates with ``target``, faster, and with exactly its output distribution.

    Args:
        target: a Hugging Face model with ``generate()``.
        draft: what guesses: a smaller model, a ``Proposer``, a word for a draft without a model ("ngram",
            "suffix", "recycling"), "self-int4" or "self-int8" (the target's own weights with fewer bits), or
            None (plain decoding through the same loop).
        num_draft_tokens: guesses a round and row: "auto" (default) chooses for every round, 0 included, what is
            fastest by what rounds have cost and how many guesses were kept; a whole number >= 0 is taken as it
            is, and 0 is plain decoding.
        verification: "block" (default, keeps most), "token", or "coupled" (the text is a function of target,
            seed and prompt alone, whatever the draft, its length or the batch).
        seed: for sampling; None draws one from torch's global generator at every sampling call.
        layout: how a ragged batch keeps its keys and values; "auto" chooses, the rest is for tests.
        compile: run the steps of target and draft model as graphs (torch.compile), and as CUDA graphs on a GPU.
            Takes a minute or so at the first rounds; worth it for many calls of similar length and batch.
        tokenizer, draft_tokenizer: when both are given, the pair is judged by them instead of by the sizes
            of the vocabularies, and where they differ guesses are translated (``TranslatedDraft``);
            ``tokenizer`` also serves ``stop_strings``.

    Attributes:
        stats: what the last call of ``generate()`` did, a ``Stats``.

    Raises:
        VocabularyMismatch: draft and target do not share their token ids, and their tokenizers are not given.
        InvalidInput: an argument that does not exist or is out of range.

    Example:
        >>> gen = SpeculativeGenerator(target, draft)                     # doctest: +SKIP
        >>> out = gen.generate(**tokenizer("Hello", return_tensors="pt"))  # doctest: +SKIP
    """

    def __init__(
        self,
        target: Any,
        draft: Any = None,
        *,
        num_draft_tokens: int | str = "auto",
        verification: str = "block",
        seed: int | None = None,
        layout: str = "auto",
        compile: bool = False,
        tokenizer: Any = None,
        draft_tokenizer: Any = None,
    ) -> None:
        check_constructor(target, num_draft_tokens, verification, layout)
        check_compile(compile, num_draft_tokens, layout)
        self.target = target
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self.verification = verification
        self.seed = seed
        self.layout = layout
        self.compile = compile
        self.tokenizer = tokenizer
        self.stats = Stats()
        self._proposer = build_proposer(target, draft, tokenizer, draft_tokenizer, compile)
        self._memory = Memory()
        self._steps = compiled_steps(target) if compile else None

    @classmethod
    def from_pretrained(
        cls, target_id: str, draft_id: str | None = None, *, options: dict[str, Any] | None = None,
        **load_kwargs: Any,
    ) -> SpeculativeGenerator:  # fmt: skip
        """Load target, draft and their tokenizers by hub id or path, safetensors only.

        Args:
            target_id: the target.
            draft_id: the draft; None and the words of ``draft`` ("ngram", ...) are taken as they are.
            options: keyword arguments of the constructor.
            load_kwargs: for ``from_pretrained`` of both models (dtype, device_map, ...).
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        load_kwargs.setdefault("use_safetensors", True)
        options = dict(options or {})
        target = AutoModelForCausalLM.from_pretrained(target_id, **load_kwargs)
        options.setdefault("tokenizer", AutoTokenizer.from_pretrained(target_id))
        draft: Any = draft_id
        if draft_id is not None and draft_id not in (*WORDS, *SELF):
            draft = AutoModelForCausalLM.from_pretrained(draft_id, **load_kwargs)
            options.setdefault("draft_tokenizer", AutoTokenizer.from_pretrained(draft_id))
        return cls(target, draft, **options)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        custom_generate: Any = None,
        *,
        seed: int | list[int] | None = None,
        tokenizer: Any = None,
        prediction: Any = None,
        tenant: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What ``target.generate()`` does, with the same arguments and return types.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
            streamer, negative_prompt_ids, negative_prompt_attention_mask, kwargs: as for
                ``target.generate()``.
            synced_gpus, assistant_model, custom_generate: refused unless None (or False).
            seed: overrides the constructor's; with verification="coupled" also one seed a row.
            tokenizer: for ``stop_strings`` and ``prediction``; overrides the constructor's.
            prediction: what the text will probably be, for each row: a text, token ids, or None. It is
                guessed from where it fits, and the draft guesses elsewhere; the output's law stays as it is.
                ``stats.prediction_accepted`` and ``prediction_rejected`` count its tokens.
            tenant: whose text this is, one or one a row, for a draft with a ``Store``.

        Returns:
            (B, L) ids, or the output class of ``generate()`` with ``return_dict_in_generate=True``, which
            then also has ``.speculation``, the call's ``Stats``. After a row has ended its scores are zeros.

        Raises:
            UnsupportedOption: an option that is not honoured, named.
            InvalidInput: a prompt that cannot be used as given.
        """
        start = perf_counter()
        given = {
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "custom_generate": custom_generate,
        }
        check_options(self.target, generation_config, {**given, **kwargs})
        check_prompt(self.target, generation_config, inputs, kwargs)
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        stats = self.stats = Stats()

        seed = check_seed(self.seed if seed is None else seed)
        request = Request(
            proposer=self._proposer_for(prediction, tokenizer),
            length=self._length(seed),
            sampling=self._sampling,
            layout=self.layout,
            seed=seed,
            streamer=streamer,
            inputs=_model_inputs(self.target, inputs, kwargs),
            steps=self._steps,
            stats=stats,
            tenants=check_tenant(tenant),
        )

        @torch.no_grad()
        def run(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            out = run_call(request, model, input_ids, **prepared)
            stats.seconds = perf_counter() - start
            return out

        with with_stop_strings(self.target, generation_config, stopping_criteria, tokenizer, kwargs) as (
            generation_config,
            stopping_criteria,
            options,
        ):
            return self.target.generate(
                *([] if inputs is None else [inputs]),
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                negative_prompt_ids=negative_prompt_ids,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                custom_generate=run,
                **options,
            )

    def _length(self, seed: Any) -> Callable[[int, bool], DraftLength]:
        """The rule of draft lengths, from (batch, do_sample)."""
        most = self.num_draft_tokens
        if isinstance(most, int):
            return lambda *_: Fixed(most)

        def rule(batch: int, do_sample: bool) -> DraftLength:
            # by rejection the text depends on the number of guesses, and a given seed promises one text
            promised = do_sample and seed is not None and self.verification != "coupled"
            return Adaptive(Assumed(ASSUMED_COST)) if promised else self._memory.recall(batch, do_sample)

        return rule

    def _proposer_for(self, prediction: Any, tokenizer: Any) -> Any:
        """The call's proposer: what the user expects comes before what the draft guesses."""
        if prediction is None:
            return self._proposer
        pad_id = getattr(tokenizer, "pad_token_id", None)
        if pad_id is None:
            pad_id = self.target.generation_config.pad_token_id
        return Fallback(Prediction(read_predictions(prediction, tokenizer, pad_id)), self._proposer)

    def _sampling(
        self,
        do_sample: bool,
        seed: int | list[int] | None,
        device: torch.device,
        prompts: Callable[[], list[list[int]]],
    ) -> Sampling:
        """The way to draw in one call."""
        return sampling_for(self.verification, do_sample, seed, device, prompts)


def _model_inputs(target: Any, inputs: Tensor | None, given: dict[str, Any]) -> dict[str, Any]:
    """The user's model inputs beside the decoder's ids, for a draft that prepares its own."""
    fields = vars(target.generation_config)
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.ndim and n not in fields}
    if not target.config.is_encoder_decoder:
        tensors.pop("input_ids", None)
    elif inputs is not None:
        tensors[target.main_input_name] = inputs
    return tensors
