"""The front door: ``SpeculativeGenerator``, a drop-in for ``model.generate()``.

Everything ``generate()`` prepares (inputs, positions, caches, processors, criteria, encoder) is prepared by the
target's own ``generate()``, entered through its public door ``custom_generate``; our loop runs behind it. What
that door would drop in silence is closed over here; what we do not honour is refused by name in
``options.py``. Models, configs and the user's objects stay as they were. Read next: ``construction.py``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from time import perf_counter
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationMixin

from specdec.abroad import home_of, taken_abroad
from specdec.ahead import resumed
from specdec.assistance import Assistance, first_given, read_assistance
from specdec.attaching import attached, healing_with, own_settings
from specdec.call import Request, follow_call, run_call
from specdec.construction import NAMES, build_proposer, check_compile, check_constructor, check_seed
from specdec.errors import InvalidInput, UnsupportedOption
from specdec.layouts.compiled import compiled_steps
from specdec.length import DraftLength
from specdec.length.adaptive import ASSUMED_COST, Adaptive, Memory
from specdec.length.cost import Assumed
from specdec.length.fixed import Fixed
from specdec.options import check_options, check_prompt, check_tenant, with_stop_strings
from specdec.proposers.fallback import Fallback
from specdec.proposers.layers import EarlyExit
from specdec.proposers.prediction import Prediction, read_predictions
from specdec.records import Stats
from specdec.sampling import sampling_for
from specdec.shaping import Chunk, ShapedRelease, shaped
from specdec.streaming import Tokens, in_threads, told
from specdec.weights.adapters import inner_model, needs_its_wrapper

# arguments of the constructor, each an attribute that stays as it is
SETTINGS = (
    "target", "draft", "num_draft_tokens", "verification", "seed", "layout", "compile", "tokenizer",
    "draft_tokenizer",
)  # fmt: skip

# where files come from, for tokenizers as for models
HUB = ("revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder", "force_download")


@dataclass(frozen=True)
class _Drafting:
    """What guesses in a call, how many a round, and what was learnt of it."""

    proposer: Any
    number: int | str
    memory: Memory


class SpeculativeGenerator:
    """Generates with ``target``, faster, and with exactly its output distribution.

    Args:
        target: a Hugging Face model with ``generate()``.
        draft: what guesses: a smaller model, a ``Proposer``, "auto" or another word for a draft without a model
            ("ngram", "suffix", "recycling"), "self-int4" or "self-int8" (the target's own weights with fewer bits),
            a list of such, one behind another, or None (plain decoding through the same loop).
        num_draft_tokens: guesses a round and row: "auto" (default) chooses for every round, 0 included, what is
            fastest by what rounds have cost and how many guesses were kept; a whole number >= 0 is taken as it
            is, and 0 is plain decoding.
        verification: "block" (default, keeps most), "token", or "coupled" (the text is a function of target,
            seed and prompt alone, whatever the draft, its length or the batch).
        seed: for sampling; None draws one from torch's global generator at every sampling call.
        layout: how a ragged batch keeps its keys and values; "auto" chooses, the rest is for tests and is refused
            where it would not be exact.
        compile: run the steps of target and draft model as graphs (torch.compile), and as CUDA graphs on a GPU.
            Takes a minute or so at the first rounds; worth it for many calls of similar length and batch.
        tokenizer, draft_tokenizer: when both are given, the pair is judged by them instead of by the sizes
            of the vocabularies, and where they differ guesses are translated (``TranslatedDraft``);
            ``tokenizer`` also serves ``stop_strings``.

    Attributes:
        stats: what the last call of ``generate()`` did, a ``Stats``; of one that broke off, until then.

    Raises:
        VocabularyMismatch: draft and target do not share their token ids, and their tokenizers are not given.
        UnsupportedModel: target or draft cannot play the part.
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
        num_draft_tokens = check_constructor(
            target, num_draft_tokens, verification, layout, tokenizer, draft_tokenizer
        )
        check_compile(compile, num_draft_tokens, layout)
        check_seed(seed)
        self.target = target
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self.verification = verification
        self.seed = seed
        self.layout = layout
        self.compile = compile
        self.tokenizer = tokenizer
        self.draft_tokenizer = draft_tokenizer
        self.stats = Stats()
        self._proposer = build_proposer(target, draft, tokenizer, draft_tokenizer, compile)
        self._memory = Memory()
        self._memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()  # of drafts given to a call
        self._exits: dict[int, EarlyExit] = {}  # given to a call, by layers
        self._sampling = partial(sampling_for, verification)  # how a call draws
        self._steps = compiled_steps(target) if compile else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS and name in vars(self):
            raise InvalidInput(
                f"{name} is settled when a generator is made; make another: SpeculativeGenerator(target, ..., "
                f"{name}=...)"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        draft = repr(self.draft) if isinstance(self.draft, (str, type(None))) else type(self.draft).__name__
        return (
            f"SpeculativeGenerator({type(self.target).__name__}, {draft}, "
            f"num_draft_tokens={self.num_draft_tokens!r}, verification={self.verification!r})"
        )

    def __reduce__(self) -> Any:
        # what was learnt of this machine stays here
        settings = {name: getattr(self, name) for name in SETTINGS}
        return _made, (settings,), {"stats": self.stats}

    @classmethod
    def from_pretrained(cls, target_id: str, draft: Any = None, **kwargs: Any) -> SpeculativeGenerator:
        """Load target, draft and their tokenizers by hub id or path, safetensors only.

        Args:
            target_id: the target.
            draft: that of the constructor, with an id or a path in the place of a model, in a list too.
            kwargs: those of the constructor, and for ``from_pretrained`` of both models (dtype, device_map, ...).

        Raises:
            OSError: a model or a tokenizer is not there.
            SpecdecError: see the class.

        Example:
            >>> SpeculativeGenerator.from_pretrained("org/big", "org/small", dtype="auto")  # doctest: +SKIP
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not isinstance(target_id, (str, PathLike)):
            raise InvalidInput(
                f"target_id is a {type(target_id).__name__}; wanted is a hub id or a path. A model goes to "
                "SpeculativeGenerator(target, draft)"
            )
        options = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        load_kwargs = {"use_safetensors": True, **kwargs}
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        target = AutoModelForCausalLM.from_pretrained(target_id, **load_kwargs)
        if "tokenizer" not in options:
            options["tokenizer"] = AutoTokenizer.from_pretrained(target_id, **hub)

        def made(given: Any) -> Any:
            if not isinstance(given, str) or given in NAMES:
                return given
            try:
                model = AutoModelForCausalLM.from_pretrained(given, **load_kwargs)
            except OSError as error:
                error.add_note(
                    f"draft={given!r} is none of the words {', '.join(NAMES)} and was taken for a model's id"
                )
                raise
            if "draft_tokenizer" not in options:
                options["draft_tokenizer"] = AutoTokenizer.from_pretrained(given, **hub)
            return model

        return cls(
            target, [made(one) for one in draft] if isinstance(draft, (list, tuple)) else made(draft), **options
        )

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
            assistant_model: the draft for this call; ``num_assistant_tokens``, ``prompt_lookup_num_tokens`` and
                their companions mean what they mean in transformers.
            synced_gpus, custom_generate: refused unless None (or False).
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
            InvalidScores: in the middle: the scores hold NaN or forbid every token.
            InvalidProposal: in the middle: a proposer of one's own returned something else.
        """
        named = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        ours = {"seed": seed, "tokenizer": tokenizer, "prediction": prediction, "tenant": tenant}
        return self._enter(run_call, inputs, {**named, **kwargs}, streamer=streamer, **ours)

    @overload
    def stream(
        self, inputs: Tensor | None = None, *, release: None = None, **kwargs: Any
    ) -> Generator[Tokens, None, Any]: ...

    @overload
    def stream(
        self, inputs: Tensor | None = None, *, release: ShapedRelease, **kwargs: Any
    ) -> Generator[Chunk, None, Any]: ...

    def stream(
        self,
        inputs: Tensor | None = None,
        *,
        release: ShapedRelease | None = None,
        seed: int | list[int] | None = None,
        tokenizer: Any = None,
        prediction: Any = None,
        tenant: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Generator[Any, None, Any]:
        """Yield tokens as they become final, row by row.

        Options are judged at once, and an encoder runs; the model runs when the first record is asked for. Closing
        the generator, or dropping it, ends the call in the middle and leaves nothing behind.

        Args:
            inputs, seed, prediction, tenant, kwargs: as for ``generate()``, without ``streamer``.
            release: chunks of one size on a fixed clock, from which nobody learns how well the draft guesses.
                The model then runs ahead in a thread of its own.
            tokenizer: for the records' ``text``; overrides the constructor's.

        Yields:
            ``Tokens``: a row, its new ids, which of them the draft guessed, the text they add. They tell of the
            text more than the text itself does; where others see their number and times, give ``release``, and
            ``Chunk`` is yielded instead.

        Returns:
            what ``generate()`` returns, as the value of ``StopIteration``.

        Raises:
            UnsupportedOption: an option that is not honoured, or a model whose own ``generate()`` works on the
                finished text.
        """
        if kwargs.get("streamer") is not None:
            raise UnsupportedOption("streamer", "stream() is one itself; give it to generate()")
        if getattr(type(inner_model(self.target)), "generate", None) is not GenerationMixin.generate:
            raise UnsupportedOption("stream", f"{type(self.target).__name__}.generate() wants the whole text")
        if reason := needs_its_wrapper(self.target, kwargs):
            raise UnsupportedOption("stream", f"{reason}; call generate(), with a streamer")
        if release is not None and not isinstance(release, ShapedRelease):
            raise InvalidInput(f"release is a {type(release).__name__}; give a ShapedRelease(...) or None")
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer

        @torch.no_grad()
        def follow(*args: Any, **prepared: Any) -> Generator[Tokens, None, Any]:
            words = tokenizer if release is None else None  # a release writes the text itself
            return (yield from told(follow_call(*args, **prepared), words))

        def run(request: Request, model: Any, input_ids: Tensor, **prepared: Any) -> Generator[Any, None, Any]:
            records = follow(request, model, input_ids, **prepared)
            return resumed(records) if release is None else shaped(records, len(input_ids), tokenizer, release)

        ours = {"seed": seed, "tokenizer": tokenizer, "prediction": prediction, "tenant": tenant}
        records: Generator[Any, None, Any] = self._enter(run, inputs, kwargs, streamer=None, **ours)
        return records

    @overload
    def astream(
        self, inputs: Tensor | None = None, *, release: None = None, **kwargs: Any
    ) -> AsyncGenerator[Tokens, None]: ...

    @overload
    def astream(
        self, inputs: Tensor | None = None, *, release: ShapedRelease, **kwargs: Any
    ) -> AsyncGenerator[Chunk, None]: ...

    def astream(
        self, inputs: Tensor | None = None, *, release: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """``stream()`` for ``async for``: every round, or wait for a tick, is in a thread of the event loop's pool.

        An encoder runs when this is called. A task that is cancelled waits for the round or the tick that is under
        way, no longer.
        """
        return in_threads(self.stream(inputs, release=release, **kwargs))

    def attached(self) -> AbstractContextManager[None]:
        """Make ``target.generate`` itself speculative inside ``with``, for pipelines and any code that calls it.

        The attribute is set on the target object and put back whatever happens, so every thread that uses the
        object sees it; blocks may be nested. A ``custom_generate`` of the caller's goes to the plain one.
        """
        return attached(self.target, self.generate)

    def _enter(
        self,
        decode: Callable[..., Any],
        inputs: Tensor | None,
        options: dict[str, Any],
        *,
        streamer: Any,
        seed: int | list[int] | None,
        tokenizer: Any,
        prediction: Any,
        tenant: str | list[str] | None,
    ) -> Any:
        """What ``decode`` makes of the call that the target's ``generate()`` prepares.

        Args:
            decode: ``run_call``, or another function with its arguments.
            inputs, options, streamer, seed, tokenizer, prediction, tenant: of the call.
        """
        start = perf_counter()
        config, own = options.pop("generation_config", None), own_settings(self.target)
        check_options(self.target, config, options)
        check_prompt(self.target, config, inputs, options)
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        asked = read_assistance(self.draft is not None, config, own, options)
        home = home_of(self.target, inputs, options)
        if home is not None:
            inputs, options = taken_abroad(self.target, home, inputs, options)
        made_of = self._asked(asked, tokenizer)
        stats = self.stats = Stats()

        seed = check_seed(self.seed if seed is None else seed)
        request = Request(
            proposer=self._behind(prediction, tokenizer, made_of.proposer),
            length=self._length(seed, made_of),
            sampling=self._sampling,
            layout=self.layout,
            seed=seed,
            streamer=streamer,
            inputs=_model_inputs(self.target, inputs, options),
            steps=self._steps,
            stats=stats,
            start=start,
            tenants=check_tenant(tenant),
            home=home,
        )

        @torch.no_grad()
        def run(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return decode(request, model, input_ids, **prepared)

        heals = first_given((options, config, own), "token_healing")
        lent = healing_with(self.target, tokenizer) if heals else nullcontext()
        criteria = options.pop("stopping_criteria", None)
        door = with_stop_strings(self.target, config, criteria, tokenizer, options)
        with lent, door as (config, criteria, options):
            return self.target.generate(
                *([] if inputs is None else [inputs]),
                generation_config=config,
                stopping_criteria=criteria,
                **{**options, "custom_generate": run},
            )

    def _asked(self, asked: Assistance | None, tokenizer: Any) -> _Drafting:
        """What guesses in a call that may ask for a draft, a number or a confidence of its own."""
        drafting = _Drafting(self._proposer, self.num_draft_tokens, self._memory)
        if asked is None:
            return drafting
        if asked.num_draft_tokens is not None:
            drafting = replace(drafting, number=asked.num_draft_tokens)
        if asked.draft is not None:
            if asked.tokenizer is not None and tokenizer is None:
                raise InvalidInput("assistant_tokenizer is compared with the target's; give `tokenizer` as well")
            draft, memory = asked.draft, Memory()
            if isinstance(draft, EarlyExit):
                draft = self._exits.setdefault(draft.layers, draft)
            if isinstance(draft, (torch.nn.Module, EarlyExit)):
                memory = self._memories.setdefault(draft, memory)
            proposer = build_proposer(self.target, draft, tokenizer, asked.tokenizer)
            drafting = replace(drafting, proposer=proposer, memory=memory)
        if asked.confidence is not None:
            if not hasattr(drafting.proposer, "sure"):
                raise UnsupportedOption("assistant_confidence_threshold", "it needs a draft that is a model")
            drafting = replace(drafting, proposer=drafting.proposer.sure(asked.confidence))
        return drafting

    def _length(self, seed: Any, drafting: _Drafting) -> Callable[[int, bool], DraftLength]:
        """The rule of draft lengths, from (batch, do_sample)."""
        most, memory = drafting.number, drafting.memory
        if isinstance(most, int):
            return lambda *_: Fixed(most)

        def rule(batch: int, do_sample: bool) -> DraftLength:
            # by rejection the text depends on the number of guesses, and a given seed promises one text
            promised = do_sample and seed is not None and self.verification != "coupled"
            return Adaptive(Assumed(ASSUMED_COST)) if promised else memory.recall(batch, do_sample)

        return rule

    def _behind(self, prediction: Any, tokenizer: Any, proposer: Any) -> Any:
        """The call's proposer: what the user expects comes before what the draft guesses."""
        if prediction is None:
            return proposer
        pad_id = getattr(tokenizer, "pad_token_id", None)
        if pad_id is None:
            pad_id = self.target.generation_config.pad_token_id
        return Fallback(Prediction(read_predictions(prediction, tokenizer, pad_id)), proposer)


def _made(settings: dict[str, Any]) -> SpeculativeGenerator:
    """A generator by its settings, for copies."""
    return SpeculativeGenerator(**settings)


def _model_inputs(target: Any, inputs: Tensor | None, given: dict[str, Any]) -> dict[str, Any]:
    """The user's model inputs beside the decoder's ids, for a draft that prepares its own."""
    fields = vars(target.generation_config)
    others = ("negative_prompt_ids", "negative_prompt_attention_mask")
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.ndim and n not in (*fields, *others)}
    if not target.config.is_encoder_decoder:
        tensors.pop("input_ids", None)
    elif inputs is not None:
        tensors[target.main_input_name] = inputs
    return tensors
