"""The front door: ``SpeculativeGenerator``, a drop-in for ``model.generate()``.

Everything ``generate()`` prepares (inputs, positions, caches, processors, criteria, encoder) is prepared by the
target's own ``generate()``, entered through its public door ``custom_generate``; our loop runs behind it. What
that door would drop in silence is closed over here; what we do not honour is refused by name in
``options.py``. Models, configs and the user's objects stay as they were. Read next: ``options.py``.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from specdec.errors import InvalidInput
from specdec.length.fixed import Fixed
from specdec.loop import decode
from specdec.noise import draw_seed
from specdec.options import (
    build_proposer,
    check_constructor,
    check_options,
    check_prompt,
    with_stop_strings,
)
from specdec.outputs import Collector
from specdec.processing import Processing
from specdec.proposers import Call, Nothing
from specdec.records import Stats
from specdec.sampling import Coupled, Greedy, Rejection, Sampling
from specdec.scorer import Scorer, warn_plain
from specdec.state import State, to_host
from specdec.stopping import Watcher
from specdec.verify import Rule, row_keys


class SpeculativeGenerator:
    """Generates with ``target``, faster, and with exactly its output distribution.

    Args:
        target: a Hugging Face model with ``generate()``.
        draft: what guesses: a smaller model with the same token ids, a ``Proposer``, "ngram" (copies from
            the text so far), or None (plain decoding through the same loop).
        num_draft_tokens: guesses a round and row, >= 0; 0 is plain decoding.
        verification: "block" (default, keeps most), "token", or "coupled" (the text is a function of target,
            seed and prompt alone, whatever the draft, its length or the batch).
        seed: for sampling; None draws one from torch's global generator at every sampling call.
        layout: how a ragged batch keeps its keys and values; "auto" chooses, the rest is for tests.
        tokenizer, draft_tokenizer: when both are given, the pair is judged by them instead of by the sizes
            of the vocabularies; ``tokenizer`` also serves ``stop_strings``.

    Attributes:
        stats: what the last call of ``generate()`` did, a ``Stats``.

    Raises:
        VocabularyMismatch: draft and target do not share their token ids.
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
        num_draft_tokens: int = 5,
        verification: str = "block",
        seed: int | None = None,
        layout: str = "auto",
        tokenizer: Any = None,
        draft_tokenizer: Any = None,
    ) -> None:
        check_constructor(target, num_draft_tokens, verification, layout)
        self.target = target
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self.verification = verification
        self.seed = seed
        self.layout = layout
        self.tokenizer = tokenizer
        self.stats = Stats()
        self._proposer = build_proposer(target, draft, tokenizer, draft_tokenizer)

    @classmethod
    def from_pretrained(
        cls, target_id: str, draft_id: str | None = None, *, options: dict[str, Any] | None = None,
        **load_kwargs: Any,
    ) -> SpeculativeGenerator:  # fmt: skip
        """Load target, draft and their tokenizers by hub id or path, safetensors only.

        Args:
            target_id: the target.
            draft_id: the draft; None, "ngram" and other words of ``draft`` are taken as they are.
            options: keyword arguments of the constructor.
            load_kwargs: for ``from_pretrained`` of both models (dtype, device_map, ...).
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        load_kwargs.setdefault("use_safetensors", True)
        options = dict(options or {})
        target = AutoModelForCausalLM.from_pretrained(target_id, **load_kwargs)
        options.setdefault("tokenizer", AutoTokenizer.from_pretrained(target_id))
        draft: Any = draft_id
        if draft_id not in (None, "ngram"):
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
        **kwargs: Any,
    ) -> Any:
        """What ``target.generate()`` does, with the same arguments and return types.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
            streamer, negative_prompt_ids, negative_prompt_attention_mask, kwargs: as for
                ``target.generate()``.
            synced_gpus, assistant_model, custom_generate: refused unless None (or False).
            seed: overrides the constructor's; with verification="coupled" also one seed a row.
            tokenizer: for ``stop_strings``; overrides the constructor's.

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
        seed = self.seed if seed is None else seed
        stats = self.stats = Stats()

        @torch.no_grad()
        def run(
            model: Any,
            input_ids: Tensor,
            *,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            user = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "input_ids"}
            if inputs is not None and self.target.config.is_encoder_decoder:
                user[self.target.main_input_name] = inputs
            elif self.target.config.is_encoder_decoder and "input_ids" in kwargs:
                user["input_ids"] = kwargs["input_ids"]
            out = self._decode(
                model,
                input_ids,
                Processing(logits_processor),
                stopping_criteria,
                generation_config,
                model_kwargs,
                user,
                streamer,
                seed,
                stats,
            )
            stats.seconds = perf_counter() - start
            return out

        with with_stop_strings(self.target, generation_config, stopping_criteria, tokenizer, kwargs) as (
            generation_config,
            stopping_criteria,
            options,
        ):
            return self.target.generate(
                inputs,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                negative_prompt_ids=negative_prompt_ids,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                custom_generate=run,
                **options,
            )

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        processing: Processing,
        criteria: Any,
        config: Any,
        model_kwargs: dict[str, Any],
        user: dict[str, Any],
        streamer: Any,
        seed: int | list[int] | None,
        stats: Stats,
    ) -> Any:
        """Run the loop on what ``generate()`` prepared, and give back what it would return."""
        model_kwargs.pop("logits_to_keep", None)
        if model._supports_logits_to_keep():
            model_kwargs["logits_to_keep"] = 1
        prompt = input_ids.to(model.device)
        batch, width = prompt.shape
        if width == 0:
            raise InvalidInput(
                "the prompt is empty and the model has no bos token to begin with; give at least one token"
            )
        length = Fixed(self.num_draft_tokens)
        speculates = not isinstance(self._proposer, Nothing) and length.most > 0
        mask = model_kwargs.get("attention_mask")
        starts = np.zeros(batch, dtype=np.int64)
        if mask is not None and not model.config.is_encoder_decoder and mask.shape == prompt.shape:
            starts = np.argmax(to_host(mask) != 0, axis=1).astype(np.int64)
        eos = getattr(config, "_eos_token_tensor", None)
        has_eos = any(hasattr(c, "eos_token_id") for c in criteria)
        pad = config._pad_token_tensor
        max_length = min([config.max_length, *(m for m in [criteria.max_length] if m is not None)])
        state = State(
            prompt,
            max_length=max_length,
            max_guesses=length.most if speculates else 0,
            eos_ids=eos.to(model.device) if has_eos and eos is not None else None,
            pad_id=int(pad) if pad is not None else 0,
            starts=starts,
        )
        sampling = self._sampling(config.do_sample, seed, state)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        target = Scorer(model, model_kwargs, config, max_length=max_length, layout=self.layout)
        proposer = self._proposer if speculates else Nothing()
        if speculates and hasattr(proposer, "begin"):
            rows = batch // max(_rows(user, batch), 1)
            call = Call(
                target=model,
                prompt=prompt,
                inputs={k: v.repeat_interleave(rows, dim=0) if rows > 1 else v for k, v in user.items()},
                vocabulary=model.get_output_embeddings().weight.shape[0],
                max_length=max_length,
                processing=processing,
                sampling=sampling,
            )
            proposer = proposer.begin(call)
        collector = Collector(config, state)
        watcher = Watcher(criteria, streamer, state)
        rounds = decode(
            state,
            target,
            proposer,
            length if speculates else Fixed(0),
            processing,
            sampling,
            stats,
            keep_logits=collector.keeps_logits,
        )
        for round_ in rounds:
            collector.add(round_)
            watcher.follow(state, collector.scores)
        if streamer is not None:
            streamer.end()
        stats.target_forwards, stats.layout = target.forwards, target.layout.name
        stats.draft_forwards = getattr(proposer, "forwards", 0)
        stats.draft_layout = getattr(proposer, "layout", "")
        stats.host_copies = state.host_copies
        stats.emitted = int((state.lengths - width).sum())
        stats.row_emitted = state.lengths - width
        if speculates and stats.layout == "plain" and self.layout == "auto":
            warn_plain(model, "several tokens in one forward do not give the scores of one-token steps")
        sequences = state.tokens[:, : int(state.lengths.max())].to(input_ids.device, copy=True)
        return collector.output(model, sequences, model_kwargs, stats)

    def _sampling(self, do_sample: bool, seed: int | list[int] | None, state: State) -> Sampling:
        """The way to draw: greedy draws no random number at all."""
        if not do_sample:
            return Greedy()
        if self.verification == "coupled":
            seed = draw_seed() if seed is None else seed
            seeds = seed if isinstance(seed, list) else [seed] * state.batch
            if len(seeds) != state.batch:
                raise InvalidInput(f"{len(seeds)} seeds for {state.batch} rows; give one seed a row")
            rows = zip(state.host_tokens, state.starts, strict=True)
            prompts = [row[start : state.prompt_length].tolist() for row, start in rows]
            keys = torch.tensor(row_keys(seeds, prompts), dtype=torch.int64, device=state.device)
            return Coupled(keys)
        if isinstance(seed, list):
            raise InvalidInput("one seed a row needs verification='coupled'; give a single seed")
        seed = draw_seed() if seed is None else seed
        rule: Rule = "token" if self.verification == "token" else "block"
        return Rejection(rule, seed, state.device)


def _rows(user: dict[str, Any], batch: int) -> int:
    """Rows of the user's inputs, before ``num_return_sequences`` repeated them."""
    sizes = [v.shape[0] for k, v in user.items() if k in ("attention_mask", "input_ids", "input_features")]
    return sizes[0] if sizes and batch % sizes[0] == 0 else batch


__all__ = ["GenerateDecoderOnlyOutput", "GenerateEncoderDecoderOutput", "SpeculativeGenerator"]
